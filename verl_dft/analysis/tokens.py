"""Histograms of token probabilities before and after training (DFT, Fig. 2), and the words of the lowest bin.

All models score the same rows, so a bin's change is of the models. The paper's bins are not stated; ours are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from verl_dft.analysis import style
from verl_dft.analysis.estimates import Estimate, over_problems
from verl_dft.analysis.output import Analysis, Figure
from verl_dft.analysis.runs import one_each, parse_runs
from verl_dft.analysis.scored import ScoredFile, check_same_rows, read_json, read_scored
from verl_dft.errors import InputError
from verl_dft.report.tables import Table


def check(config: Mapping[str, Any]) -> None:
    """Raise InputError for a value that cannot be."""
    for key, least in (("bins", 2), ("words", 0)):
        if not isinstance(config[key], int) or config[key] < least:
            raise InputError(f"{key}={config[key]}; it must be a whole number of at least {least}")
    _thresholds(config["thresholds"])


def run(config: Mapping[str, Any]) -> Analysis:
    """Keys: ``configs/analysis/tokens.yaml``. Raises InputError for what cannot be compared or decoded."""
    check(config)
    paths = one_each(parse_runs(config["runs"]), "tokens")
    bins, words, thresholds = config["bins"], config["words"], _thresholds(config["thresholds"])
    baseline = next(iter(paths)) if config["baseline"] is None else str(config["baseline"])
    if baseline not in paths:
        raise InputError(f"baseline={baseline} is not one of the labels {', '.join(paths)}")
    files = {label: read_scored(path, config["column"]) for label, path in paths.items()}
    check_same_rows(files)
    tables = {"tokens": histogram(files, bins, baseline), "tokens_thresholds": shares(files, thresholds, baseline)}
    shown = {"Share of tokens (%)": _share_table(tables["tokens_thresholds"], thresholds, list(files), baseline)}
    if words:
        tables["tokens_words"] = lowest_words(files, bins, words, config["tokenizer"])
        title = f"Most frequent tokens with a probability below {1 / bins:g}"
        shown[title] = _word_table(tables["tokens_words"], list(files), words)
    inputs = {label: file.path for label, file in files.items()}
    return Analysis(tables, _figures(tables["tokens"], list(files), baseline), shown, inputs)


def bin_of(values: np.ndarray, bins: int) -> np.ndarray:
    """[T] the bin 0 … bins - 1 of each log-prob; bin k holds probabilities in [k / bins, (k + 1) / bins)."""
    # rounding may lift a log-prob a little above 0
    return np.minimum((np.exp(values) * bins).astype(np.int64), bins - 1)


def histogram(files: Mapping[str, ScoredFile], bins: int, baseline: str) -> list[dict[str, Any]]:
    """A record for each model and bin: ``count``, ``share``, and ``change``, ``times`` against the baseline's."""
    counts = {label: np.bincount(bin_of(file.values, bins), minlength=bins) for label, file in files.items()}
    base = counts[baseline]
    return [
        {
            "label": label, "bin": k, "low": k / bins, "high": (k + 1) / bins, "count": int(found[k]),
            "share": float(found[k] / found.sum()), "change": float((found[k] - base[k]) / base.sum()),
            "times": float(found[k] / base[k]) if base[k] else None,
        }
        for label, found in counts.items() for k in range(bins)
    ]  # fmt: skip


def shares(files: Mapping[str, ScoredFile], thresholds: Sequence[float], baseline: str) -> list[dict[str, Any]]:
    """Shares of tokens below the lower and from the upper threshold on, and their paired change.

    Intervals are clustered by problem; the tokens are the same in all models, so a change is paired token by token.
    """
    records = []
    for side, threshold in zip(("below", "above"), thresholds, strict=True):

        def hits(file: ScoredFile, side: str = side, threshold: float = threshold) -> np.ndarray:
            probability = np.exp(file.values)
            return file.sums(probability < threshold if side == "below" else probability >= threshold)

        base = hits(files[baseline])
        for label, file in files.items():
            found = hits(file)
            share = over_problems(found, file.counts, file.problems)
            change = over_problems(found - base, file.counts, file.problems)
            about = {"label": label, "side": side, "threshold": threshold, "tokens": len(file.values)}
            records.append(about | share.columns() | {f"change_{k}": v for k, v in _ends(change).items()})
    return records


