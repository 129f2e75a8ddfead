"""What early stopping saves in data rewriting, measured on simulated problems beside the theory.

    python scripts/simulate_rewrite.py [--problems 10000] [--n 8] [--wrong-tokens 300] [--correct-tokens 300] [--seed 0]

Every problem has a solve rate of its own for each stage, uniform on (0, 1); its samples are right with that chance,
independently. The planner of `verl-dft rewrite` does the rest, with waves of 1, 2, 4 and so on, and literally.

Theory. A wave is drawn if the k samples before it were all wrong, which has probability E[(1 - p)^k] = 1 / (k + 1) over
uniform p. Its samples are then right with probability E[(1 - p)^k p] = 1 / (k + 1) - 1 / (k + 2) and wrong with
E[(1 - p)^(k + 1)] = 1 / (k + 2) (both include that the wave is drawn at all). The guided stage is reached with
probability 1 / (n + 1) and does the same again. At n = 8 and waves of 2, a stage draws 2 (1 + 1/3 + 1/5 + 1/7) = 3.35
samples a problem instead of 8.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from verl_dft.build.rewrite import FALLBACK, GUIDED, SELF, RewriteOptions, RewritePlanner, Stage
from verl_dft.data.prompts import PROMPTS
from verl_dft.data.records import Problem
from verl_dft.sampling.ask import Ask, Sampling
from verl_dft.sampling.choose import uniforms
from verl_dft.sampling.record import Sample
from verl_dft.sampling.seeds import sample_seed


@dataclass(frozen=True)
class Response:
    """A response that a simulated model gives, and how often."""

    text: str
    chance: float
    correct: bool
    num_tokens: int


class SimulatedSampler:
    """Stands where the model, the store and the grader do: ``sample(asks)`` gives graded samples.

    Args:
        responses: (problem id, stage) -> what is answered there, chances adding up to 1.
        seed: of the run.
        shared_luck: for tests: the stages draw the same numbers, as they would with one stream.
    """

    def __init__(
        self, responses: Callable[[str, str], Sequence[Response]], seed: int = 0, shared_luck: bool = False
    ) -> None:
        self.responses, self.seed, self.shared_luck = responses, seed, shared_luck

    def sample(self, asks: Sequence[Ask]) -> list[Sample]:
        """A graded sample for each ask."""
        streams = ["" if self.shared_luck else ask.stream for ask in asks]
        seeds = [sample_seed(self.seed, f"{s}/{a.problem_id}", a.index) for s, a in zip(streams, asks, strict=True)]
        drawn = uniforms(seeds, [0] * len(asks))
        return [self._sample(ask, float(u)) for ask, u in zip(asks, drawn, strict=True)]

    def _sample(self, ask: Ask, u: float) -> Sample:
        options = self.responses(ask.problem_id, ask.stream.rpartition("/")[2])
        ends = accumulate(option.chance for option in options)
        chosen = next((option for option, end in zip(options, ends, strict=True) if u < end), options[-1])
        grade = "correct" if chosen.correct else "wrong"
        return Sample(
            ask.problem_id, ask.index, chosen.text, "stop", grade, prompt_name=ask.prompt_name, qwen=grade,
            num_tokens=chosen.num_tokens,
        )  # fmt: skip


def make_options(n: int, wave_size: int | None, seed: int = 0) -> RewriteOptions:
    """Both stages with ``n`` samples; ``wave_size`` None is the literal procedure."""
    stages = [
        Stage(stage, n, Sampling(), name, PROMPTS[name])
        for stage, name in ((SELF, "raw"), (GUIDED, "arithmetic-guided"))
    ]
    return RewriteOptions(*stages, early_stop=wave_size is not None, wave_size=wave_size or n, seed=seed)


def run(planner: RewritePlanner, sampler: SimulatedSampler) -> RewritePlanner:
    """The loop of the command."""
    while (wave := planner.next_wave()) is not None:
        planner.tell(sampler.sample(wave.asks))
    return planner


def uniform_problems(
    num: int, seed: int, tokens: Mapping[bool, int]
) -> tuple[list[Problem], Callable[[str, str], Sequence[Response]]]:
    """Problems with uniform solve rates, and what is answered to them; ``tokens``: of right and wrong responses."""
    rates = np.random.default_rng(seed).uniform(size=(num, 2))
    table = {
        (str(i), stage): [
            Response("right", float(rates[i, s]), True, tokens[True]),
            Response("wrong", float(1 - rates[i, s]), False, tokens[False]),
        ]
        for i in range(num)
        for s, stage in enumerate((SELF, GUIDED))
    }
    problems = [Problem(str(i), f"problem {i}", "1", "the solution") for i in range(num)]
    return problems, lambda problem_id, stage: table[problem_id, stage]


def expected(options: RewriteOptions, tokens: Mapping[bool, int]) -> tuple[float, float]:
    """Samples and tokens per problem, both stages together, by the theory above."""
    samples = total = 0.0
    reach = 1.0
    for stage in options.sampled_stages():
        before = 0
        for size in options.wave_sizes(stage):
            right, wrong = 1 / (before + 1) - 1 / (before + 2), 1 / (before + 2)
            samples += reach * size * (right + wrong)
            total += reach * size * (right * tokens[True] + wrong * tokens[False])
            before += size
        reach /= stage.n + 1
    return samples, total


def measured(planner: RewritePlanner) -> tuple[float, float]:
    """Samples and tokens per problem."""
    drawn = [sample for _, samples in planner.history for sample in samples]
    num = len(planner.problems)
    return len(drawn) / num, sum(sample.num_tokens for sample in drawn) / num


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=10_000)
    parser.add_argument("--n", type=int, default=8, help="samples per problem and stage, at most")
    parser.add_argument("--correct-tokens", type=int, default=300)
    parser.add_argument("--wrong-tokens", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    tokens = {True: given.correct_tokens, False: given.wrong_tokens}
    problems, responses = uniform_problems(given.problems, given.seed, tokens)
    begun = time.monotonic()
    sizes = [2**k for k in range(given.n.bit_length()) if 2**k < given.n]
    literal = run(RewritePlanner(problems, make_options(given.n, None)), SimulatedSampler(responses, given.seed))
    base, base_theory = measured(literal)[1], expected(literal.options, tokens)[1]
    print(
        "| waves of | samples a problem | theory | tokens a problem | theory | of literal | theory | stage shares % |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for size in [None, *sizes]:
        options = make_options(given.n, size)
        planner = (
            literal if size is None else run(RewritePlanner(problems, options), SimulatedSampler(responses, given.seed))
        )
        (samples, used), (samples_theory, theory) = measured(planner), expected(options, tokens)
        stages = [outcome.stage for outcome in planner.outcomes()]
        shares = " / ".join(f"{100 * stages.count(s) / len(stages):.2f}" for s in (SELF, GUIDED, FALLBACK))
        cells = [f"{samples:.3f}", f"{samples_theory:.3f}", f"{used:.1f}", f"{theory:.1f}"]
        cells += [f"{100 * used / base:.1f}%", f"{100 * theory / base_theory:.1f}%", shares]
        print(f"| {f'all {given.n} (literal)' if size is None else size} | {' | '.join(cells)} |")
    m = given.n + 1
    print(f"\nStage shares by theory: {100 * (1 - 1 / m):.2f} / {100 / m * (1 - 1 / m):.2f} / {100 / m**2:.2f}")
    print(f"{given.problems:,} problems, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
