"""Student's t distribution, so that an interval or a p-value needs no SciPy."""

import functools
import math


def two_sided_p(t: float, degrees: float) -> float:
    """Probability that |T| is at least ``|t|`` with ``degrees`` > 0 of freedom (not necessarily a whole number).

    It is the regularised incomplete beta function I_x(v/2, 1/2) at x = v / (v + t^2) (Abramowitz and Stegun 26.7.1).
    """
    assert degrees > 0
    return 0.0 if math.isinf(t) else _beta(degrees / 2, 0.5, degrees / (degrees + t * t), t * t / (degrees + t * t))


@functools.lru_cache(maxsize=4096)
def t975(degrees: float) -> float:
    """The 97.5% quantile: half the width of a 95% interval in standard errors. By bisection."""
    low, high = 1.9, 13.0
    while two_sided_p(high, degrees) > 0.05:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, degrees) > 0.05 else (low, middle)
    return (low + high) / 2


def _beta(a: float, b: float, x: float, one_minus_x: float) -> float:
    """I_x(a, b); ``one_minus_x`` is given apart because 1 - x would lose its digits where x is near 1."""
    if x <= 0 or one_minus_x <= 0:
        return 0.0 if x <= 0 else 1.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(one_minus_x)
    # The fraction converges fast below the mean of the distribution; above it the symmetry I_x(a,b) = 1 - I_1-x(b,a).
    if x < (a + 1) / (a + b + 2):
        return math.exp(log_front) * _fraction(a, b, x) / a
    return 1 - math.exp(log_front) * _fraction(b, a, one_minus_x) / b


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction 1 / (1 + d1 / (1 + d2 / ...)) of DLMF 8.17.22, from its front by Lentz's method."""
    tiny = 1e-300
    value, c, d = 1.0, 1.0, 0.0
    for step in range(1, 5000):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / ((1 + term * d) or tiny)
        c = (1 + term / c) or tiny
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return 1 / value
