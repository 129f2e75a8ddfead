"""Loss, gradient norm, rectified tokens, accuracy … by step, from ``metrics.jsonl``.

DFT's Fig. 1, GFT's Fig. 3 and data rewriting's Fig. 4 are such figures.
Several runs of one label (seeds) are drawn as their mean with a band over the steps that all of them have.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from verl_dft.analysis import style
from verl_dft.analysis.estimates import Estimate, over_runs
from verl_dft.analysis.output import Analysis, Figure
from verl_dft.analysis.runs import Point, parse_runs
from verl_dft.errors import InputError
from verl_dft.report.tables import Table
from verl_dft.training.metrics import METRICS_FILE, read_metrics

Curve = tuple[list[float], list[float]]
"""Steps and values."""

DEFAULT_METRICS = ("loss", "nll", "grad_norm", "token_weight", "rectified_frac", "val/nll", "eval/*/avg",
                   "critic/rewards/mean", "val-core/*/acc/mean@*")  # fmt: skip
PREFIXES = ("train/", "actor/")
"""Where a name without a slash is looked for: of offline training, and of verl's online trainer."""
SPARSE = ("val/", "eval/", "val-core/", "val-aux/")
"""Measured at few steps, each over a whole set: such metrics are never smoothed."""

_UNITS = {
    "loss": "loss (nats per token, weighted)",
    "nll": "negative log-likelihood (nats per token)",
    "grad_norm": "gradient norm, before clipping",
    "token_weight": "mean token weight",
    "entropy": "entropy (nats per token)",
    "lr": "learning rate",
    "critic/rewards/mean": "mean reward",
}
_ACCURACY = re.compile(r"eval/(.+)/avg|val-core/(.+)/acc/mean@\d+")


def check(config: Mapping[str, Any]) -> None:
    """Raise InputError for a value that cannot be."""
    smooth = config["smooth"]
    if isinstance(smooth, bool) or not isinstance(smooth, int) or smooth < 1:
        raise InputError(f"smooth={smooth}; it must be a whole number of logged steps, 1 for none")


def run(config: Mapping[str, Any]) -> Analysis:
    """Keys: ``configs/analysis/dynamics.yaml``. Raises InputError for a metric that no run has."""
    points, files, data = load(config, "dynamics")
    named = config["metrics"]
    wanted = [named] if isinstance(named, str) else list(named or DEFAULT_METRICS)
    return analyze("dynamics", points, files, data, wanted, config["smooth"], strict=named is not None)


def load(config: Mapping[str, Any], what: str) -> tuple[list[Point], dict[str, Path], dict[str, dict[str, Curve]]]:
    """The points of ``runs``, and by path the ``metrics.jsonl`` and its curves."""
    check(config)
    points = parse_runs(config["runs"])
    if any(point.at is not None for point in points):
        raise InputError(
            f"runs has points; analyze {what} takes {{LABEL: PATH}} or {{LABEL: [PATH, …]}}: steps are in it"
        )
    files = {str(path): metrics_file(path) for point in points for path in point.paths}
    return points, files, {path: read_curves(file) for path, file in files.items()}


def analyze(
    what: str, points: Sequence[Point], files: Mapping[str, Path], data: Mapping[str, Mapping[str, Curve]],
    wanted: Sequence[str], smooth: int, *, strict: bool,
) -> Analysis:  # fmt: skip
    """Figures and tables of some metrics.

    Args:
        what: begins the files' names.
        files, data: by path, the ``metrics.jsonl`` and its curves.
        wanted: names or patterns; see :func:`find_metric`.
        strict: a wanted metric that no run has is an error.
    """
    names = metric_names(wanted, data)
    missing = [pattern for pattern in wanted if not metric_names([pattern], data)]
    if (strict and missing) or not names:
        have = ", ".join(sorted({key for curves in data.values() for key in curves}))[:400]
        where, name = ", ".join(map(str, files.values())), (missing or list(wanted))[0]
        raise InputError(f"{where}: no metric {name!r}; there are: {have}")
    raw, curves, notes, figures = [], [], [], {}
    for name in names:
        window = 1 if name.startswith(SPARSE) else smooth
        found, lacking = curves_of(points, data, name, window)
        notes += lacking
        raw += raw_records(points, data, name)
        if found:
            curves += found
            slug = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
            stem = what if name.endswith(f"/{what}") else f"{what}_{slug}"
            figures[stem] = _figure(found, raw if window > 1 else [], name, window)
    shown = {f"First, last and mean{' (smoothed as in the figures)' if smooth > 1 else ''}": _table(curves)}
    inputs = {f"run_{i}": file for i, file in enumerate(files.values())}
    return Analysis({what: curves, f"{what}_runs": raw}, figures, shown, inputs, notes)


