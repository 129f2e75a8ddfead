"""Drawing shared by the analyses: estimates by step or by label, as lines with error bars or as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from verl_dft.analysis import style
from verl_dft.analysis.estimates import Estimate
from verl_dft.report.tables import Table

Records = Sequence[Mapping[str, Any]]


def draw_points(axes: Any, records: Records, x_label: str, y_label: str, zero: bool = False) -> None:
    """A line for each label with points ``at`` steps; a bar for each label without.

    Args:
        records: with ``label, at, mean, low, high``.
        zero: begin each line at (0, 0): no drift before the first step.
    """
    labels = list(dict.fromkeys(record["label"] for record in records))
    if all(record["at"] is None for record in records):
        return _bars(axes, records, y_label)
    for index, label in enumerate(labels):
        mine = [record for record in records if record["label"] == label]
        look = style.line(index)
        if mine[0]["at"] is None:  # a model without a step, e.g. the end of another trainer: a level
            axes.axhline(mine[0]["mean"], label=label, color=look["color"], linestyle=look["linestyle"])
            continue
        start = [0.0] if zero and mine[0]["at"] > 0 else []
        means = [record["mean"] for record in mine]
        yerr = style.errors(means, [record["low"] for record in mine], [record["high"] for record in mine])
        xs = start + [record["at"] for record in mine]
        axes.errorbar(xs, start + means, yerr=[start + part for part in yerr], label=label, capsize=2.5,
                      elinewidth=1, **look)  # fmt: skip
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend()
    return None


def _bars(axes: Any, records: Records, y_label: str) -> None:
    means = [record["mean"] for record in records]
    yerr = style.errors(means, [record["low"] for record in records], [record["high"] for record in records])
    for index in range(len(records)):
        axes.bar(index, means[index], width=0.6, **style.bar(index))
        one = [[part[index]] for part in yerr]
        axes.errorbar(index, means[index], yerr=one, color="black", capsize=3, elinewidth=1)
        axes.annotate(f"{means[index]:.3g}", (index, means[index] + yerr[1][index]), (0, 3), ha="center",
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_xticks(range(len(records)), [record["label"] for record in records])
    axes.grid(False, axis="x")
    axes.margins(y=0.12)
    axes.set_ylabel(y_label)


def points_table(records: Records, x_label: str) -> Table:
    """``label``, ``at`` where there is one, and the mean with its interval."""
    by_step = any(record["at"] is not None for record in records)
    header = ["run", *([x_label] if by_step else []), "mean (95% interval)", "interval over"]
    rows = []
    for record in records:
        found = Estimate(record["mean"], record["low"], record["high"], record["units"], record["over"])
        at = [] if not by_step else ["" if record["at"] is None else f"{record['at']:g}"]
        over = f"{record['units']} {record['over']}" if record["low"] is not None else "none"
        rows.append([record["label"], *at, found.text(), over])
    return Table(header, rows)
