"""A mean with its 95% interval: over problems within one result, or over runs with several seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verl_dft.evaluation.student import t975
from verl_dft.training.score_statistics import ratio


@dataclass(frozen=True)
class Estimate:
    """``low`` and ``high`` are None where there is one unit of chance. ``over``: what ``units`` counts."""

    mean: float
    low: float | None
    high: float | None
    units: int
    over: str

    def columns(self) -> dict[str, float | int | str | None]:
        """As columns of a table."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "units": self.units, "over": self.over}

    def text(self, digits: int = 4, scale: float = 1.0) -> str:
        """``mean (low to high)``."""
        ends = [value for value in (self.mean, self.low, self.high) if value is not None]
        values = [f"{round(scale * value, digits) + 0.0:.{digits}f}" for value in ends]  # + 0.0: no -0.00
        return f"{values[0]} ({values[1]} to {values[2]})" if len(values) == 3 else values[0]


def over_problems(numerators: np.ndarray, denominators: np.ndarray, problems: Sequence[str]) -> Estimate:
    """Sum over sum, with Student's t interval of the ratio estimator clustered by problem.

    Args:
        numerators, denominators: [rows].
        problems: [rows] problem of each row.
    """
    found, count = ratio(numerators, denominators, problems), len(set(problems))
    mean, error = found["mean"], found["se"]
    assert mean is not None
    return _estimate(mean, error, count, "problems")


def over_runs(values: Sequence[float]) -> Estimate:
    """The mean of one value for each run, with Student's t interval over runs."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return _estimate(float(np.mean(values)), error, len(values), "runs")


def pooled(estimates: Sequence[Estimate]) -> Estimate:
    """One result's own estimate; of several runs their mean, with runs as the units."""
    return estimates[0] if len(estimates) == 1 else over_runs([estimate.mean for estimate in estimates])


def from_error(mean: float, error: float | None, units: int, over: str = "problems") -> Estimate:
    """From a mean and its standard error, as ``statistics.json`` of ``verl-dft score`` has them."""
    return _estimate(mean, error, units, over)


def _estimate(mean: float, error: float | None, units: int, over: str) -> Estimate:
    if error is None or units < 2:
        return Estimate(mean, None, None, units, over)
    width = t975(units - 1) * error
    return Estimate(mean, mean - width, mean + width, units, over)
