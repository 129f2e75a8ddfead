"""Rejection sampling: training rows and preference pairs from graded samples. Pure: samples in, rows and counts out.

Rows are what RFT/RAFT trains on: the model's own responses that the grader accepts (DFT paper, arXiv 2508.05629,
Sec. 4.2). Pairs are for DPO: an accepted and a rejected response to the same problem.
"""

import math
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from verl_dft.data.prompts import Prompt, find_prompt
from verl_dft.data.records import Row
from verl_dft.errors import InputError
from verl_dft.grading.pool import VERDICTS
from verl_dft.sampling.record import Sample, StoredSamples

REJECTABLE = ("wrong", "no_answer")
"""Verdicts that may count as rejected. ``timeout`` and ``error`` are none: such a response may well be right."""
VERIFIERS = ("strict", "qwen")
SAMPLED = "sampled"
"""``prompt=sampled``: a row keeps the prompt that its response was sampled with."""


@dataclass(frozen=True)
class RejectOptions:
    """What becomes a row or a pair.

    ``prompt``: of the rows, as ``verl_dft.data.prompts.find_prompt`` takes it, or ``sampled``. ``max_per_problem``: so
    many rows at most, chosen by ``seed`` (None: all). ``dedup``: one of several equal texts of a problem.
    ``keep_truncated``: use correct responses that were cut off. ``pairs_per_problem``: at most (None: every pair there
    is, 0: none). ``rejected``: verdicts that make the worse half of a pair. ``verifier``: whose verdict counts,
    ``strict`` or ``qwen`` (with the Qwen2.5-Math harness's leniencies).

    Raises:
        InputError: a value that is none of these.
    """

    prompt: str = "raw"
    max_per_problem: int | None = None
    dedup: bool = True
    keep_truncated: bool = False
    pairs_per_problem: int | None = 1
    rejected: Sequence[str] = REJECTABLE
    verifier: str = "strict"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_per_problem", 1), ("pairs_per_problem", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise InputError(f"{name}={value}; it must be a whole number of at least {least}, or null for all")
        if not self.rejected or not set(self.rejected) <= set(REJECTABLE):
            why = "" if set(self.rejected) <= set(VERDICTS) - {"correct"} else " (not a verdict of a wrong response)"
            raise InputError(
                f"rejected={list(self.rejected)}{why}; use one or both of {', '.join(REJECTABLE)}: a response that "
                "timed out or failed in grading may be right"
            )
        if self.prompt != SAMPLED:
            row_prompt(self.prompt if isinstance(self.prompt, str) else str(self.prompt))
        check_verifier(self.verifier)


@lru_cache
def row_prompt(given: str) -> tuple[str, Prompt]:
    """Name and turns of the rows' prompt. Raises InputError for an unknown one, or one that shows a solution."""
    name, prompt = find_prompt(given)
    if prompt.needs_reference:
        raise InputError(f"prompt={given} shows a reference solution, which rows must not have; use raw")
    return name, prompt


def check_verifier(verifier: str) -> None:
    """Raise InputError for a verifier that there is not."""
    if verifier not in VERIFIERS:
        raise InputError(f"verifier={verifier} is not one of {', '.join(VERIFIERS)}")


def verdict_of(sample: Sample, verifier: str) -> str:
    """One of ``VERDICTS``. Raises InputError where the sample was not judged by that verifier."""
    verdict = sample.qwen if verifier == "qwen" else sample.grade
    if verdict not in VERDICTS:
        raise InputError(
            f"sample {sample.index} of problem {sample.problem_id} has no verdict of verifier={verifier} "
            f"(column {'qwen' if verifier == 'qwen' else 'grade'}); use verifier=strict, or sample again"
        )
    return verdict


@dataclass(frozen=True)
class Pair:
    """A correct and a rejected response to one problem, under the same ``prompt`` turns."""

    prompt: list[dict[str, str]]
    chosen: Sample
    rejected: Sample


@dataclass(frozen=True)
class Sorted:
    """A problem's samples: those that may be used, and how many were not and why."""

    correct: list[Sample]
    rejected: list[Sample]
    num_truncated: int
    """Correct ones that were cut off, where those are left out."""
    num_duplicates: int
    """Of correct ones."""
    num_rejected_duplicates: int


class ByProblem(Mapping[str, list[Sample]]):
    """Problems in order with their samples, which are taken from where they are each time that they are asked for."""

    def __init__(self, samples: Sequence[Sample], positions: Mapping[str, Sequence[int]]) -> None:
        self._samples, self._positions = samples, positions

    def __getitem__(self, problem_id: str) -> list[Sample]:
        return [self._samples[i] for i in self._positions[problem_id]]

    def __contains__(self, problem_id: object) -> bool:
        return problem_id in self._positions

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)


