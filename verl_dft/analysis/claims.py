"""Claims that one result is above or below another, checked over seeds: paired differences and a verdict for each.

What is compared has to be written down before results are looked at: a claim names the quantity, both sides and the
direction, and the verdict follows from the interval alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from verl_dft.analysis.estimates import Estimate, over_runs
from verl_dft.analysis.output import Analysis
from verl_dft.analysis.quantities import QUANTITIES, Source, evaluated, result_file, result_of
from verl_dft.analysis.runs import parse_runs
from verl_dft.errors import InputError
from verl_dft.evaluation.metrics import difference_ci95
from verl_dft.report.tables import Table

DIRECTIONS = ("greater", "less")
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
_KEYS = ("claim", "source", "quantity", "left", "right", "direction")


def verdict(difference: Estimate, direction: str) -> str:
    """What the 95% interval of left minus right says: undecided where it contains 0, or where there is none."""
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return UNDECIDED
    return HOLDS if (difference.mean > 0) == (direction == "greater") else FAILS


def check(config: Mapping[str, Any]) -> None:
    """Raise InputError for claims that are none, before any result is looked at."""
    claims = config["claims"]
    if not isinstance(claims, Mapping) or not claims:
        raise InputError(f"claims is not set; write claims={{NAME: {{{', '.join(f'{key}: …' for key in _KEYS)}}}, …}}")
    labels = list(config["runs"]) if isinstance(config["runs"], Mapping) else []
    for name, claim in claims.items():
        if not isinstance(claim, Mapping) or set(claim) != set(_KEYS):
            raise InputError(f"claims.{name} must have the keys {', '.join(_KEYS)}, no more and no fewer")
        for key, valid in (("quantity", list(QUANTITIES)), ("direction", list(DIRECTIONS)), ("left", labels),
                           ("right", labels)):  # fmt: skip
            if claim[key] not in valid:
                raise InputError(f"claims.{name}.{key} is {claim[key]!r}, not one of {', '.join(map(str, valid))}")
    _check_seeds(config["runs"], config["seeds"])


def _check_seeds(runs: Mapping[str, Any], seeds: Any) -> None:
    """Raise InputError unless every label has a path for each seed, and another one for each."""
    paths = {label: [value] if isinstance(value, str) else value for label, value in runs.items()}
    for label, found in paths.items():
        if not isinstance(found, list) or not found or not all(isinstance(path, str) for path in found):
            raise InputError(f"runs.{label} must be a path, or a list of one path for each seed")
    counts = {label: len(found) for label, found in paths.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"runs must have the same seeds for all labels, one path each; they have {counts}")
    number = next(iter(counts.values()))
    if seeds is not None and not isinstance(seeds, list):
        raise InputError(f"seeds={seeds} must be a list, e.g. seeds=[1,2,3]")
    if seeds and len(seeds) != number:
        raise InputError(f"seeds={seeds} names {len(seeds)} seeds; every label of runs has {number} paths")
    for label, found in paths.items():  # given twice it would count as two, and make an interval narrower
        if len({Path(path).expanduser().resolve() for path in found}) < number:
            raise InputError(f"runs.{label} has the same path twice; a seed is a run of its own")


def run(config: Mapping[str, Any]) -> Analysis:
    """Keys: ``configs/analysis/claims.yaml``. Raises InputError for results that are missing or not comparable."""
    check(config)
    evaluations = evaluated(config["evaluations"])
    runs = {p.label: [Source(path, evaluations) for path in p.paths] for p in parse_runs(config["runs"])}
    seeds = [str(seed) for seed in config["seeds"] or range(1, len(next(iter(runs.values()))) + 1)]
    by_seed = [record for name, claim in config["claims"].items() for record in pairs(name, claim, runs, seeds)]
    records = [summary(name, claim, by_seed) for name, claim in config["claims"].items()]
    levels = accuracies(runs, seeds)
    tables = {"claims": records, "claims_seeds": by_seed, **({"claims_accuracy": levels} if levels else {})}
    shown = {"Claims": claims_table(records, by_seed), "Values": values_table(records, by_seed)}
    shown |= {"Accuracy (%)": accuracy_table(levels, seeds)} if levels else {}
    note = f"Seeds: {', '.join(seeds)}. Intervals: Student's t over seeds, 95%, each for itself."
    return Analysis(tables, {}, shown, read_files(runs, evaluations), [note])


def read_files(runs: Mapping[str, Sequence[Source]], evaluations: Mapping[Path, Path]) -> dict[str, Path]:
    """The files that a claim can be about, for the manifest."""
    found = {f"result_{i}": file for i, file in enumerate(evaluations.values())}
    for label, sources in runs.items():
        for i, source in enumerate(sources):
            files = [source.path / name for name in ("result.json", "statistics.json", "rows.parquet", "metrics.jsonl")]
            found |= {f"{label}_{i}_{file.stem}": file for file in files if file.is_file()}
    return found


def pairs(
    name: str, claim: Mapping[str, Any], runs: Mapping[str, Sequence[Source]], seeds: Sequence[str]
) -> list[dict[str, Any]]:
    """A record for each seed: both values and their difference."""
    records, quantity = [], QUANTITIES[claim["quantity"]]
    for seed, left, right in zip(seeds, runs[claim["left"]], runs[claim["right"]], strict=True):
        first, second = quantity.pair(left, right)
        records.append({"name": name, "seed": seed, "left": first, "right": second, "difference": first - second})
    return records


def summary(name: str, claim: Mapping[str, Any], by_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The claim with the mean of both sides, the interval of the paired difference and the verdict."""
    mine = [record for record in by_seed if record["name"] == name]
    estimate = over_seeds([record["difference"] for record in mine])
    means = {f"{side}_mean": fmean(record[side] for record in mine) for side in ("left", "right")}
    return {"name": name, **claim, **means, **estimate.columns(), "verdict": verdict(estimate, claim["direction"])}


