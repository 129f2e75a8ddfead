"""One look for all figures: 6x4 inch, colours and marks that are told apart without colour vision."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_dft.files import atomic_write

SIZE = (6.0, 4.0)
"""Inches. The caption is below, so that a figure explains itself where it is pasted."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's palette (without its yellow, which is lost on white): blue, vermilion, green, purple, orange, …"""
_LINES = ("-", "--", "-.", ":")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "verl_dft",  # the same data give the same file
}


def line(index: int, mark: bool = True) -> dict[str, Any]:
    """Keywords of a line's ``plot``: colour with a mark, or where points are dense, with a kind of line."""
    color = {"color": COLORS[index % len(COLORS)]}
    if mark:
        return color | {"linestyle": "-", "marker": _MARKS[index % len(_MARKS)], "markersize": 4}
    return color | {"linestyle": _LINES[index % len(_LINES)]}


def bar(index: int) -> dict[str, Any]:
    """Keywords of a series of bars."""
    hatch = ("", "///", "...", "xxx", "\\\\\\", "++", "oo", "--")[index % 8]
    return {"color": COLORS[index % len(COLORS)], "hatch": hatch, "edgecolor": "white", "linewidth": 0}


def errors(means: Sequence[float], lows: Sequence[float | None], highs: Sequence[float | None]) -> list[list[float]]:
    """``yerr`` of points with intervals; 0 where there is none."""
    down = [0.0 if low is None else mean - low for mean, low in zip(means, lows, strict=True)]
    up = [0.0 if high is None else high - mean for mean, high in zip(means, highs, strict=True)]
    return [down, up]


def save(draw: Callable[[Any], None], path: Path, caption: str, formats: Sequence[str]) -> list[Path]:
    """Draw one figure and write ``path`` with each format's ending, atomically.

    Args:
        draw: draws on the matplotlib Axes that it is given.
        path: without ending.
        caption: what is printed below the axes.
        formats: of ``png``, ``svg`` and ``pdf``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    written = []
    with plt.rc_context(_SETTINGS):
        figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
        try:
            draw(axes)
            figure.supxlabel("\n".join(textwrap.wrap(caption, 106)), fontsize=7, color="#444444", x=0.01, ha="left")
            for ending in formats:
                with atomic_write(path.with_name(f"{path.name}.{ending}"), "wb") as file:
                    figure.savefig(file, dpi=150, format=ending, metadata=_undated(ending))
                written.append(path.with_name(f"{path.name}.{ending}"))
        finally:
            plt.close(figure)
    return written


def _undated(ending: str) -> Mapping[str, None]:
    """Keep the time out of the file, so that the same data give the same bytes."""
    return {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(ending, {})
