"""``runs=…`` of ``verl-dft analyze``: which files belong to which line of a figure, at which point of its x axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError

HOW = "write runs={LABEL: PATH, …}, runs={LABEL: {POINT: PATH, …}, …} or runs=[PATH, …]"


@dataclass(frozen=True)
class Point:
    """Results that belong together: one, or the same with several seeds.

    Attributes:
        label: the line, or the bar, that they belong to.
        at: where on the x axis (a step, a value of a swept key); None where none was given.
        paths: one path for each seed.
    """

    label: str
    at: float | None
    paths: tuple[Path, ...]


def parse_runs(runs: Any, key: str = "runs") -> list[Point]:
    """The points of ``runs``, in the order given; those of one label in the order of their x.

    Args:
        runs: {label: path}, {label: [path, …]} (seeds), {label: {point: path or [path, …]}}, or [path, …], whose labels
            are then the parts by which the paths differ.
        key: its name, for messages.

    Raises:
        InputError: none of these; a path that does not exist; a point that is not a number.
    """
    if isinstance(runs, str):
        runs = [runs]
    if isinstance(runs, Sequence):
        paths = [_path(value, key) for value in runs]
        runs = dict(zip(labels_of(paths), map(str, paths), strict=True))
    if not isinstance(runs, Mapping) or not runs:
        raise InputError(f"{key} is not set; {HOW.replace('runs', key)}")
    points: list[Point] = []
    for label, value in runs.items():
        if isinstance(value, Mapping):
            found = [Point(str(label), _number(at, key, label), _paths(part, key)) for at, part in value.items()]
            points += sorted(found, key=lambda point: point.at or 0.0)
        else:
            points.append(Point(str(label), None, _paths(value, key)))
    return points


def one_each(points: Sequence[Point], what: str) -> dict[str, Path]:
    """Label -> path, for a figure that takes one result a label. Raises InputError for points or seeds."""
    for point in points:
        if point.at is not None or len(point.paths) > 1:
            raise InputError(f"runs.{point.label} has several paths; analyze {what} takes one for each label")
    return {point.label: point.paths[0] for point in points}


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Short names: the parts of each path that are not the same in all; the last part of a single path."""
    parts = [path.absolute().parts for path in paths]
    if len(parts) == 1:
        return [parts[0][-1]]
    shared = {part for part in parts[0] if all(part in other for other in parts)}
    labels = ["/".join(part for part in path if part not in shared) or path[-1] for path in parts]
    if len(set(labels)) < len(labels):
        raise InputError(f"runs has {next(label for label in labels if labels.count(label) > 1)!r} twice; name them: "
                         "runs={LABEL: PATH, …}")  # fmt: skip
    return labels


def _paths(value: Any, key: str) -> tuple[Path, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not values:
        raise InputError(f"{key} has {value!r} where a path belongs; {HOW.replace('runs', key)}")
    return tuple(_path(item, key) for item in values)


def _path(value: Any, key: str) -> Path:
    if not isinstance(value, str):
        raise InputError(f"{key} has {value!r} where a path belongs; {HOW.replace('runs', key)}")
    path = Path(value).expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist; it is in {key}")
    return path


def _number(at: Any, key: str, label: Any) -> float:
    try:
        return float(at)
    except (TypeError, ValueError):
        raise InputError(f"{key}.{label} has the point {at!r}, which is not a number (a step, a value)") from None