def metrics_file(path: Path) -> Path:
    """The ``metrics.jsonl`` of an ``output_dir``, or the file itself."""
    return path / METRICS_FILE if path.is_dir() else path


def read_curves(file: Path) -> dict[str, Curve]:
    """Metric -> steps and values, in the order of the steps; where a step was logged twice, the last.

    Raises:
        InputError: no such file; a line without a step, or a value that is not a number; names the line.
    """
    found: dict[str, dict[float, float]] = {}
    for number, row in enumerate(read_metrics(file), 1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int | float):
            raise InputError(f"{file}: line {number} has no step; it is not the metrics.jsonl of a training")
        for key, value in row.items():
            if not isinstance(value, int | float):
                raise InputError(f"{file}: line {number}: {key} is {value!r}, not a number")
            if key != "step":
                found.setdefault(key, {})[row["step"]] = float(value)
    if not found:
        raise InputError(f"{file} holds no metrics; train first")
    return {key: (sorted(values), [values[step] for step in sorted(values)]) for key, values in found.items()}


def find_metric(name: str, curves: Mapping[str, Curve]) -> str | None:
    """The key of a metric in one run: its own name, else the name under one of :data:`PREFIXES`."""
    keys = [name] if "/" in name else [name, *(f"{prefix}{name}" for prefix in PREFIXES)]
    return next((key for key in keys if key in curves), None)


def metric_names(wanted: Sequence[str], data: Mapping[str, Mapping[str, Curve]]) -> list[str]:
    """Which of the wanted are there: plain names as they are, patterns as the keys that they match."""
    names: dict[str, None] = {}
    for pattern in wanted:
        if any(sign in pattern for sign in "*?["):
            keys = sorted({key for curves in data.values() for key in curves if fnmatch.fnmatchcase(key, pattern)})
            names |= dict.fromkeys(keys)
        elif any(find_metric(pattern, curves) for curves in data.values()):
            names[pattern] = None
    return list(names)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Trailing mean over the last ``window`` values (fewer at the beginning)."""
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def curves_of(
    points: Sequence[Point], data: Mapping[str, Mapping[str, Curve]], name: str, smooth: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """One record for each label and step, each run smoothed and then the mean of runs; and notes on what is lacking."""
    records, notes = [], []
    for point in points:
        keys = {path: find_metric(name, data[str(path)]) for path in point.paths}
        runs = []
        for path, key in keys.items():
            if key:
                steps, values = data[str(path)][key]
                runs.append(dict(zip(steps, smoothed(values, smooth), strict=True)))
        shared = sorted(set.intersection(*map(set, runs))) if runs else []
        if len(runs) < len(keys):
            count = "" if len(keys) == 1 else f" in {len(keys) - len(runs)} of {len(keys)} runs"
            notes.append(f"{point.label} has no {name}{count}")
        elif not shared:
            notes.append(f"{point.label}: no step at which all runs have {name}")
        ends = _ends(data[str(point.paths[0])], name) if len(keys) == 1 else {}
        for step in shared:
            estimate = over_runs([values[step] for values in runs])
            if step in ends:
                estimate = Estimate(estimate.mean, *ends[step], 1, "evaluation")
            records.append({"label": point.label, "metric": name, "step": step, **estimate.columns()})
    return records, notes


def _ends(curves: Mapping[str, Curve], name: str) -> dict[float, tuple[float, float]]:
    """Step -> the ends of the logged interval over problems, where ``name`` is the accuracy of evaluations."""
    low, high = (curves.get(f"{name.removesuffix('/avg')}/ci95_{end}") for end in ("low", "high"))
    if not name.startswith("eval/") or low is None or high is None or low[0] != high[0]:
        return {}
    return dict(zip(low[0], zip(low[1], high[1], strict=True), strict=True))


def raw_records(points: Sequence[Point], data: Mapping[str, Mapping[str, Curve]], name: str) -> list[dict[str, Any]]:
    """Every logged value of every run, not smoothed."""
    return [
        {"label": point.label, "path": str(path), "metric": name, "step": step, "value": value}
        for point in points
        for path in point.paths
        if (key := find_metric(name, data[str(path)]))
        for step, value in zip(*data[str(path)][key], strict=True)
    ]


def unit(name: str) -> tuple[str, float]:
    """The label of a metric's axis, and what its values are multiplied by there."""
    short = name.removeprefix("train/").removeprefix("actor/")
    if match := _ACCURACY.fullmatch(name):
        return f"accuracy on {match[1] or match[2]} (%)", 100.0
    if short.endswith("_frac"):
        return (f"{short} (%)" if "/" in short else f"{short[:-5].replace('_', ' ')} tokens (%)"), 100.0
    if name == "val/nll":
        return f"validation: {_UNITS['nll']}", 1.0
    return _UNITS.get(short, short), 1.0


