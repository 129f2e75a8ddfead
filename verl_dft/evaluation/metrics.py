"""avg@n, pass@k and their intervals, from how many of each problem's samples are right.

Problems are the unit of chance: samples of one problem are alike, so an interval over all samples as if independent
would be too narrow. Everything here takes one value per problem (a cluster) and uses the spread between problems.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance

from verl_dft.errors import InputError
from verl_dft.evaluation.student import t975


def avg_at_n(num_correct: Sequence[int], n: int) -> float:
    """Share of correct samples when every problem has ``n`` (a fraction, not a percentage)."""
    _check(num_correct, n)
    return fmean(num_correct) / n


def pass_at_k(num_correct: Sequence[int], n: int, k: int) -> float:
    """Probability that one of ``k`` samples is correct: mean over problems of 1 - C(n-c, k) / C(n, k).

    Unbiased (Chen et al. 2021, arXiv:2107.03374, Eq. 1), where (c/n)-based plug-ins are not.
    """
    _check(num_correct, n)
    if not 1 <= k <= n:
        raise InputError(f"pass@k needs 1 <= k <= n, got k={k} and n={n}")
    return fmean(1 - math.comb(n - c, k) / math.comb(n, k) for c in num_correct)


def pass_at_every_k(num_correct: Sequence[int], n: int) -> dict[int, float]:
    """:func:`pass_at_k` for k = 1 to n."""
    _check(num_correct, n)
    how_many = [(c, num_correct.count(c)) for c in set(num_correct)]
    return {
        k: math.fsum(times * (1 - math.comb(n - c, k) / math.comb(n, k)) for c, times in how_many) / len(num_correct)
        for k in range(1, n + 1)
    }


def std_over_problems(num_correct: Sequence[int], n: int) -> float | None:
    """Standard deviation, between problems, of a problem's average (divisor P - 1): how uneven the problems are.

    Divided by sqrt(P) it is the standard error behind :func:`clustered_ci95`. None for one problem.
    """
    _check(num_correct, n)
    return stdev([c / n for c in num_correct]) if len(num_correct) > 1 else None


def std_over_runs(correct: Sequence[Sequence[bool]]) -> float | None:
    """Standard deviation of the n run averages (divisor n - 1): the ± of papers that repeat an evaluation n times.

    Run i is the i-th sample of every problem. It shows the luck of sampling on these problems alone and is much
    smaller than the uncertainty of the score, which is mostly the choice of problems. None for n = 1.

    Args:
        correct: problem by problem, whether each of its n samples is correct.
    """
    runs = [fmean(run) for run in zip(*correct, strict=True)]
    return stdev(runs) if len(runs) > 1 else None


def std_within_problems(num_correct: Sequence[int], n: int) -> float | None:
    """Standard deviation of one sample's verdict (0 or 1) around its problem's average, pooled over the problems.

    The square root of the mean of c (n - c) / (n (n - 1)). None for n = 1.
    """
    _check(num_correct, n)
    return math.sqrt(fmean(c * (n - c) for c in num_correct) / (n * (n - 1))) if n > 1 else None


def clustered_ci95(values: Sequence[float]) -> tuple[float, float] | None:
    """95% interval for the mean of one value in [0, 1] per problem: mean +- t * s / sqrt(P), clipped to [0, 1].

    None for a single problem, whose spread is unknown. Where all problems are at 0 (or all at 1) the spread is 0 and
    says nothing; the end that is open is then the exact binomial one, 1 - 0.025^(1/P) from the mean.
    """
    if len(values) < 2:
        return None
    mean, half_width = fmean(values), _half_width(values)
    low, high = max(0.0, mean - half_width), min(1.0, mean + half_width)
    if mean in (0.0, 1.0):
        open_end = 1 - 0.025 ** (1 / len(values))
        return (0.0, open_end) if mean == 0 else (1 - open_end, 1.0)
    return low, high


def paired_difference(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[float, tuple[float, float] | None]:
    """Mean of ``b - a`` over problems and its 95% interval, from problem id -> share correct of two results.

    Pairing by problem removes the spread of difficulty, which two separate intervals would count twice. The interval
    is None where the differences have no spread (one problem, or the same difference everywhere): it is then unknown,
    not zero.

    Raises:
        InputError: the results are not of the same problems.
    """
    if a.keys() != b.keys():
        missing = sorted(a.keys() ^ b.keys())
        raise InputError(
            f"only results of the same problems can be compared; {len(missing)} are in one alone ({missing[0]!r}, …)"
        )
    if not a:
        raise InputError("two results without problems cannot be compared")
    differences = [b[key] - a[key] for key in a]
    return fmean(differences), difference_ci95(differences)


def difference_ci95(differences: Sequence[float]) -> tuple[float, float] | None:
    """95% interval of the mean of one difference per problem, mean +- t * s / sqrt(P); None without a spread."""
    if len(differences) < 2 or stdev(differences) < 1e-12:
        return None
    mean, half_width = fmean(differences), _half_width(differences)
    return mean - half_width, mean + half_width


@dataclass(frozen=True)
class MacroAverage:
    """A mean of means; ``error`` (its standard error) is None where a group has one value, or none has a spread."""

    mean: float
    error: float | None
    degrees: float
    """Of freedom, Welch and Satterthwaite's."""

    @property
    def ci95(self) -> tuple[float, float] | None:
        """Student's t interval."""
        if self.error is None:
            return None
        width = t975(self.degrees) * self.error
        return self.mean - width, self.mean + width


def macro_average(groups: Sequence[Sequence[float]]) -> MacroAverage:
    """The mean of the groups' means, each counting the same whatever its size: the papers' average of benchmarks.

    Args:
        groups: for each benchmark, a value per problem.
    """
    mean = fmean(map(fmean, groups))
    if any(len(values) < 2 for values in groups):
        return MacroAverage(mean, None, 0.0)
    parts = [variance(values) / len(values) for values in groups]
    if sum(parts) <= 1e-24:
        return MacroAverage(mean, None, 0.0)
    degrees = sum(parts) ** 2 / sum(part**2 / (len(v) - 1) for part, v in zip(parts, groups, strict=True))
    return MacroAverage(mean, math.sqrt(sum(parts)) / len(parts), degrees)


def _half_width(values: Sequence[float]) -> float:
    return t975(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def _check(num_correct: Sequence[int], n: int) -> None:
    if not num_correct:
        raise InputError("no problem was evaluated, so there is nothing to average")
    if any(not 0 <= c <= n for c in num_correct):
        raise InputError(f"a problem has fewer than 0 or more than n={n} correct samples")
