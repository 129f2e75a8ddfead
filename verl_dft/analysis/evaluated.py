"""Results of ``verl-dft evaluate`` for a figure: read once, of the same problems, as estimates of accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from verl_dft.analysis.estimates import Estimate
from verl_dft.analysis.runs import Point
from verl_dft.errors import InputError
from verl_dft.evaluation.compare import load_results
from verl_dft.evaluation.metrics import macro_average

Results = Mapping[str, Mapping[str, Any]]
"""Benchmark -> its ``result.json``."""


@dataclass(frozen=True)
class Evaluated:
    """Results by path, those of the baseline where one was given, and the files that all came from."""

    results: dict[Path, Results]
    base: Path | None
    baseline: Results | None
    inputs: dict[str, Path]


def read_evaluated(points: Sequence[Point], config: Mapping[str, Any]) -> Evaluated:
    """Results of every point and of ``baseline``, of ``benchmark`` alone where one is named.

    Raises:
        InputError: a result that is missing or damaged, or results of different problems.
    """
    results = {path: chosen(path, config["benchmark"]) for point in points for path in point.paths}
    base = None if config["baseline"] is None else Path(config["baseline"]).expanduser()
    baseline = None if base is None else chosen(base, config["benchmark"])
    check_same_problems(results if base is None or baseline is None else {**results, base: baseline})
    inputs = {f"result_{i}_{name}": result_file(path, name) for i, path in enumerate(results) for name in results[path]}
    if base is not None and baseline is not None:
        inputs |= {f"baseline_{name}": result_file(base, name) for name in baseline}
    return Evaluated(results, base, baseline, inputs)


def accuracy(results: Results, metric: str) -> Estimate:
    """``avg``, ``pass@K`` or ``maj@K`` as a fraction, the mean over benchmarks; the interval of avg is over problems.

    Over several benchmarks the degrees of freedom are Welch and Satterthwaite's. pass@K and maj@K have no interval.
    """
    if metric == "avg":
        shares = [[problem["avg"] for problem in result["per_problem"]] for result in results.values()]
        return mean_of_means(shares)
    kind, _, k = metric.partition("@")
    values = []
    for name, result in results.items():
        found = result.get(f"{kind}_at_k", {})
        if k not in found:
            have = ", ".join(f"{kind}@{value}" for value in found) or f"no {kind}@K"
            raise InputError(f"{name} of {result['model']} has no {metric}; it has {have}")
        values.append(float(found[k]))
    count = sum(len(result["per_problem"]) for result in results.values())
    return Estimate(fmean(values), None, None, count, "problems")


def mean_of_means(shares: Sequence[Sequence[float]]) -> Estimate:
    """The mean of several means, each of its own values; degrees of freedom are Welch and Satterthwaite's."""
    average = macro_average(shares)
    low, high = average.ci95 or (None, None)
    return Estimate(average.mean, low, high, sum(map(len, shares)), "problems")


def check_same_problems(results: Mapping[Path, Results]) -> None:
    """Raise InputError unless all were asked the same problems of the same benchmarks, n times each."""
    (first, a), *others = results.items()
    for path, b in others:
        if a.keys() != b.keys():
            raise InputError(
                f"{first} has results for {', '.join(a)}, {path} for {', '.join(b)}; name one as benchmark=…"
            )
        for name in a:
            ids = [{problem["id"] for problem in result[name]["per_problem"]} for result in (a, b)]
            if ids[0] != ids[1] or a[name]["n"] != b[name]["n"]:
                what = "problems" if ids[0] != ids[1] else "n"
                raise InputError(f"{first} and {path} have different {what} for {name}; evaluate one of them again")


def chosen(path: Path, benchmark: Any) -> dict[str, Any]:
    """The results in a folder, of one benchmark, of several, or of all (None). Raises InputError for a missing one."""
    found = load_results(path)
    names = [benchmark] if isinstance(benchmark, str) else list(benchmark or found)
    if missing := [name for name in names if name not in found]:
        raise InputError(f"{path} has no result for {missing[0]}; it has {', '.join(found)}")
    return {name: found[name] for name in names}


def result_file(path: Path, benchmark: str) -> Path:
    """The ``result.json`` of a benchmark in an evaluation's folder."""
    own = path / "result.json"
    return own if own.is_file() else next(
        file for file in sorted(path.glob("*/result.json")) if load_results(file.parent).keys() == {benchmark}
    )  # fmt: skip
