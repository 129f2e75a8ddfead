"""Data rewriting as a pure planner: which samples are wanted next, told the graded ones. No model, no files.

Mind the Gap: data rewriting for off-policy SFT, 2025, Section 3.2. A problem that the model solves is trained on with
the model's own response (stage ``self``); else with one that it wrote with the expert solution before it (``guided``);
else with the expert solution (fallback). Of several correct responses a random one is kept.

``early_stop`` draws a stage's n samples in waves and stops at the first wave with a correct one. Samples of a problem
are independent draws from one distribution, so the first correct one is distributed as a random correct one of n, and
whether there is one at all does not depend on when we look. A wave is judged only when it is complete, and its lowest
correct index wins: taking what is finished first would favour short responses.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from verl_dft.data.prompts import Prompt
from verl_dft.data.records import Problem, Row
from verl_dft.sampling.ask import Ask, Sampling
from verl_dft.sampling.record import Sample

SELF, GUIDED, FALLBACK, DROPPED = "self", "guided", "fallback", "dropped"
ABLATIONS = ("full", "self_only", "guided_only")
VERIFIERS = ("strict", "qwen")
UNSOLVED, NO_VERDICT, NO_SOLUTION = "unsolved", "unsolved, a sample got no verdict", "no expert solution"
"""Reasons for a fallback or a dropped problem; those of a gold are in :mod:`verl_dft.build.rewrite_gold`."""
_UNGRADED = ("timeout", "error")


@dataclass(frozen=True)
class Stage:
    """How a stage samples and what it takes for correct."""

    name: str
    """``self`` or ``guided``."""
    n: int
    """Samples per problem, at most."""
    sampling: Sampling
    prompt_name: str
    prompt: Prompt
    verifier: str = "strict"
    """``strict`` or ``qwen``: which of a sample's two verdicts counts."""
    keep_truncated: bool = False
    """Whether a correct response may have been cut off."""

    def correct(self, sample: Sample) -> bool:
        """Whether this stage's verifier takes the response for correct."""
        return (sample.qwen if self.verifier == "qwen" else sample.grade) == "correct"

    def accepts(self, sample: Sample) -> bool:
        """Whether the response may become a row."""
        return self.correct(sample) and (self.keep_truncated or sample.finish_reason == "stop")


@dataclass(frozen=True)
class RewriteOptions:
    """What to do; see ``configs/rewrite.yaml``.

    ``stages``: ``full``; ``self_only`` has no guided stage; under ``guided_only`` the self stage only decides which
    problems are retold, and those that it solves keep the expert's text.
    """

    self_stage: Stage
    guided_stage: Stage
    stages: str = "full"
    early_stop: bool = True
    wave_size: int = 2
    seed: int = 0

    def sampled_stages(self) -> list[Stage]:
        """The stages that sample, in order."""
        return [self.self_stage] if self.stages == "self_only" else [self.self_stage, self.guided_stage]

    def wave_sizes(self, stage: Stage) -> list[int]:
        """Samples per problem of each wave of a stage; all of them in one without early stopping."""
        size = self.wave_size if self.early_stop else stage.n
        return [min(size, stage.n - start) for start in range(0, stage.n, size)]


@dataclass(frozen=True)
class Wave:
    """Samples wanted together: ``size`` of each problem that is still open, problem by problem, then by index."""

    stage: Stage
    number: int
    size: int
    asks: list[Ask]


@dataclass(frozen=True)
class Outcome:
    """What became of a problem.

    ``stage``: ``self``, ``guided``, ``fallback`` or ``dropped`` (no row). ``origin``: whose text the row has, None
    where there is no row. ``kept``: the correct sample that decided, where one did; ``reason``: why not, otherwise.
    """

    problem: Problem
    stage: str
    origin: str | None
    kept: Sample | None = None
    reason: str = ""


@dataclass
class _State:
    problem: Problem
    unusable: str = ""
    kept: Sample | None = None
    kept_in: str = ""
    ungraded: bool = False
    """Whether a sample got no verdict: the grader timed out or failed."""


