"""Training curves from ``metrics.jsonl`` files. matplotlib is imported when a plot is drawn."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.files import atomic_write
from verl_dft.training.metrics import read_metrics

CURVES = (
    ("train/loss", "loss (nats per token, weighted)"),
    ("train/nll", "nll (nats per token, unweighted)"),
    ("train/token_weight", "mean token weight"),
)
"""Metric and title of each panel; ``nll`` and ``token_weight`` mean the same for every objective."""


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
    data = {name: read_metrics(path) for name, path in runs.items()}
    with _figure(out, len(curves)) as axes:
        for axis, (metric, title) in zip(axes, curves, strict=True):
            _panel(axis, data, metric)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("step (dashed: validation)" if _has_validation(data, metric) else "step")
    return Path(out)


@contextmanager
def _figure(out: str | Path, panels: int) -> Iterator[Sequence[Any]]:
    """The axes of a row of panels, written to ``out`` when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 3.4), squeeze=False, layout="constrained")
    try:
        yield axes[0]
        for axis in axes[0]:
            axis.grid(alpha=0.3)
        axes[0][0].legend()
        with atomic_write(out, "wb") as file:
            figure.savefig(file, dpi=110, format="png")
    finally:
        plt.close(figure)


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
