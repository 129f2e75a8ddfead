"""What goes into a group: its composition, the options, the candidates, and what is missing of them. Pure."""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from verl_dft.build.reject import check_verifier, row_prompt, verdict_of
from verl_dft.build.rewrite_gold import EMPTY
from verl_dft.data.records import Problem
from verl_dft.errors import InputError
from verl_dft.sampling.record import Sample

MEMBERS = ("expert", "teacher", "self")
"""Who writes a group's responses, in the order of its rows."""
_UNGRADED = ("timeout", "error")


@dataclass(frozen=True)
class Composition:
    """How many responses of a group each member writes. ``alone``: the expert's text only, with advantage 1."""

    expert: int = 1
    teacher: int = 3
    own: int = 4
    alone: bool = False

    def __post_init__(self) -> None:
        for name, count in zip(MEMBERS, self.counts, strict=True):
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise InputError(f"composition.{name}={count}; it must be a whole number of at least 0")
        if self.expert > 1:
            raise InputError(f"composition.expert={self.expert}; a problem has one expert solution: use 0 or 1")
        if self.size < 2 and not self.alone:
            raise InputError(
                f"composition {self} makes groups of {self.size}; an advantage compares at least two responses "
                "(expert texts alone, with advantage 1: composition=no_gal)"
            )

    @property
    def counts(self) -> tuple[int, int, int]:
        """Of expert, teacher and self."""
        return self.expert, self.teacher, self.own

    @property
    def size(self) -> int:
        """K, the responses of a group."""
        return sum(self.counts)

    def __str__(self) -> str:
        return "no_gal" if self.alone else ":".join(map(str, self.counts))


def parse_composition(text: str) -> Composition:
    """A composition from its short form.

    ``1:3:4`` is expert : teacher : self. ``4:4`` is demonstrations : self, the ratios of the paper's Table 5; of the
    demonstrations one is the expert's (the paper does not tell; it is so in its default, 1 + 3 : 4). ``no_mix`` is
    1:0:7 (ours: the paper gives no composition), ``no_gal`` expert texts alone with advantage 1.

    Raises:
        InputError: none of these.
    """
    if text == "no_gal":
        return Composition(1, 0, 0, alone=True)
    if text == "no_mix":
        return Composition(1, 0, 7)
    parts = [part.strip() for part in text.strip("[]").replace(",", ":").split(":")]
    if len(parts) not in (2, 3) or not all(part.isdecimal() for part in parts):
        raise InputError(
            f"composition={text}; use expert:teacher:self (1:3:4), demonstrations:self (4:4), no_mix or no_gal"
        )
    numbers = [int(part) for part in parts]
    if len(numbers) == 2:
        expert = min(numbers[0], 1)
        numbers = [expert, numbers[0] - expert, numbers[1]]
    return Composition(*numbers)


