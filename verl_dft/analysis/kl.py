"""Drift from a reference model by KL over the whole vocabulary, by step or label (GFT, Fig. 5).

Sources are ``verl-dft score kl=true`` results on the same rows. The paper averages over the training set and states
neither direction nor unit; ours is KL(model || reference) per response token, in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from verl_dft.analysis.draw import draw_points, points_table
from verl_dft.analysis.estimates import over_problems, pooled
from verl_dft.analysis.output import Analysis, Figure
from verl_dft.analysis.runs import Point, parse_runs
from verl_dft.analysis.scored import ScoredFile, check_same_rows, read_json, read_scored
from verl_dft.errors import InputError

_DIRECTIONS = {"model_reference": "KL(model ‖ reference)", "reference_model": "KL(reference ‖ model)"}
_PER = {"token": "nats per token", "response": "nats per response"}


def check(config: Mapping[str, Any]) -> None:
    """Raise InputError for a value that cannot be."""
    for key, valid in (("direction", _DIRECTIONS), ("per", _PER)):
        if config[key] not in valid:
            raise InputError(f"{key}={config[key]} is not one of {', '.join(valid)}")


def run(config: Mapping[str, Any]) -> Analysis:
    """Keys: ``configs/analysis/kl.yaml``. Raises InputError for results that cannot be compared."""
    check(config)
    points = parse_runs(config["runs"])
    column = f"kl_{config['direction']}"
    files = {str(path): read_scored(path, column) for point in points for path in point.paths}
    check_same_rows(files)
    check_same_reference(files)
    records = drift(points, files, config["per"])
    first = next(iter(files.values()))
    by_step = any(record["at"] is not None for record in records)
    caption = f"Mean over {len(first.values)} tokens of {len(first.problems)} rows; {_band(records)}."
    title = f"{_DIRECTIONS[config['direction']]} ({_PER[config['per']]})"
    x = config["x_label"] if by_step else ""
    figure = Figure(lambda axes: draw_points(axes, records, x, title, zero=config["zero_at_start"]), caption)
    inputs = {f"run_{i}": file.path for i, file in enumerate(files.values())}
    return Analysis({"kl": records}, {"kl": figure}, {title: points_table(records, config["x_label"])}, inputs)


def drift(points: Sequence[Point], files: Mapping[str, ScoredFile], per: str) -> list[dict[str, Any]]:
    """A record for each point: ``label``, ``at``, mean KL and its interval.

    Args:
        files: path -> its rows, with KL in nats as values.
        per: ``token`` or ``response``.
    """
    records = []
    for point in points:
        found = []
        for path in point.paths:
            file = files[str(path)]
            weights = file.counts if per == "token" else np.ones(len(file.counts))
            found.append(over_problems(file.sums(file.values), weights, file.problems))
        about = {"label": point.label, "at": point.at, "paths": [str(path) for path in point.paths]}
        records.append(about | pooled(found).columns())
    return records


def check_same_reference(files: Mapping[str, ScoredFile]) -> None:
    """Raise InputError where two results name different references (by the hashes in ``score.json``)."""
    known = {}
    for path, file in files.items():
        about = file.path.parent / "score.json"
        if about.is_file():
            known[path] = read_json(about).get("reference.path")
    names = list(known)
    for name in names[1:]:
        if known[name] != known[names[0]]:
            raise InputError(f"{names[0]} and {name} were scored against different references; score one of them again")


def _band(records: Sequence[Mapping[str, Any]]) -> str:
    over = " or ".join(sorted({record["over"] for record in records if record["low"] is not None}))
    return f"bars: 95% interval over {over}" if over else "no interval: one problem"