def lowest_words(
    files: Mapping[str, ScoredFile], bins: int, words: int, tokenizer: str | None = None
) -> list[dict[str, Any]]:
    """The most frequent tokens of each model's lowest bin.

    ``count`` is of the bin, ``share`` of the bin's tokens, ``total`` the token's occurrences in the rows. Equal counts
    are ordered by token id.
    """
    from verl_dft.data.sources import load_tokenizer

    records = []
    for label, file in files.items():
        lowest = file.ids[bin_of(file.values, bins) == 0]
        ids, counts = np.unique(lowest, return_counts=True)
        totals = np.bincount(file.ids, minlength=int(file.ids.max()) + 1)
        decoder = load_tokenizer(tokenizer or _model_of(label, file))
        order = np.lexsort((ids, -counts))[:words]
        records += [
            {
                "label": label, "rank": rank, "token_id": int(ids[i]), "token": decoder.decode([int(ids[i])]),
                "count": int(counts[i]), "share": float(counts[i] / len(lowest)), "total": int(totals[ids[i]]),
            }
            for rank, i in enumerate(order, 1)
        ]  # fmt: skip
    return records


def draw_histogram(axes: Any, records: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    """An outline for each model, counts on a log scale."""
    for index, label in enumerate(labels):
        mine = [record for record in records if record["label"] == label]
        edges = [record["low"] for record in mine] + [1.0]
        look = style.line(index, mark=False)
        axes.stairs([record["count"] for record in mine], edges, baseline=None, label=label, linewidth=1.6, **look)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7 * min((record["count"] for record in records if record["count"]), default=1))
    axes.set_xlim(0, 1)
    axes.set_xlabel("probability of the token in the data")
    axes.set_ylabel("tokens (log scale)")
    axes.legend(loc="upper center")


def draw_change(axes: Any, records: Sequence[Mapping[str, Any]], labels: Sequence[str], baseline: str) -> None:
    """A line for each model but the baseline: its count over the baseline's, bin by bin."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    axes.axhline(1, color="black", linewidth=0.8)
    for index, label in enumerate(labels):
        mine = [record for record in records if record["label"] == label and record["times"]]
        if label != baseline:
            middles = [(record["low"] + record["high"]) / 2 for record in mine]
            axes.plot(middles, [record["times"] for record in mine], label=label, **style.line(index))
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0, 1)
    axes.set_xlabel("probability of the token in the data")
    axes.set_ylabel(f"tokens, as a multiple of {baseline}'s (log scale)")
    axes.legend()


def _figures(records: Sequence[Mapping[str, Any]], labels: Sequence[str], baseline: str) -> dict[str, Figure]:
    mine = [record for record in records if record["label"] == baseline]
    about = (
        f"{sum(record['count'] for record in mine)} tokens in {len(mine)} bins of equal width, the same rows for all"
    )
    figures = {"tokens": Figure(lambda axes: draw_histogram(axes, records, labels), f"{about}.")}
    if len(labels) > 1:
        caption = f"{about}; a bin that is empty in one of the two has no point."
        figures["tokens_change"] = Figure(lambda axes: draw_change(axes, records, labels, baseline), caption)
    return figures


def _thresholds(values: Any) -> tuple[float, float]:
    values = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values]
    if not (len(values) == 2 and all(isinstance(v, int | float) for v in values) and 0 < values[0] <= values[1] < 1):
        raise InputError(f"thresholds={values}; it must be [LOW,HIGH] with 0 < LOW <= HIGH < 1")
    return float(values[0]), float(values[1])


def _model_of(label: str, file: ScoredFile) -> str:
    path = file.path.parent / "statistics.json"
    model = read_json(path, "give tokenizer=FOLDER, or words=0").get("model")
    if not isinstance(model, str):
        raise InputError(f"{path} names no model for {label}; give tokenizer=FOLDER, or words=0")
    return model


def _ends(found: Estimate) -> dict[str, float | None]:
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _share_table(
    records: Sequence[Mapping[str, Any]], thresholds: Sequence[float], labels: Sequence[str], baseline: str
) -> Table:
    low, high = thresholds
    header = ["model"]
    for name in (f"below {low:g}", f"from {high:g}"):
        header += [name, f"change from {baseline} (95% interval)"]
    found = {(record["label"], record["side"]): record for record in records}
    return Table(header, [[label, *_cells(found[label, "below"], label == baseline),
                           *_cells(found[label, "above"], label == baseline)] for label in labels])  # fmt: skip


def _cells(record: Mapping[str, Any], is_baseline: bool) -> list[str]:
    change = f"{100 * record['change_mean']:+.2f}"
    if record["change_low"] is not None:
        change += f" ({100 * record['change_low']:+.2f} to {100 * record['change_high']:+.2f})"
    return [f"{100 * record['mean']:.2f}", "" if is_baseline else change]


def _word_table(records: Sequence[Mapping[str, Any]], labels: Sequence[str], words: int) -> Table:
    columns = {label: [_word(record) for record in records if record["label"] == label] for label in labels}
    rows = [[str(i + 1), *(column[i] if i < len(column) else "" for column in columns.values())]
            for i in range(min(words, max(map(len, columns.values()))))]  # fmt: skip
    return Table(["rank", *labels], rows)


def _word(record: Mapping[str, Any]) -> str:
    return f"`{record['token']!r}` {record['count']} of {record['total']}"
