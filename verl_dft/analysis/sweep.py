"""Accuracy against a swept key: learning rate and batch size (DFT, Fig. 3), tau with rectified tokens (GFT, Fig. 6).

Accuracy is from ``verl-dft evaluate`` results; a metric of the trainings behind them can be drawn on a second axis.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from verl_dft.analysis import style
from verl_dft.analysis.draw import points_table
from verl_dft.analysis.dynamics import find_metric, read_curves, unit
from verl_dft.analysis.estimates import Estimate, over_runs, pooled
from verl_dft.analysis.evaluated import Results, accuracy, read_evaluated
from verl_dft.analysis.output import Analysis, Figure
from verl_dft.analysis.runs import Point, parse_runs
from verl_dft.errors import InputError
from verl_dft.training.metrics import METRICS_FILE

_METRIC = re.compile(r"avg|(pass|maj)@\d+")


def check(config: Mapping[str, Any]) -> None:
    """Raise InputError for a value that cannot be."""
    if config["reduce"] not in ("mean", "last"):
        raise InputError(f"reduce={config['reduce']} is not one of mean, last")
    if not _METRIC.fullmatch(str(config["metric"])):
        raise InputError(f"metric={config['metric']} is not one of avg, pass@K, maj@K")


def run(config: Mapping[str, Any]) -> Analysis:
    """Keys: ``configs/analysis/sweep.yaml``. Raises InputError for results that are not of one sweep."""
    check(config)
    metric, points = str(config["metric"]), parse_runs(config["runs"])
    found = read_evaluated(points, config)
    points, results = placed(points, found.results, config["key"]), found.results
    records = [_record(point, [accuracy(results[path], metric) for path in point.paths], metric) for point in points]
    tables, inputs = {"sweep": records}, found.inputs
    level = accuracy(found.baseline, metric) if found.baseline else None
    if level:
        tables["sweep_baseline"] = [{"path": str(found.base), "metric": metric, **level.columns()}]
    x = (config["key"] or "value", config["log_x"])
    title = f"{metric} on {_benchmarks(results)} (%)"
    shown = {f"{metric} on {_benchmarks(results)} (fraction)": points_table(records, x[0])}
    second: list[dict[str, Any]] = []
    if config["training_metric"]:
        folders = {path: training_of(path, results[path]) for path in results}
        second = trained(points, folders, config["training_metric"], config["reduce"])
        tables["sweep_training"] = second
        inputs = inputs | {f"training_{i}": folder / METRICS_FILE for i, folder in enumerate(folders.values())}
        how = "mean over steps" if config["reduce"] == "mean" else "last step"
        shown[f"{config['training_metric']}, {how}"] = points_table(second, x[0])
    figure = Figure(lambda axes: draw(axes, records, second, level, x, title), _caption(records, second, config, level))
    return Analysis(tables, {"sweep": figure}, shown, inputs)


def placed(points: Sequence[Point], results: Mapping[Path, Results], key: str | None) -> list[Point]:
    """Points with their x: as given, or the key's value in the configuration of the training behind each result.

    Results of one label and value are taken for seeds.
    """
    if all(point.at is not None for point in points):
        return list(points)
    if any(point.at is not None for point in points) or not key:
        raise InputError("runs has results without a value; write {LABEL: {VALUE: PATH}}, or give the swept key=…")
    found: dict[tuple[str, float], list[Path]] = {}
    for point in points:
        for path in point.paths:
            found.setdefault((point.label, swept_value(training_of(path, results[path]), key)), []).append(path)
    order = list(dict.fromkeys(point.label for point in points))
    return [
        Point(label, at, tuple(found[label, at]))
        for label, at in sorted(found, key=lambda k: (order.index(k[0]), k[1]))
    ]


def training_of(path: Path, results: Results) -> Path:
    """The ``output_dir`` of the training whose model was evaluated: the nearest folder above it with both its files."""
    model = Path(next(iter(results.values()))["model"]).expanduser()
    for folder in list(model.parents)[:4]:
        if (folder / "config.yaml").is_file() and (folder / METRICS_FILE).is_file():
            return folder
    raise InputError(
        f"{path}: its model {model} lies in no training's output_dir (config.yaml, {METRICS_FILE}); leave out key and "
        "training_metric, and write runs={LABEL: {VALUE: PATH}}"
    )


def swept_value(training: Path, key: str) -> float:
    """The value of a key in a training's ``config.yaml``. Raises InputError where it is none, or no number."""
    from omegaconf import OmegaConf

    file = training / "config.yaml"
    value = OmegaConf.select(OmegaConf.load(file), key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{file}: {key} is {value!r}, not a number; give the swept key, e.g. key=optim.lr")
    return float(value)


def trained(points: Sequence[Point], folders: Mapping[Path, Path], name: str, how: str) -> list[dict[str, Any]]:
    """A training's metric at each point: the mean over its steps, or the last value; of several runs their mean."""
    records = []
    for point in points:
        values = []
        for path in point.paths:
            curves = read_curves(folders[path] / METRICS_FILE)
            key = find_metric(name, curves)
            if key is None:
                raise InputError(
                    f"{folders[path] / METRICS_FILE}: no metric {name!r}; there are: {', '.join(curves)[:300]}"
                )
            values.append(curves[key][1][-1] if how == "last" else fmean(curves[key][1]))
        records.append(_record(point, [over_runs(values)], name))
    return records


def draw(
    axes: Any, records: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], level: Estimate | None,
    x: tuple[str, bool | None], title: str,
) -> None:  # fmt: skip
    """A line for each label in percent, the baseline's level, and the training's metric on a second axis."""
    labels = list(dict.fromkeys(record["label"] for record in records))
    for index, label in enumerate(labels):
        _line(axes, [record for record in records if record["label"] == label], 100.0, style.line(index), label)
    if level:
        axes.axhline(100 * level.mean, color="#555555", linestyle=":", linewidth=1.2, label="baseline")
    axes.set_xlabel(x[0])
    axes.set_ylabel(title)
    handles = axes.get_legend_handles_labels()
    if second:
        other, (name, scale) = axes.twinx(), unit(str(second[0]["metric"]))
        for index, label in enumerate(labels):
            look = style.line(index if len(labels) > 1 else 1) | {
                "linestyle": "--",
                "linewidth": 1.1,
                "markerfacecolor": "white",
            }
            mine = [record for record in second if record["label"] == label]
            text = f"{label}: {second[0]['metric']} (right)"
            _line(other, mine, scale, look, text)
        other.grid(False)
        other.spines["right"].set_visible(True)
        other.set_ylabel(name)
        handles = tuple(a + b for a, b in zip(handles, other.get_legend_handles_labels(), strict=True))
    _scale_x(axes, sorted({record["at"] for record in records}), x[1])
    axes.legend(*handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def _line(axes: Any, records: Sequence[Mapping[str, Any]], scale: float, look: Mapping[str, Any], label: str) -> None:
    means = [scale * record["mean"] for record in records]
    ends = ([None if r[end] is None else scale * r[end] for r in records] for end in ("low", "high"))
    axes.errorbar([record["at"] for record in records], means, yerr=style.errors(means, *ends), capsize=2.5,
                  elinewidth=1, label=label, **look)  # fmt: skip


def _scale_x(axes: Any, values: Sequence[float], log: bool | None) -> None:
    """The swept values as ticks; log where asked for, or where they are more even on that scale."""
    from matplotlib.ticker import NullLocator

    if log or (log is None and is_geometric(values)):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values, [f"{value:g}" for value in values])


