"""Log-probs by stage of data rewriting: the expert's text beside the rewritten one (Table 3 and Fig. 3 there).

Sources are ``verl-dft score`` results: by stage where they were made with ``expert=FILE``, else by the rows' origin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_dft.analysis import style
from verl_dft.analysis.estimates import Estimate, from_error
from verl_dft.analysis.output import Analysis, Figure
from verl_dft.analysis.runs import one_each, parse_runs
from verl_dft.analysis.scored import read_json
from verl_dft.errors import InputError
from verl_dft.origins import ORIGINS
from verl_dft.report.tables import Table
from verl_dft.training.score_statistics import STAGES

_PER = {"response": ("sequence_sum", "nats per response"), "token": ("per_token", "nats per token")}
_TEXTS = {"expert": "expert's text", "rewritten": "rewritten text"}


def check(config: Mapping[str, Any]) -> None:
    """Raise InputError for a value that cannot be."""
    if config["per"] not in _PER:
        raise InputError(f"per={config['per']} is not one of {', '.join(_PER)}")


def run(config: Mapping[str, Any]) -> Analysis:
    """Keys: ``configs/analysis/stages.yaml``. Raises InputError for results without the statistics."""
    check(config)
    name, unit = _PER[config["per"]]
    paths = {label: _file(path) for label, path in one_each(parse_runs(config["runs"]), "stages").items()}
    found = {label: read_json(path) for label, path in paths.items()}
    with_stages = {label: "by_stage" in statistics for label, statistics in found.items()}
    if any(with_stages.values()) and not all(with_stages.values()):
        label = next(label for label, has in with_stages.items() if not has)
        raise InputError(f"{paths[label]} has no 'by_stage', which others have; score it with expert=FILE")
    by_stage = all(with_stages.values())
    make = stage_records if by_stage else origin_records
    records = [record for label in found for record in make(label, found[label], paths[label])]
    caption = "Bars: 95% interval over problems."
    if by_stage:
        caption += " Self: solved by the model itself; guided: retold; fallback: the expert's text stays."
    figure = Figure(lambda axes: draw(axes, records, name, f"log-probability ({unit})"), caption)
    return Analysis(
        {"stages": records}, {"stages": figure}, {f"Log-probability ({unit})": _table(records, name)}, paths
    )


def stage_records(label: str, statistics: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """Records of each stage: text ``expert``, ``rewritten`` and their paired ``difference``."""
    records = []
    for stage in STAGES:
        found = statistics["by_stage"].get(stage, {})
        for text in (*_TEXTS, "difference") if "expert" in found else ():
            about = {"label": label, "group": stage, "text": text, "problems": found["expert"]["problems"]}
            records.append(about | _values(found[text], about["problems"], path))
    if not records:
        raise InputError(
            f"{path}: 'by_stage' has no stage with an expert's text; score with an expert=FILE of the rows"
        )
    return records


def origin_records(label: str, statistics: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """Records of the rows of each origin."""
    if "by_origin" not in statistics:
        raise InputError(f"{path} has neither 'by_stage' nor 'by_origin'; give the output_dir of verl-dft score")
    found = statistics["by_origin"]
    return [
        {"label": label, "group": origin, "text": "rows", "problems": found[origin]["problems"]}
        | _values(found[origin], found[origin]["problems"], path)
        for origin in ORIGINS
        if origin in found
    ]


def draw(axes: Any, records: Sequence[Mapping[str, Any]], name: str, y_label: str) -> None:
    """Groups of bars: a group for each model and stage (or origin), a bar for each text."""
    drawn = [record for record in records if record["text"] != "difference"]
    # the fallback's text is the expert's own: one bar says it
    drawn = [r for r in drawn if not (r["text"] == "rewritten" and r["group"] == "expert")]
    groups = list(dict.fromkeys((record["label"], record["group"]) for record in drawn))
    labels = list(dict.fromkeys(label for label, _ in groups))
    texts = list(dict.fromkeys(record["text"] for record in drawn))
    for index, text in enumerate(texts):
        mine = [record for record in drawn if record["text"] == text]
        shift = 0.0 if len(texts) == 1 else 0.38 * (index - (len(texts) - 1) / 2)
        xs = [groups.index((record["label"], record["group"])) + shift for record in mine]
        means = [record[f"{name}_mean"] for record in mine]
        axes.bar(xs, means, width=0.36, label=_TEXTS.get(text, text), **style.bar(index))
        ends = ([record[f"{name}_{end}"] for record in mine] for end in ("low", "high"))
        axes.errorbar(xs, means, yerr=style.errors(means, *ends), color="black", linestyle="none", capsize=2.5,
                      elinewidth=1)  # fmt: skip
    names = {"expert": "fallback"} if len(texts) > 1 else {}
    ticks = [names.get(group, group) + (f"\n{label}" if len(labels) > 1 else "") for label, group in groups]
    axes.set_xticks(range(len(groups)), ticks)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.grid(False, axis="x")
    axes.set_ylabel(y_label)
    if len(texts) > 1:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _file(path: Path) -> Path:
    return path / "statistics.json" if path.is_dir() else path


def _values(found: Mapping[str, Any], problems: int, path: Path) -> dict[str, Any]:
    record: dict[str, Any] = {"rows": found.get("rows"), "tokens": found.get("tokens")}
    for name, _ in _PER.values():
        try:
            estimate = from_error(float(found[name]["mean"]), found[name]["se"], problems)
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path} lacks {name!r} of a stage or origin; score the rows again") from None
        record |= {f"{name}_{end}": getattr(estimate, end) for end in ("mean", "low", "high")}
    return record


def _table(records: Sequence[Mapping[str, Any]], name: str) -> Table:
    rows = []
    for record in records:
        values = (record[f"{name}_{end}"] for end in ("mean", "low", "high"))
        found = Estimate(*values, record["problems"], "problems")
        value = found.text(4 if name == "per_token" else 2)
        rows.append([record["label"], record["group"], record["text"], str(record["problems"]), value])
    return Table(["model", "stage or origin", "text", "problems", "mean (95% interval)"], rows)
