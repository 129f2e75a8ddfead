"""Numbers of ours: with their interval, over problems or over seeds, and differences taken problem by problem."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from verl_dft.evaluation.metrics import clustered_ci95, difference_ci95, macro_average, pass_at_k
from verl_dft.evaluation.student import t975

Shares = Mapping[str, Mapping[str, float]]
"""Benchmark -> problem -> share of its samples that are right."""


@dataclass(frozen=True)
class Number:
    """One number of ours.

    Attributes:
        low, high: the 95% interval, None where it is unknown. ``over``: what it is over.
        metric: ``avg@16`` and its like. ``unit``: ``%``, ``problems``, ``nats per …``.
        noise: half width of a 95% interval for the difference of two such evaluations of one model on the same
            problems: what sampling alone does. None where it is unknown.
        shares: of accuracies.
        part: why it is of a part of its benchmark alone; empty if it is of all.
    """

    value: float
    low: float | None
    high: float | None
    over: str
    metric: str
    unit: str
    steps: tuple[str, ...]
    noise: float | None = None
    shares: Shares = field(default_factory=dict)
    part: str = ""

    def text(self) -> str:
        """``24.7 (21.2 to 28.1)``."""
        digits = {"problems": 0, "%": 1, "nats per response": 2}.get(self.unit, 4)
        values = [f"{value + 0.0:,.{digits}f}" for value in (self.value, self.low, self.high) if value is not None]
        return f"{values[0]} ({values[1]} to {values[2]})" if len(values) == 3 else values[0]


Columns = dict[str, Number]
"""Column -> number, of one model, method and seed."""


def columns_of(arms: Mapping[Any, Mapping[str, Columns]]) -> list[str]:
    """All columns of a kind of measurement, in the order in which they come."""
    return list(dict.fromkeys(column for seeds in arms.values() for found in seeds.values() for column in found))


def number_of(seeds: Mapping[str, Columns], column: str, whole: Collection[str] = ()) -> Number | None:
    """A column's number, over all seeds that have it; ``avg``: the mean over the benchmarks of each.

    Args:
        whole: the benchmarks that an average must be over: seeds without one of them have none.
    """
    found = [columns[column] if column in columns
             else _average(columns) if column in ("avg", "accuracy") and set(whole) <= columns.keys() else None
             for columns in seeds.values()]  # fmt: skip
    numbers = [number for number in found if number is not None]
    if len(numbers) < 2:
        return numbers[0] if numbers else None
    interval = difference_ci95([number.value for number in numbers]) or (None, None)
    steps = tuple(step for number in numbers for step in number.steps)
    over = f"{len(numbers)} seeds"
    return replace(numbers[0], value=fmean(n.value for n in numbers), low=interval[0], high=interval[1], over=over,
                   steps=steps, noise=None, shares={})  # fmt: skip


def paired(method: Mapping[str, Columns], against: Mapping[str, Columns], column: str) -> tuple[Number | None, str]:
    """``method`` minus ``against``, problem by problem, in points; or None and why it cannot be taken."""
    seeds = [seed for seed in method if seed in against]
    differences, numbers = [], []
    for seed in seeds:
        pair = [number_of({seed: side[seed]}, column) for side in (method, against)]
        if pair[0] is None or pair[1] is None:
            continue
        groups = _differences(pair[0].shares, pair[1].shares)
        if groups is None:
            return None, "not of the same problems"
        average = macro_average(groups)
        differences.append((average.mean, average.ci95))
        numbers.append(pair[0])
    if not differences:
        return None, "not measured"
    interval, over = differences[0][1], numbers[0].over
    if len(differences) > 1:
        interval, over = difference_ci95([mean for mean, _ in differences]), f"{len(differences)} seeds"
    low, high = _percent(interval)
    value = 100 * fmean(mean for mean, _ in differences)
    return replace(numbers[0], value=value, low=low, high=high, over=over, shares={}, noise=None), ""


def _percent(interval: tuple[float, float] | None) -> tuple[float | None, float | None]:
    """The ends of an interval of fractions in percent."""
    return (100 * interval[0], 100 * interval[1]) if interval else (None, None)


def _differences(first: Shares, second: Shares) -> list[list[float]] | None:
    if not first or first.keys() != second.keys():
        return None
    if any(first[name].keys() != second[name].keys() for name in first):
        return None
    return [[first[name][problem] - second[name][problem] for problem in first[name]] for name in first]


def _average(columns: Columns) -> Number | None:
    numbers = [number for number in columns.values() if number.shares]
    if not numbers:
        return None
    if len(numbers) == 1:
        return numbers[0]
    average = macro_average([list(values.values()) for number in numbers for values in number.shares.values()])
    low, high = _percent(average.ci95)
    known = [number.noise for number in numbers if number.noise is not None]
    noise = math.sqrt(sum(value**2 for value in known)) / len(numbers) if len(known) == len(numbers) else None
    metrics = list(dict.fromkeys(number.metric for number in numbers))
    return Number(100 * average.mean, low, high, "problems", " and ".join(metrics), "%", numbers[0].steps, noise,
                  {name: values for number in numbers for name, values in number.shares.items()},
                  next((number.part for number in numbers if number.part), ""))  # fmt: skip


def accuracy(result: Mapping[str, Any], step: str, k: int | None = None) -> Number:
    """avg@n of a result in percent, or pass@k (Chen et al. 2021, Eq. 1), with the interval over problems."""
    n = int(result["n"])
    shares = {
        problem["id"]: problem["avg"] if k is None
        else pass_at_k([problem["num_correct"]], n, k)
        for problem in result["per_problem"]
    }  # fmt: skip
    low, high = _percent(clustered_ci95(list(shares.values())))
    spread = result.get("std_over_runs") if k is None else None
    # two averages of n runs each, on the same problems; their spread is known from our n runs alone
    noise = 100 * t975(n - 1) * math.sqrt(2 / n) * spread if spread is not None and n > 1 else None
    limit = result.get("limit")
    return Number(100 * fmean(shares.values()), low, high, "problems", f"avg@{n}" if k is None else f"pass@{k}", "%",
                  (step,), noise, {result["benchmark"]: shares}, f"limit={limit}" if limit else "")  # fmt: skip
