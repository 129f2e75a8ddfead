"""What a claim can be about: one number of each side of a comparison, read from a finished result.

Every quantity refuses sides that cannot be compared: other problems, other rows, another reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from verl_dft.analysis.dynamics import find_metric, metrics_file, read_curves
from verl_dft.analysis.scored import check_same_rows, read_json, read_scored
from verl_dft.errors import InputError
from verl_dft.evaluation.compare import load_results, paired

LOW, HIGH = 0.1, 0.9
"""Probabilities below and from which a token counts as extreme, as in :mod:`verl_dft.analysis.tokens`."""


@dataclass(frozen=True)
class Source:
    """Where a quantity is read.

    Attributes:
        path: of ``runs``.
        evaluations: resolved path of a model -> its ``result.json``, as ``evaluations`` of the configuration has them.
    """

    path: Path
    evaluations: Mapping[Path, Path]


@dataclass(frozen=True)
class Quantity:
    """``pair`` gives the values of both sides of one seed, and refuses sides that cannot be compared."""

    what: str
    pair: Callable[[Source, Source], tuple[float, float]]
    scale: float = 1.0
    digits: int = 4


def result_file(source: Source) -> Path | None:
    """The ``result.json`` of an evaluation's folder, or of the model that a training's folder (or the path) holds."""
    if (own := source.path / "result.json").is_file():
        return own
    models = (source.path.resolve(), (source.path / "model").resolve())
    return next((source.evaluations[model] for model in models if model in source.evaluations), None)


def result_of(source: Source) -> Mapping[str, Any]:
    """The content of that file. Raises InputError where there is none."""
    file = result_file(source)
    if file is None:
        raise InputError(f"{source.path}: no evaluation of it; give the folders of evaluations as evaluations=[…]")
    return next(iter(load_results(file.parent).values()))


def _accuracy(left: Source, right: Source) -> tuple[float, float]:
    results = [result_of(side) for side in (left, right)]
    names = [result["benchmark"] for result in results]
    if names[0] != names[1]:
        raise InputError(f"{left.path} was evaluated on {names[0]}, {right.path} on {names[1]}; compare one benchmark")
    paired(names[0], *results)  # refuses other problems and another number of samples
    first, second = (fmean(problem["avg"] for problem in result["per_problem"]) for result in results)
    return first, second


def _statistics(name: str, same: str) -> Callable[[Source, Source], tuple[float, float]]:
    """A mean over all rows of ``verl-dft score``; ``same``: the fact in which both sides must agree.

    KL is of the same rows under two models, log-probs are of two texts of the same problems.
    """

    def pair(left: Source, right: Source) -> tuple[float, float]:
        found = [read_json(side.path / "statistics.json") for side in (left, right)]
        facts = [one.get(same) for one in found]
        if facts[0] != facts[1]:
            raise InputError(
                f"{left.path} and {right.path} have different {same}: {facts[0]} and {facts[1]}; score both alike"
            )
        rows = [read_scored(side.path) for side in (left, right)]
        if name.startswith("kl_"):
            check_same_rows(dict(zip(("left", "right"), rows, strict=True)))
        elif only := sorted(set(rows[0].problems) ^ set(rows[1].problems)):
            raise InputError(
                f"{left.path} and {right.path} have different problems: {len(only)} are in one alone ({only[0]!r} for "
                "one); score texts of the same problems"
            )
        try:
            first, second = (float(one["by_origin"]["all"][name]["mean"]) for one in found)
        except (KeyError, TypeError):
            raise InputError(
                f"{left.path} or {right.path} lacks {name!r}; score the rows, with kl=true for KL"
            ) from None
        return first, second

    return pair


def _share(wanted: Callable[[np.ndarray], np.ndarray]) -> Callable[[Source, Source], tuple[float, float]]:
    """The share of all tokens of ``verl-dft score`` rows whose probability [T] is ``wanted``."""

    def pair(left: Source, right: Source) -> tuple[float, float]:
        files = [read_scored(side.path) for side in (left, right)]
        check_same_rows(dict(zip(("left", "right"), files, strict=True)))
        first, second = (float(wanted(np.exp(file.values)).mean()) for file in files)
        return first, second

    return pair


def _grad_norm(statistic: Callable[[Sequence[float]], float]) -> Callable[[Source, Source], tuple[float, float]]:
    """A statistic of the gradient norms, before clipping, of all steps of a training."""

    def pair(left: Source, right: Source) -> tuple[float, float]:
        steps, values = [], []
        for side in (left, right):
            file = metrics_file(side.path)
            curves = read_curves(file)
            name = find_metric("grad_norm", curves)
            if name is None or len(curves[name][0]) < 2:
                raise InputError(f"{file}: no gradient norms of two steps or more; give a training's output_dir")
            steps.append(curves[name][0])
            values.append(statistic(curves[name][1]))
        if steps[0] != steps[1]:
            raise InputError(f"{left.path} and {right.path} logged gradient norms at different steps; train both alike")
        return values[0], values[1]

    return pair


def variation(values: Sequence[float]) -> float:
    """Standard deviation over mean: free of scale, so that a method is not steady for being small."""
    return stdev(values) / fmean(values)


QUANTITIES: dict[str, Quantity] = {
    "accuracy": Quantity("avg@n (%, points)", _accuracy, 100, 1),
    "kl": Quantity("KL(model ‖ reference), nats per token", _statistics("kl_model_reference", "reference")),
    "logp_token": Quantity("log-prob, nats per token", _statistics("per_token", "model")),
    "logp_response": Quantity("log-prob, nats per response", _statistics("sequence_sum", "model"), digits=2),
    "share_low": Quantity(f"tokens below {LOW} (%)", _share(lambda p: p < LOW), 100, 2),
    "share_high": Quantity(f"tokens from {HIGH} on (%)", _share(lambda p: p >= HIGH), 100, 2),
    "share_extreme": Quantity(
        f"tokens below {LOW} or from {HIGH} on (%)", _share(lambda p: (p < LOW) | (p >= HIGH)), 100, 2
    ),
    "grad_norm_cv": Quantity("gradient norm, standard deviation / mean over steps", _grad_norm(variation), digits=3),
    "grad_norm_sd": Quantity("gradient norm, standard deviation over steps", _grad_norm(stdev)),
}
"""What a claim can be about. Shares and accuracies are fractions; tables show them in percent."""


def evaluated(folders: Any) -> dict[Path, Path]:
    """Resolved model path -> ``result.json``, of evaluations' folders with one result or a folder for each model."""
    found: dict[Path, Path] = {}
    for folder in [folders] if isinstance(folders, str) else list(folders or []):
        files = sorted([*Path(folder).glob("result.json"), *Path(folder).glob("*/result.json")])
        if not files:
            raise InputError(f"{folder} holds no result.json, nor does a folder below it; it is in evaluations")
        for file in files:
            model = Path(str(read_json(file).get("model"))).resolve()
            if model in found:
                raise InputError(f"{found[model]} and {file} are both of {model}; name one of them in evaluations")
            found[model] = file
    return found