def is_geometric(values: Sequence[float]) -> bool:
    """Whether sorted values are spaced more evenly in their logarithms; of two, whether they are 8 times apart."""
    if values[0] <= 0 or values[-1] < 8 * values[0]:
        return False
    gaps = [b - a for a, b in pairwise(values)]
    ratios = [math.log(b / a) for a, b in pairwise(values)]
    return len(gaps) == 1 or max(ratios) / min(ratios) < max(gaps) / min(gaps)


def _record(point: Point, estimates: Sequence[Estimate], metric: str) -> dict[str, Any]:
    about = {"label": point.label, "at": point.at, "metric": metric, "paths": [str(path) for path in point.paths]}
    return about | pooled(estimates).columns()


def _benchmarks(results: Mapping[Path, Results]) -> str:
    names = list(next(iter(results.values())))
    return names[0] if len(names) == 1 else f"{len(names)} benchmarks, mean"


def _caption(
    records: Sequence[Mapping[str, Any]], second: Sequence[Any], config: Mapping[str, Any], level: Estimate | None
) -> str:
    over = " or ".join(sorted({record["over"] for record in records if record["low"] is not None}))
    parts = [f"Bars: 95% interval over {over}." if over else "No intervals."]
    if second:
        how = "mean over all logged steps" if config["reduce"] == "mean" else "value at the last logged step"
        parts.append(f"Dashed, right: {config['training_metric']} of the training, {how}.")
    if level:
        parts.append(f"Baseline: {100 * level.mean:.1f}%.")
    return " ".join(parts)
