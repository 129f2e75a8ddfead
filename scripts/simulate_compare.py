"""How often `verl-dft compare` finds a difference that is there, and one that is not.

    python scripts/simulate_compare.py [--pairs 2000] [--seed 0]

Two models are simulated on P problems with n samples each. A problem's chance of a right sample is the logistic of a
normal draw; the second model differs from the first by a normal draw per problem (they are good at different problems)
and by a shift that makes its expected score exactly the planted number of points higher. Problems are drawn anew for
every pair, as the intervals assume. Reported are shares of pairs: p < 0.05 by either test, and intervals that hold the
true difference (95% are meant to).
"""

import argparse
import time
from dataclasses import dataclass

import numpy as np

from verl_dft.evaluation.compare import paired_t_p, sign_flip_p
from verl_dft.evaluation.metrics import difference_ci95

_SPREAD, _OWN_SPREAD = 2.0, 0.7  # of difficulty, and of how the models differ by problem (in logits)


@dataclass(frozen=True)
class Rates:
    """Shares of simulated pairs."""

    found_sign_flip: float
    found_t: float
    covered: float
    mean_difference: float


def logit_shift(points: float, num_draws: int = 400_000) -> float:
    """The shift in logits that raises the expected score by ``points`` / 100; the same draws every time."""
    generator = np.random.default_rng(12345)
    base = generator.normal(0, _SPREAD, num_draws)
    other = base + generator.normal(0, _OWN_SPREAD, num_draws)
    low, high = -5.0, 5.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if np.mean(_chance(other + middle) - _chance(base)) < points / 100 else (low, middle)
    return (low + high) / 2


def differences(num_problems: int, n: int, shift: float, generator: np.random.Generator) -> list[float]:
    """One simulated pair of evaluations: the second model's average minus the first's, problem by problem."""
    base = generator.normal(0, _SPREAD, num_problems)
    other = base + generator.normal(0, _OWN_SPREAD, num_problems) + shift
    first, second = (generator.binomial(n, _chance(logits)) / n for logits in (base, other))
    return list(second - first)


def rates(points: float, num_problems: int, n: int, num_pairs: int, seed: int, num_draws: int = 1000) -> Rates:
    """Simulate ``num_pairs`` comparisons with a true difference of ``points`` percentage points."""
    generator, shift = np.random.default_rng(seed), logit_shift(points)
    flip, t, covered, means = 0, 0, 0, []
    for pair in range(num_pairs):
        found = differences(num_problems, n, shift, generator)
        interval = difference_ci95(found)
        flip += sign_flip_p(found, seed=pair, num_draws=num_draws) < 0.05
        p = paired_t_p(found)
        t += p is not None and p < 0.05
        covered += interval is not None and interval[0] <= points / 100 <= interval[1]
        means.append(np.mean(found))
    return Rates(flip / num_pairs, t / num_pairs, covered / num_pairs, float(np.mean(means)))


def _chance(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def main() -> None:
    """Print a Markdown table of rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2000, help="simulated comparisons per row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begun = time.monotonic()
    print("| problems | n | true difference | found (sign flip) | found (t) | interval holds it | mean found |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for num_problems, n in ((30, 16), (100, 16), (272, 16), (500, 16), (500, 1), (1319, 16)):
        for points in (0.0, 5.0):
            r = rates(points, num_problems, n, options.pairs, options.seed)
            cells = [num_problems, n, f"{points:.0f} points"]
            cells += [f"{100 * share:.1f}%" for share in (r.found_sign_flip, r.found_t, r.covered)]
            print(f"| {' | '.join(map(str, cells))} | {100 * r.mean_difference:+.2f} |", flush=True)
    print(f"\n{options.pairs} pairs a row, seed {options.seed}, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