@dataclass(frozen=True)
class GroupOptions:
    """How responses become rows.

    ``prompt``: of the rows. ``std``: ``sample`` (divisor K - 1, the authors' code) or ``population`` (K); the paper
    does not say which. ``epsilon``: added to the deviation (1e-6 in the code). ``expert_reward``: ``graded`` by rule
    as any other (the code) or ``one``. ``keep_expert``: the expert keeps advantage 1 where all rewards are equal.
    ``drop_equal``: leave such groups out. ``verifier``: whose verdict is the reward, ``strict`` or ``qwen``.
    ``missing``: of a solution or of own responses: ``error``, or ``skip`` the problem. ``missing_teacher``: also
    ``self``, own responses in the place of teacher texts.

    Raises:
        InputError: a value that is none of these.
    """

    prompt: str = "raw"
    std: str = "sample"
    epsilon: float = 1e-6
    expert_reward: str = "graded"
    keep_expert: bool = False
    drop_equal: bool = False
    verifier: str = "strict"
    missing: str = "error"
    missing_teacher: str = "error"

    def __post_init__(self) -> None:
        choices = {
            "std": ("sample", "population"),
            "expert_reward": ("graded", "one"),
            "missing": ("error", "skip"),
            "missing_teacher": ("error", "skip", "self"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise InputError(f"{name}={getattr(self, name)} is not one of {', '.join(valid)}")
        if not isinstance(self.epsilon, int | float) or isinstance(self.epsilon, bool) or not self.epsilon >= 0:
            raise InputError(f"epsilon={self.epsilon}; it must be a number of at least 0")
        row_prompt(self.prompt)
        check_verifier(self.verifier)


@dataclass(frozen=True)
class Response:
    """A candidate for a group. ``verdict`` is the grader's; the rest as in ``verl_dft.data.records.Row``."""

    text: str
    verdict: str
    response_ids: list[int] | None = None
    behavior_logp: list[float] | None = None
    finish_reason: str | None = None

    @property
    def present(self) -> bool:
        """Whether there is a text or tokens."""
        return bool(self.response_ids or self.text.strip())

    def load(self) -> "Response":
        """Itself; see :meth:`StoredResponse.load`."""
        return self


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response that is read from where it is stored each time that it is needed. The rest as of :class:`Response`."""

    verdict: str
    finish_reason: str | None
    present: bool
    position: int
    read: Callable[[int], Response]
    """Gives the response at a position."""

    def load(self) -> Response:
        """The response with its text and tokens."""
        return self.read(self.position)


Candidate = Response | StoredResponse


@dataclass(frozen=True)
class Candidates:
    """What there is for one problem's group. Of more responses than are asked for, the first are taken.

    ``unusable``: why no response can be judged against the problem's gold, if so.
    """

    expert: Response | None = None
    teacher: Sequence[Candidate] = ()
    own: Sequence[Candidate] = ()
    unusable: str = ""


@dataclass(frozen=True)
class Plan:
    """The composition of each problem's group, and the problems without one by reason."""

    compositions: dict[str, Composition]
    left_out: dict[str, list[str]]


def own_response(sample: Sample, options: GroupOptions) -> Response:
    """A sample of the model itself: with its tokens, and their log-probs where the row has the prompt it answers."""
    ids = sample.token_ids or None
    known = ids and sample.prompt_name == row_prompt(options.prompt)[0]
    verdict = verdict_of(sample, options.verifier)
    return Response(sample.response, verdict, ids, sample.logp if known else None, sample.finish_reason)


def teacher_response(sample: Sample, options: GroupOptions) -> Response:
    """A teacher's sample: the text alone, since its tokens may be those of another tokenizer."""
    return Response(sample.response, verdict_of(sample, options.verifier), finish_reason=sample.finish_reason)


def stored(response: Response, position: int, read: Callable[[int], Response]) -> StoredResponse:
    """What planning and counting need of a response that ``read(position)`` gives again."""
    # there are few verdicts and reasons: one text of each is enough
    reason = None if response.finish_reason is None else sys.intern(response.finish_reason)
    return StoredResponse(sys.intern(response.verdict), reason, response.present, position, read)


def wanted_composition(composition: Composition, num_teacher: int, options: GroupOptions) -> Composition | None:
    """The composition of a problem with so many teacher texts; None where there are too few and none may stand in."""
    short = composition.teacher - num_teacher
    if short <= 0:
        return composition
    if options.missing_teacher != "self":
        return None
    return replace(composition, teacher=num_teacher, own=composition.own + short)


def plan_groups(
    problems: Sequence[Problem],
    candidates: Mapping[str, Candidates],
    composition: Composition,
    options: GroupOptions,
    follow: Collection[str] = (),
) -> Plan:
    """Which problems get a group, of what composition, and which are left out and why. Reads no verdicts.

    Args:
        follow: ``teacher`` and ``self``, where they are sampled afterwards, so that none are missing now.

    Raises:
        InputError: something is missing where the options say ``error``; no problem is left.
    """
    plan = Plan({}, {})
    for problem in problems:
        found = candidates.get(problem.id, Candidates())
        outcome = _plan_one(problem, found, composition, options, follow)
        if isinstance(outcome, str):
            plan.left_out.setdefault(outcome, []).append(problem.id)
        else:
            plan.compositions[problem.id] = outcome
    _refuse_missing(plan.left_out, len(problems), composition, options)
    if not plan.compositions:
        raise InputError(f"no group can be made of {len(problems)} problems: {_reasons(plan.left_out)}")
    return plan


_NO_SOLUTION, _NO_TEACHER, _NO_OWN = "no expert solution", "too few teacher texts", "too few own responses"


def _plan_one(
    problem: Problem, found: Candidates, wanted: Composition, options: GroupOptions, follow: Collection[str]
) -> Composition | str:
    """The group's composition, or why there is none."""
    if wanted.expert and (found.expert is None or not found.expert.text.strip()):
        return _NO_SOLUTION
    if wanted.alone:
        return wanted
    if found.unusable or not problem.answer.strip():
        return found.unusable or EMPTY
    composition = wanted if "teacher" in follow else wanted_composition(wanted, len(usable(found.teacher)), options)
    if composition is None:
        return _NO_TEACHER
    if "self" not in follow and len(usable(found.own)) < composition.own:
        return _NO_OWN
    return composition


def usable(responses: Sequence[Candidate]) -> list[Candidate]:
    """Those with a text or tokens, in order, but the ones that could not be graded last."""
    return sorted((one for one in responses if one.present), key=lambda one: one.verdict in _UNGRADED)


def _reasons(skipped: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{len(ids)} x {reason}" for reason, ids in skipped.items())


def _refuse_missing(
    skipped: Mapping[str, Sequence[str]], num_problems: int, composition: Composition, options: GroupOptions
) -> None:
    advice = {
        _NO_SOLUTION: (options.missing, "missing=skip leaves them out, composition.expert=0 needs none"),
        _NO_TEACHER: (options.missing_teacher, "teacher.missing=skip leaves them out, self fills their places"),
        _NO_OWN: (options.missing, "missing=skip leaves them out; or sample more"),
    }
    for reason, (policy, hint) in advice.items():
        if reason in skipped and policy == "error":
            ids = skipped[reason]
            raise InputError(
                f"{len(ids)} of {num_problems} problems have {reason} for groups of {composition} (first: {ids[0]}); "
                f"{hint}"
            )