def over_seeds(values: Sequence[float]) -> Estimate:
    """Their mean with its interval; without one where they have no spread: chance is unknown then, and not 0."""
    found = over_runs(values)
    return found if difference_ci95(values) else replace(found, low=None, high=None)


def accuracies(runs: Mapping[str, Sequence[Source]], seeds: Sequence[str]) -> list[dict[str, Any]]:
    """Records of the accuracy of every label whose results are all there, also of those that no claim is about."""
    return [
        {"label": label, "seed": seed, "accuracy": fmean(one["avg"] for one in result_of(source)["per_problem"])}
        for label, sources in runs.items() if all(map(result_file, sources))
        for seed, source in zip(seeds, sources, strict=True)
    ]  # fmt: skip


# ---- tables ----


def claims_table(records: Sequence[Mapping[str, Any]], by_seed: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each claim, its verdict last."""
    rows = []
    for record in records:
        quantity = QUANTITIES[record["quantity"]]
        sign = ">" if record["direction"] == "greater" else "<"
        rows.append([record["claim"], record["source"], quantity.what, f"{record['left']} {sign} {record['right']}",
                     _seeds(record, by_seed, "difference", "+"), _interval(record), record["verdict"]])  # fmt: skip
    header = ["claim", "source", "quantity", "claimed", "difference by seed", "mean (95% interval)", "verdict"]
    return Table(header, rows)


def values_table(records: Sequence[Mapping[str, Any]], by_seed: Sequence[Mapping[str, Any]]) -> Table:
    """Both sides of each claim, seed by seed."""
    rows = []
    for record in records:
        for side in ("left", "right"):
            quantity = QUANTITIES[record["quantity"]]
            mean = f"{quantity.scale * record[f'{side}_mean']:.{quantity.digits}f}"
            rows.append([record[side], quantity.what, _seeds(record, by_seed, side, ""), mean])
    return Table(["run", "quantity", "by seed", "mean"], [row for i, row in enumerate(rows) if row not in rows[:i]])


def accuracy_table(levels: Sequence[Mapping[str, Any]], seeds: Sequence[str]) -> Table:
    """A line for each label."""
    rows = []
    for label in dict.fromkeys(record["label"] for record in levels):
        values = [record["accuracy"] for record in levels if record["label"] == label]
        rows.append([label, *(f"{100 * value:.1f}" for value in values), over_seeds(values).text(1, 100)])
    return Table(["run", *(f"seed {seed}" for seed in seeds), "mean (95% interval)"], rows)


def _seeds(record: Mapping[str, Any], by_seed: Sequence[Mapping[str, Any]], field: str, sign: str) -> str:
    quantity = QUANTITIES[record["quantity"]]
    values = [quantity.scale * one[field] for one in by_seed if one["name"] == record["name"]]
    return ", ".join(f"{value:{sign}.{quantity.digits}f}" for value in values)


def _interval(record: Mapping[str, Any]) -> str:
    quantity = QUANTITIES[record["quantity"]]
    ends = [quantity.scale * record[key] for key in ("mean", "low", "high") if record[key] is not None]
    texts = [f"{value:+.{quantity.digits}f}" for value in ends]
    return f"{texts[0]} ({texts[1]} to {texts[2]})" if len(texts) == 3 else texts[0]
