"""avg@n, pass@k and their intervals, from how many of each problem's samples are right.

Problems are the unit of chance: samples of one problem are alike, so an interval over all samples as if independent
would be too narrow. Everything here takes one value per problem (a cluster) and uses the spread between problems.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean, stdev

from verl_dft.errors import InputError

# Exact quantiles t(0.975; v) where the expansion in 1/v is not yet good.
_T975_SMALL = (12.7062, 4.3027, 3.1824, 2.7764)


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

    Pairing by problem removes the spread of difficulty, which two separate intervals would count twice.

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
    mean = fmean(differences)
    if len(differences) < 2:
        return mean, None
    half_width = _half_width(differences)
    return mean, (mean - half_width, mean + half_width)


def _half_width(values: Sequence[float]) -> float:
    return _t975(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def _t975(degrees: int) -> float:
    """Student's 97.5% quantile to 4 digits (Abramowitz and Stegun 26.7.5 from 5 degrees of freedom on)."""
    if degrees <= len(_T975_SMALL):
        return _T975_SMALL[degrees - 1]
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / degrees + second / degrees**2 + third / degrees**3 + fourth / degrees**4


def _check(num_correct: Sequence[int], n: int) -> None:
    if not num_correct:
        raise InputError("no problem was evaluated, so there is nothing to average")
    if any(not 0 <= c <= n for c in num_correct):
        raise InputError(f"a problem has fewer than 0 or more than n={n} correct samples")
