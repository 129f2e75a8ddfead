"""What the demo shows in the end: one table, one picture of the training curves, one page that stands alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_dft.data.tables import read_parquet
from verl_dft.files import atomic_write, sha256_file, versions, write_json
from verl_dft.provenance import hardware, now, relative, typed
from verl_dft.report import html
from verl_dft.report.plots import training_curves
from verl_dft.report.tables import Table, comparison_table
from verl_dft.steps import Step

MODELS = {"base": "base", "sft": "SFT", "dft": "DFT"}
"""Evaluation folder -> name in the table."""
_NOTE = (
    "avg@n is the share of correct samples at temperature 1. Intervals are over problems (samples of one problem count "
    "as one), differences are taken problem by problem. They say nothing about the spread between training seeds: each "
    "method was trained once. This world is a check of the machinery, not of the papers' claims."
)
_NUM_SHOWN = 4


def write_report(
    root: Path, config: Mapping[str, Any], steps: Sequence[Step], records: Mapping[str, Mapping[str, Any]]
) -> str:
    """Write ``table.md``, ``curves.png``, ``summary.json``, ``index.html`` in ``root``; returns the text to print."""
    results = {
        shown: json.loads((root / "evaluation" / name / "result.json").read_text()) for name, shown in MODELS.items()
    }
    table = comparison_table(results, against=("base", "SFT"))
    with atomic_write(root / "table.md") as file:
        file.write(f"{table.markdown()}\n\n{_NOTE}\n")
    curves = training_curves({"SFT": root / "sft" / "metrics.jsonl", "DFT": root / "dft" / "metrics.jsonl"},
                             root / "curves.png")  # fmt: skip
    facts = provenance(root, config, steps, records, results)
    write_json(root / "summary.json", {"table": {"header": table.header, "rows": table.rows}, **facts})
    with atomic_write(root / "index.html") as file:
        file.write(html.page("verl_dft demo: SFT and DFT from one base", _parts(root, table, curves, facts, results)))
    seconds = sum(record["seconds"] for record in records.values() if not record["reused"])
    reused = sum(bool(record["reused"]) for record in records.values())
    stages = f"{len(records) - reused} stages run ({seconds:.0f} s of work), {reused} reused"
    return f"\n{table.text()}\n\n{stages}\npage: {root / 'index.html'}   curves: {curves}   table: {root / 'table.md'}"


def provenance(
    root: Path,
    config: Mapping[str, Any],
    steps: Sequence[Step],
    records: Mapping[str, Mapping[str, Any]],
    results: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Commands, seconds, versions, hashes, seeds and hardware behind the numbers."""
    hashes = {path: digest for record in records.values() for path, digest in record["inputs"].items()}
    hashes |= {path: digest for record in records.values() for path, digest in record["outputs"].items()}
    models = {name: result["model"] for name, result in results.items()}
    return {
        "config": config,
        "commands": {step.name: typed(records[step.name]["command"]) for step in steps},
        "seconds": {step.name: records[step.name]["seconds"] for step in steps},
        "models": models,
        "model_sha256": {name: sha256_file(Path(model) / "model.safetensors") for name, model in models.items()},
        "sha256": {relative(path, root): digest for path, digest in hashes.items()},
        "versions": versions(),
        "seeds": {"training order": config["seed"], "samples": config["seed"], "problems": _generator(results)},
        "hardware": f"{hardware()}, {_device(results)}",
        "written_at": now(),
    }


def _generator(results: Mapping[str, Mapping[str, Any]]) -> Any:
    return next(iter(results.values()))["origin"]["generator"]["seed"]


def _device(results: Mapping[str, Mapping[str, Any]]) -> str:
    engine = next(iter(results.values()))["engine"]
    return f"sampled in {engine['dtype']} on a {engine['device'].upper()}"


def _parts(
    root: Path, table: Table, curves: Path, facts: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    first = next(iter(results.values()))
    yield html.paragraph(
        f"{first['num_problems']} held-out problems of the tiny world, {first['n']} samples of each with vLLM. SFT and "
        "DFT start from the same base and read the same demonstrations in the same order."
    )
    yield html.table(table)
    yield html.paragraph(_NOTE)
    yield html.heading("Training")
    yield html.image(curves, "loss, negative log-likelihood and token weight by step, of SFT and DFT")
    yield html.heading("Samples")
    yield from _samples(root)
    yield html.heading("Where the numbers come from")
    yield html.facts(
        {"hardware": facts["hardware"], "written at": facts["written_at"]}
        | {f"seed of {name}": seed for name, seed in facts["seeds"].items()}
        | {f"version of {name}": version for name, version in facts["versions"].items()}
        | {f"weights of {name} (SHA-256)": digest for name, digest in facts["model_sha256"].items()}
    )
    yield html.heading("Commands", 3)
    yield html.preformatted("\n".join(f"# {facts['seconds'][k]} s\n{v}" for k, v in facts["commands"].items()))
    yield html.heading("Files", 3)
    yield html.preformatted("\n".join(f"{digest}  {path}" for path, digest in sorted(facts["sha256"].items())))


def _samples(root: Path) -> Iterator[str]:
    """The first sample of some problems, by each model, with its verdict: the same numbers, so no choice is made."""
    questions = _questions(root)
    by_model = {
        shown: [row for row in read_parquet(root / "evaluation" / name / "samples.parquet").to_pylist()
                if row["index"] == 0]
        for name, shown in MODELS.items()
    }  # fmt: skip
    rows = by_model["base"]
    stride = max(1, len(rows) // _NUM_SHOWN)
    for position in range(0, stride * min(_NUM_SHOWN, len(rows)), stride):
        problem_id = rows[position]["problem_id"]
        yield html.heading(f"{problem_id} (answer {rows[position]['gold']})", 3)
        yield html.preformatted(questions.get(problem_id, ""))
        for shown, samples in by_model.items():
            sample = samples[position]
            assert sample["problem_id"] == problem_id
            kind = sample["grade"] if sample["grade"] in ("correct", "wrong") else "other"
            yield html.preformatted(f"{shown} ({sample['grade']}): {sample['response']}", kind)


def _questions(root: Path) -> dict[str, str]:
    from verl_dft.data.arithmetic import heldout_problems

    config = json.loads((root / "evaluation" / "base" / "config.json").read_text())["benchmark"]["generator"]
    problems = heldout_problems(config["num_problems"], config["seed"], tuple(config["level_weights"]))
    return {problem.id: problem.problem for problem in problems}