def draw(axes: Any, records: Sequence[Mapping[str, Any]], raw: Sequence[Mapping[str, Any]], name: str) -> None:
    """A line for each label, its band, and for a single run faintly the values before smoothing."""
    title, scale = unit(name)
    for index, label in enumerate(dict.fromkeys(record["label"] for record in records)):
        mine = [record for record in records if record["label"] == label]
        look, steps = style.line(index, mark=len(mine) <= 12), [record["step"] for record in mine]
        axes.plot(steps, [scale * record["mean"] for record in mine], label=label, **look)
        if all(record["low"] is not None for record in mine):
            ends = [[scale * record[end] for record in mine] for end in ("low", "high")]
            axes.fill_between(steps, *ends, color=look["color"], alpha=0.18, linewidth=0)
        part = [r for r in raw if r["label"] == label and r["metric"] == name]
        if len({r["path"] for r in part}) == 1:  # the band shows how seeds scatter
            logged = [scale * r["value"] for r in part]
            axes.plot([r["step"] for r in part], logged, color=look["color"], alpha=0.3, linewidth=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("training step")
    axes.set_ylabel(title)
    axes.legend()


def _figure(records: Sequence[Mapping[str, Any]], raw: Sequence[Mapping[str, Any]], name: str, smooth: int) -> Figure:
    caption = "Values as logged, not smoothed."
    if smooth > 1:
        caption = f"Smoothed: mean over the last {smooth} logged values of each run."
    seeds = max(record["units"] for record in records)
    if smooth > 1 and min(record["units"] for record in records) == 1:
        caption += " Faint: as logged."
    if any(record["over"] == "evaluation" for record in records):
        caption += " Band: 95% interval over problems, of one evaluation."
    if seeds > 1:
        caption += f" Mean of up to {seeds} runs; band: 95% interval of that mean (Student's t over runs)."
    return Figure(lambda axes: draw(axes, records, raw, name), caption)


def _table(records: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for name, label in dict.fromkeys((record["metric"], record["label"]) for record in records):
        mine = [record for record in records if (record["metric"], record["label"]) == (name, label)]
        values = [record["mean"] for record in mine]
        rows.append([name, label, str(mine[0]["units"]), f"{mine[0]['step']:g} to {mine[-1]['step']:g}",
                     *(f"{value:.4g}" for value in (values[0], values[-1], sum(values) / len(values)))])  # fmt: skip
    return Table(["metric", "run", "runs", "steps", "first", "last", "mean"], rows)
