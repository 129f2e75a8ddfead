"""Training curves from ``metrics.jsonl`` files. matplotlib is imported when a plot is drawn."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.files import atomic_write

CURVES = (
    ("train/loss", "loss (nats per token, weighted)"),
    ("train/nll", "nll (nats per token, unweighted)"),
    ("train/token_weight", "mean token weight"),
)
"""Metric and title of each panel; ``nll`` and ``token_weight`` mean the same for every objective."""


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Lines of a ``metrics.jsonl``, each with ``step``.

    Raises:
        InputError: no such file, or a line that is no JSON object (the last one may be half written).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; it is the metrics.jsonl of a training's output_dir")
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise InputError(f"{path}: line {number} is not JSON; train again, or delete that line") from None
    return rows


def series(rows: Sequence[Mapping[str, float]], metric: str) -> tuple[list[float], list[float]]:
    """Steps and values of the lines that have ``metric``."""
    found = [(row["step"], row[metric]) for row in rows if metric in row]
    return [step for step, _ in found], [value for _, value in found]


def training_curves(
    runs: Mapping[str, str | Path], out: str | Path, curves: Sequence[tuple[str, str]] = CURVES
) -> Path:
    """Draw one panel per metric with a line per run, and validation points where ``train/X`` has a ``val/X``.

    Args:
        runs: name -> path of its ``metrics.jsonl``.
        out: the PNG to write, atomically.

    Raises:
        InputError: a file is missing, or no run has one of the metrics.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    data = {name: read_metrics(path) for name, path in runs.items()}
    figure, axes = plt.subplots(1, len(curves), figsize=(4.6 * len(curves), 3.4), squeeze=False, layout="constrained")
    for axis, (metric, title) in zip(axes[0], curves, strict=True):
        _panel(axis, data, metric)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step (dashed: validation)" if _has_validation(data, metric) else "step")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    with atomic_write(out, "wb") as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)
    return Path(out)


def _has_validation(data: Mapping[str, Sequence[Mapping[str, float]]], metric: str) -> bool:
    return any(series(rows, metric.replace("train/", "val/"))[0] for rows in data.values())


def _panel(axis: Any, data: Mapping[str, Sequence[Mapping[str, float]]], metric: str) -> None:
    drawn = False
    for index, (name, rows) in enumerate(data.items()):
        color = f"C{index}"
        steps, values = series(rows, metric)
        axis.plot(steps, values, color=color, label=name, linewidth=1.4)
        val_steps, val_values = series(rows, metric.replace("train/", "val/"))
        axis.plot(val_steps, val_values, color=color, linestyle="--", marker="o", markersize=3, linewidth=0.8)
        drawn = drawn or bool(steps)
    if not drawn:
        raise InputError(f"none of the runs {', '.join(data)} has the metric {metric!r}")