@dataclass
class RewritePlanner:
    """Wave after wave of what to sample. Call :meth:`next_wave`, sample its asks, :meth:`tell`, until it is None.

    What comes next depends on nothing but problems, options and verdicts, so that a run that is repeated on a store of
    samples asks for the same again.

    Args:
        problems: with different ids.
        unusable: problem id -> why no response to it can be judged; such problems go to fallback unsampled.
    """

    problems: Sequence[Problem]
    options: RewriteOptions
    unusable: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._states = {p.id: _State(p, self.unusable.get(p.id, "")) for p in self.problems}
        assert len(self._states) == len(self.problems), "two problems have the same id"
        self._waves = self._all_waves()
        self._current: Wave | None = None
        self.history: list[tuple[Wave, list[Sample]]] = []
        """Every wave that was told, with its samples; these are without text, ids and log-probs."""

    def next_wave(self) -> Wave | None:
        """The wave to sample now, the same until it is told; None when nothing more is to be sampled."""
        while self._current is None:
            coming = next(self._waves, None)
            if coming is None:
                return None
            stage, number, start, size = coming
            asks = [ask for p in self._open(stage) for ask in asks_of(p, stage, range(start, start + size))]
            self._current = Wave(stage, number, size, asks) if asks else None
        return self._current

    def tell(self, samples: Sequence[Sample]) -> None:
        """The graded samples of the wave, in the order of its asks."""
        wave = self._current
        assert wave is not None, "no wave is waiting for samples"
        other, counted = "these are not the samples that were asked for", []
        assert len(samples) == len(wave.asks), other
        for start in range(0, len(samples), wave.size):
            of_problem = samples[start : start + wave.size]
            asked = [(ask.problem_id, ask.index) for ask in wave.asks[start : start + wave.size]]
            assert asked == [(s.problem_id, s.index) for s in of_problem], other
            self._judge(wave.stage, of_problem)
            counted += [replace(sample, response="", token_ids=None, logp=None) for sample in of_problem]
        self.history.append((wave, counted))
        self._current = None

    def outcomes(self) -> list[Outcome]:
        """What became of each problem, in their order. Call it when :meth:`next_wave` is None."""
        assert self.next_wave() is None, "samples are still to come"
        return [self._outcome(state) for state in self._states.values()]

    def largest_asks(self) -> list[Ask]:
        """An ask with every prompt that may come up in any stage: for dry runs and for sizing an engine."""
        stages = self.options.sampled_stages()
        return [ask for stage in stages for p in self._open(stage) for ask in asks_of(p, stage, range(1))]

    def _all_waves(self) -> Iterator[tuple[Stage, int, int, int]]:
        for stage in self.options.sampled_stages():
            start = 0
            for number, size in enumerate(self.options.wave_sizes(stage)):
                yield stage, number, start, size
                start += size

    def _open(self, stage: Stage) -> list[Problem]:
        """Problems that a stage still has to solve."""
        states = (s for s in self._states.values() if s.kept is None and not s.unusable)
        return [s.problem for s in states if stage.name == SELF or has_solution(s.problem)]

    def _judge(self, stage: Stage, samples: Sequence[Sample]) -> None:
        """The complete wave of one problem."""
        state = self._states[samples[0].problem_id]
        state.ungraded |= any(sample.grade in _UNGRADED for sample in samples)
        correct = [sample for sample in samples if stage.accepts(sample)]
        if correct:
            state.kept, state.kept_in = self._choose(stage, correct), stage.name

    def _choose(self, stage: Stage, correct: Sequence[Sample]) -> Sample:
        if self.options.early_stop:
            return min(correct, key=lambda sample: sample.index)
        chance = random.Random(f"rewrite {self.options.seed} {stage.name} {correct[0].problem_id}")
        return chance.choice(correct)

    def _outcome(self, state: _State) -> Outcome:
        problem, kept, stage = state.problem, state.kept, state.kept_in or FALLBACK
        reason = ""
        if kept is None:
            reason = state.unusable or (NO_VERDICT if state.ungraded else UNSOLVED)
        from_model = stage == GUIDED or (stage == SELF and self.options.stages != "guided_only")
        if from_model:
            return Outcome(problem, stage, stage, kept)
        if not has_solution(problem):
            return Outcome(problem, DROPPED, None, kept, NO_SOLUTION)
        return Outcome(problem, stage, "expert", kept, reason)


def has_solution(problem: Problem) -> bool:
    """Whether there is an expert solution to show and to fall back on."""
    return bool((problem.solution or "").strip())


def asks_of(problem: Problem, stage: Stage, indices: Sequence[int]) -> list[Ask]:
    """Samples ``indices`` of a problem in a stage. The stages have different streams, so their luck is independent."""
    reference = problem.solution if stage.prompt.needs_reference else None
    messages = stage.prompt.messages(problem.problem, reference)
    first = Ask(
        problem_id=problem.id,
        index=0,
        messages=messages,
        gold=problem.answer,
        sampling=stage.sampling,
        prompt_name=stage.prompt_name,
        stream=f"rewrite/{stage.name}",
        problem=problem.problem,
    )
    return first.numbered(indices)


def make_row(outcome: Outcome, options: RewriteOptions, prompt_name: str, prompt: Prompt) -> Row:
    """The training row of an outcome that has one: the plain problem through ``prompt``, and the text of ``origin``.

    A guided row has the plain prompt too, never the reference; its ``behavior_logp`` are those of the prompt that it
    was sampled with. A self row that was sampled with another prompt than the row's has none: the objectives that
    divide by it take it for the probability under the row's own prompt.
    """
    assert outcome.origin is not None, "a dropped problem has no row"
    if outcome.origin == "expert":
        return expert_row(outcome.problem, prompt)
    turns, sample = prompt.messages(outcome.problem.problem), outcome.kept
    assert sample is not None
    known = outcome.origin == GUIDED or options.self_stage.prompt_name == prompt_name
    turns.append({"role": "assistant", "content": sample.response})
    return Row(
        turns,
        outcome.problem.id,
        outcome.origin,
        response_ids=sample.token_ids,
        behavior_logp=sample.logp if known else None,
        finish_reason=sample.finish_reason,
    )


def expert_row(problem: Problem, prompt: Prompt) -> Row:
    """The training row of a problem with the expert's text, through ``prompt``."""
    turns = prompt.messages(problem.problem)
    return Row([*turns, {"role": "assistant", "content": problem.solution or ""}], problem.id, "expert")
