"""Bars of accuracy for each benchmark: the change against a baseline, or the value itself (GFT, Figs. 1 and 4).

A change is paired problem by problem, as :mod:`verl_dft.evaluation.compare` has it, so that the spread of difficulty
between problems cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from verl_dft.analysis import style
from verl_dft.analysis.estimates import Estimate, pooled
from verl_dft.analysis.evaluated import Results, mean_of_means, read_evaluated
from verl_dft.analysis.output import Analysis, Figure
from verl_dft.analysis.runs import Point, parse_runs
from verl_dft.errors import InputError
from verl_dft.evaluation.compare import paired
from verl_dft.report.tables import Table

_MEAN = "mean"


def run(config: Mapping[str, Any]) -> Analysis:
    """Keys: ``configs/analysis/change.yaml``. Raises InputError for results of different problems."""
    points = parse_runs(config["runs"])
    if point := next((point for point in points if point.at is not None), None):
        raise InputError(f"runs.{point.label} has points; analyze change takes {{LABEL: PATH}} or {{LABEL: [PATH, …]}}")
    found = read_evaluated(points, config)
    baseline, records = found.baseline, changes(points, found.results, found.baseline)
    title = "accuracy (%)" if baseline is None else "change of accuracy (percentage points)"
    over = " or ".join(sorted({record["over"] for record in records if record["low"] is not None}))
    how = "" if baseline is None else ", paired with the baseline's"
    caption = f"Bars: 95% interval over {over}{how}." if over else "No intervals."
    figure = Figure(lambda axes: draw(axes, records, title), caption)
    return Analysis(
        {"change": records}, {"change": figure}, {title: _table(records, baseline is not None)}, found.inputs
    )


def changes(points: Sequence[Point], results: Mapping[Path, Results], baseline: Results | None) -> list[dict[str, Any]]:
    """A record for each label and benchmark, and their mean where there are several: fractions.

    Args:
        results: by path; of the same problems.
        baseline: None for the accuracies themselves.
    """
    names = list(next(iter(results.values())))
    values = {
        path: {
            name: paired(name, baseline[name], found[name])
            if baseline
            else [problem["avg"] for problem in found[name]["per_problem"]]
            for name in names
        }
        for path, found in results.items()
    }
    records = []
    for point in points:
        for name in [*names, *([_MEAN] if len(names) > 1 else [])]:
            kept = names if name == _MEAN else [name]
            estimates = [mean_of_means([values[path][part] for part in kept]) for path in point.paths]
            about = {"label": point.label, "benchmark": name, "paths": [str(path) for path in point.paths]}
            level = fmean(fmean(p["avg"] for p in results[path][part]["per_problem"]) for path in point.paths
                          for part in kept)  # fmt: skip
            records.append(about | {"accuracy": level} | pooled(estimates).columns())
    return records


def draw(axes: Any, records: Sequence[Mapping[str, Any]], title: str) -> None:
    """A group of bars for each benchmark, a bar for each label, in percent."""
    names = list(dict.fromkeys(record["benchmark"] for record in records))
    labels = list(dict.fromkeys(record["label"] for record in records))
    width = 0.8 / len(labels)
    plain = {"hatch": ""} if len(names) * len(labels) > 24 else {}  # a hatch needs room
    for index, label in enumerate(labels):
        mine = [record for record in records if record["label"] == label]
        xs = [names.index(record["benchmark"]) + width * (index - (len(labels) - 1) / 2) for record in mine]
        means = [100 * record["mean"] for record in mine]
        ends = ([None if r[end] is None else 100 * r[end] for r in mine] for end in ("low", "high"))
        axes.bar(xs, means, width=0.92 * width, label=label, **(style.bar(index) | plain))
        axes.errorbar(xs, means, yerr=style.errors(means, *ends), color="black", linestyle="none", capsize=2,
                      elinewidth=0.8)  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    turned = {"rotation": 30, "ha": "right"} if len(names) > 4 else {}
    axes.set_xticks(range(len(names)), names, **turned)
    axes.grid(False, axis="x")
    axes.set_ylabel(title)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(labels)))


def _table(records: Sequence[Mapping[str, Any]], is_change: bool) -> Table:
    rows = []
    for record in records:
        found = Estimate(record["mean"], record["low"], record["high"], record["units"], record["over"])
        level = [f"{100 * record['accuracy']:.1f}"] if is_change else []
        over = f"{record['units']} {record['over']}" if record["low"] is not None else "none"
        rows.append([record["benchmark"], record["label"], *level, found.text(1, 100), over])
    value = ["accuracy (%)", "change (95% interval)"] if is_change else ["mean (95% interval)"]
    return Table(["benchmark", "run", *value, "interval over"], rows)
