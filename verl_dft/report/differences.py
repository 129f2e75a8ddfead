"""Differences between methods, as a paper states them and as a run has them. The rules: docs/report.md."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from verl_dft.report.beside import Limits, allowance, kind_of, not_comparable, seeds_of, whole
from verl_dft.report.expected import Block, Difference
from verl_dft.report.measured import Measured
from verl_dft.report.numbers import Number, number_of, paired
from verl_dft.report.runs import Run

_FEW = 5
"""Methods up to which differences that the text does not state are taken of a block's cells."""


@dataclass(frozen=True)
class Pair:
    """A difference between two methods. ``stated``: the paper's values of it; ``derived``: from its cells, by us."""

    block: str
    model: str
    method: str
    against: str
    column: str
    stated: tuple[float, ...]
    derived: bool
    ours: Number | None
    allowed: float | None
    status: str
    why: str = ""


def pairs(run: Run, block: Block, measured: Measured, limits: Limits) -> list[Pair]:
    """Differences between methods: those that the text states, and of small blocks those of their cells.

    At the paper's scale each has the status of a cell. At another scale those of one pair of methods are one line, and
    the status is whether ours, of another model and benchmark, points the same way.
    """
    stated = {(one.method, one.against) for one in block.differences}
    every = [*block.differences, *(one for one in _derived(block) if (one.method, one.against) not in stated)]
    if run.scale == "paper":
        return [_pair_at_paper(run, block, measured, one, (one.method, one.against) not in stated, limits)
                for one in every]  # fmt: skip
    groups: dict[tuple[str, str, str], list[Difference]] = {}
    for one in every:
        if not one.contradicts:
            where = "" if block.unit == "%" else one.column  # stages are apart, benchmarks are one world here
            groups.setdefault((one.method, one.against, where), []).append(one)
    return [_direction(block, measured, group, key[:2] not in stated) for key, group in groups.items()]


def _derived(block: Block) -> list[Difference]:
    """Every later method minus every earlier one, of each model and column; of the mean alone where there is one."""
    found: list[Difference] = []
    if max(len(rows) for rows in block.values.values()) > _FEW or block.unit not in ("%", "nats"):
        return found
    columns = ["avg"] if "avg" in block.columns else [column for column in block.columns if column != "total"]
    for model, rows in block.values.items():
        for late, method in enumerate(rows):
            for against in list(rows)[:late]:
                for column in columns:
                    ends = block.value(model, method, column), block.value(model, against, column)
                    if ends[0] is not None and ends[1] is not None:
                        found.append(Difference(model, method, against, column, round(ends[0] - ends[1], 2)))
    return found


def _pair_at_paper(
    run: Run, block: Block, measured: Measured, stated: Difference, derived: bool, limits: Limits
) -> Pair:
    seeds = [
        seeds_of(measured, kind_of(block), stated.model, method, block) for method in (stated.method, stated.against)
    ]
    why, ours, allowed, status = "", None, None, "not run"
    if block.unit == "nats":
        ours, why = _own_logps(block, measured, stated.method, stated.against, stated.column, stated.model)
        if ours is not None:  # of other texts than the paper's
            status, why = "not comparable", not_comparable(run, block, stated.model, ours)
    elif all(seeds) and not all(whole(block, side, stated.column) for side in seeds):
        why = "not of all benchmarks"
    elif all(seeds):
        ours, why = paired(seeds[0], seeds[1], stated.column)
        ends = [number_of(side, stated.column) for side in seeds]
        if ours is not None and ends[0] is not None and ends[1] is not None:
            why = not_comparable(run, block, stated.model, ends[0]) or not_comparable(run, block, stated.model, ends[1])
            allowed = _allowed_between(block, stated, ends[0], ends[1], limits)
            near = abs(ours.value - stated.value) <= allowed + 1e-9 and not _opposite(ours, stated.value)
            status = "not comparable" if why else "reproduced" if near else "off"
    why = "; ".join(part for part in (why, f"contradicts its cells: {stated.contradicts}" if stated.contradicts else "")
                    if part)  # fmt: skip
    return Pair(block.name, stated.model, stated.method, stated.against, stated.column, (stated.value,), derived, ours,
                allowed, status, why)  # fmt: skip


def _allowed_between(block: Block, stated: Difference, first: Number, second: Number, limits: Limits) -> float:
    """The larger of what is allowed of the two cells, or the noise of both."""
    values = [block.value(stated.model, method, stated.column) or 0.0 for method in (stated.method, stated.against)]
    cells_allow = [
        allowance(value, one, block.unit, limits) for value, one in zip(values, (first, second), strict=True)
    ]
    return max(*cells_allow, math.hypot(first.noise or 0.0, second.noise or 0.0))


def _opposite(ours: Number, paper: float) -> bool:
    """Whether our interval lies on the other side of 0 than the paper's difference."""
    if ours.low is None or ours.high is None:
        return False
    return ours.high < 0 < paper or paper < 0 < ours.low


def _direction(block: Block, measured: Measured, group: Sequence[Difference], derived: bool) -> Pair:
    """One pair of methods at a scale that is not the paper's."""
    chosen = [one for one in group if one.column == "avg"] or list(group)
    method, against = chosen[0].method, chosen[0].against
    values, columns = tuple(one.value for one in chosen), list(dict.fromkeys(one.column for one in chosen))
    ours, why = _own_difference(block, measured, method, against, chosen[0].column)
    signs = {math.copysign(1, value) for value in values if value}
    status = "not run"
    if ours is not None:
        if len(signs) != 1:
            status, why = "undecided", "the paper has both signs"
        elif ours.low is None or ours.high is None or ours.low <= 0 <= ours.high:
            status = "undecided"
        else:
            status = "same direction" if math.copysign(1, ours.value) in signs else "other direction"
    return Pair(block.name, "", method, against, ", ".join(columns), values, derived, ours, None, status, why)


def _own_difference(
    block: Block, measured: Measured, method: str, against: str, column: str
) -> tuple[Number | None, str]:
    """Ours at a scale that is not the paper's: over all benchmarks of a run, of whatever model it is."""
    if block.unit == "nats":
        return _own_logps(block, measured, method, against, column)
    if block.unit != "%":
        return None, "not a difference of accuracies"
    found_sides = [[seeds for (_, name), seeds in measured[kind_of(block)].items() if name == side]
                   for side in (method, against)]  # fmt: skip
    if not all(found_sides):
        return None, f"this run has no {method if not found_sides[0] else against}"
    return paired(found_sides[0][0], found_sides[1][0], "avg")


def _own_logps(
    block: Block, measured: Measured, method: str, against: str, column: str, model: str | None = None
) -> tuple[Number | None, str]:
    """Of log-probs the paired difference that the run has itself; ``model``: of that one alone."""
    if (method, against) != ("rewriting", "sft"):
        return None, "not a difference of log-probs that a run has"
    name = f"{method} minus {against}"
    every = [seeds for (_, called), seeds in measured["logp"].items() if called == name]
    found = every if model is None else [seeds_of(measured, "logp", model, name, block)]
    number = number_of(found[0], column) if found else None
    return number, "" if number else "not measured"