def by_problem(samples: Sequence[Sample], limit: int | None = None) -> ByProblem:
    """Samples of each problem, of the first ``limit`` problems in the order in which they first occur."""
    positions: dict[str, array[int]] = {}
    stored = isinstance(samples, StoredSamples)
    for i, problem_id in enumerate(samples.problem_ids if stored else (sample.problem_id for sample in samples)):
        if problem_id in positions or limit is None or len(positions) < limit:
            positions.setdefault(problem_id, array("q")).append(i)
    return ByProblem(samples, positions)


def sort_out(samples: Sequence[Sample], options: RejectOptions) -> Sorted:
    """Which of a problem's samples may be used as correct and as rejected."""
    verdicts = [verdict_of(sample, options.verifier) for sample in samples]
    correct = [sample for sample, verdict in zip(samples, verdicts, strict=True) if verdict == "correct"]
    complete = [sample for sample in correct if options.keep_truncated or not is_truncated(sample)]
    # an endpoint's empty answer has neither text nor tokens: nothing that a probability could be of
    rejected = [
        sample
        for sample, verdict in zip(samples, verdicts, strict=True)
        if verdict in options.rejected and (sample.token_ids or sample.response.strip())
    ]
    good, bad = (distinct(kept) if options.dedup else kept for kept in (complete, rejected))
    return Sorted(good, bad, len(correct) - len(complete), len(complete) - len(good), len(rejected) - len(bad))


def is_truncated(sample: Sample) -> bool:
    """Whether the response was cut off instead of ending by itself."""
    return sample.finish_reason != "stop"


def distinct(samples: Sequence[Sample]) -> list[Sample]:
    """The first of each text."""
    return list({sample.response: sample for sample in reversed(samples)}.values())[::-1]


def rft_rows(problem_id: str, found: Sorted, options: RejectOptions) -> list[Row]:
    """A row per correct response of a problem, at most ``max_per_problem``.

    ``response_ids`` are the sampled tokens and ``behavior_logp`` the sampler's log-probs [num_tokens] in nats (at
    temperature 1), where the samples have them. A row with another prompt than its sample's has no ``behavior_logp``:
    the objectives that divide by it take it for the probability under the row's own prompt.

    Raises:
        InputError: a sample without the text of its problem.
    """
    correct, most = found.correct, options.max_per_problem
    if most is not None and len(correct) > most:
        chosen = random.Random(f"{options.seed} rft {problem_id}").sample(range(len(correct)), most)
        correct = [correct[i] for i in sorted(chosen)]
    return [_row(sample, options.prompt) for sample in correct]


def _row(sample: Sample, given: str) -> Row:
    name, turns = prompt_turns(sample, given)
    ids = sample.token_ids or None  # an endpoint tells none
    return Row(
        [*turns, {"role": "assistant", "content": sample.response}],
        sample.problem_id,
        "self",
        response_ids=ids,
        behavior_logp=sample.logp if ids and name == sample.prompt_name else None,
        finish_reason=sample.finish_reason,
    )


def prompt_turns(sample: Sample, given: str) -> tuple[str, list[dict[str, str]]]:
    """Name and turns of the prompt before the response in training.

    Raises:
        InputError: the sample does not say what its problem or (under ``sampled``) its prompt was.
    """
    if not sample.problem.strip():
        raise InputError(f"sample {sample.index} of problem {sample.problem_id} has no problem text (column problem)")
    if given == SAMPLED and not sample.prompt_name:
        raise InputError(
            f"sample {sample.index} of problem {sample.problem_id} does not tell its prompt (column prompt_name); "
            "use prompt=raw or another name"
        )
    name, prompt = row_prompt(sample.prompt_name if given == SAMPLED else given)
    return name, prompt.messages(sample.problem)


def preference_pairs(problem_id: str, found: Sorted, options: RejectOptions) -> list[Pair]:
    """Pairs of a correct and a rejected response of a problem, at most ``pairs_per_problem``.

    No pair occurs twice, and each response is used as often as the others of its side, give or take one. Which ones are
    used when not all are needed depends on ``seed``.

    Raises:
        InputError: a sample without the text of its problem.
    """
    rng = random.Random(f"{options.seed} pairs {problem_id}")
    sides = [rng.sample(side, len(side)) for side in (found.correct, found.rejected)]
    pairs = []
    for good, bad in balanced_pairs(len(sides[0]), len(sides[1]), options.pairs_per_problem):
        chosen, rejected = sides[0][good], sides[1][bad]
        pairs.append(Pair(prompt_turns(chosen, options.prompt)[1], chosen, rejected))
    return pairs


def balanced_pairs(num_left: int, num_right: int, most: int | None) -> Iterator[tuple[int, int]]:
    """``min(most, num_left * num_right)`` distinct pairs (i, j) that use all i, and all j, equally often (±1).

    Walking both sides in step gives lcm(L, R) different pairs, and each further round, the right side shifted by one
    more, as many others: after gcd(L, R) rounds every pair has come once.
    """
    total = num_left * num_right
    if not total:
        return
    period = math.lcm(num_left, num_right)
    for i in range(total if most is None else min(most, total)):
        yield i % num_left, (i + i // period) % num_right
