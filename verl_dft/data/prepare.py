"""From a data configuration to row files: made once, then reused while configuration and inputs stay the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_dft.data import tables
from verl_dft.data.prompts import get_prompt, render_messages
from verl_dft.data.records import Problem, Row, write_problems, write_rows
from verl_dft.data.sources import ProblemSet, load_problem_set
from verl_dft.errors import InputError
from verl_dft.files import sha256_file
from verl_dft.redact import redacted_values

_STYLE_ORIGIN = {"native": "self", "teacher": "teacher", "expert": "expert"}


@dataclass
class PreparedRows:
    """Row files for training and validation (none where the configuration asks for none), and what was done."""

    train: list[Path]
    val: list[Path]
    report: dict[str, Any] = field(default_factory=dict)


def prepare_rows(data: Mapping[str, Any], out_dir: str | Path, *, problems_file: bool = False) -> PreparedRows:
    """Row files of a data configuration.

    ``data.train_files`` (with ``data.val_files``) wins over ``data.source``: files with a ``messages`` column are used
    where they are, files of problems are converted. Otherwise ``train.parquet`` and ``val.parquet`` are made from
    ``data.source`` in ``out_dir``, each with a manifest; a later call with the same source, prompt and input files
    reuses them.

    Args:
        data: keys ``train_files, val_files, source, prompt`` (others are ignored).
        out_dir: where files are written, under a lock (several processes may call this at once).
        problems_file: also write ``problems.jsonl``, the training problems.

    Raises:
        InputError: neither files nor a source, or whatever the source, prompt or files are refused for.
    """
    from filelock import FileLock

    data, out_dir = _plain(data), Path(out_dir).expanduser()
    get_prompt(data["prompt"])
    out_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(out_dir / ".prepare.lock"):
        if data["train_files"]:
            return _given(data, out_dir)
        if not data["source"]:
            raise InputError("no training data: set data=NAME (see verl-dft data list) or data.train_files=FILE")
        return _from_source(data, out_dir, problems_file)


def rows_of(problems: Sequence[Problem], prompt: str, origin: str = "expert") -> list[Row]:
    """A row per problem: the prompt's turns, then the problem's solution.

    Raises:
        InputError: a problem without a solution.
    """
    rows = []
    for problem in problems:
        if not (problem.solution or "").strip():
            raise InputError(
                f"problem {problem.id!r} has no solution to train on; give its file a solution column "
                "(data.source.solution_key) or make rows with verl-dft sample and reject"
            )
        turns = render_messages(prompt, problem.problem)
        rows.append(Row([*turns, {"role": "assistant", "content": problem.solution}], problem.id, origin))
    return rows


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    from omegaconf import DictConfig, OmegaConf

    found: Any = OmegaConf.to_container(data, resolve=True) if isinstance(data, DictConfig) else dict(data)
    plain = {"source": None, "prompt": "raw", **{k: v for k, v in found.items() if v is not None}}
    for key in ("train_files", "val_files"):
        files = plain.get(key) or []
        plain[key] = [files] if isinstance(files, str | Path) else list(files)
    return plain


# ---- files given ----


def _given(data: dict[str, Any], out_dir: Path) -> PreparedRows:
    report: dict[str, Any] = {"source": "files"}
    found = {}
    for key in ("train_files", "val_files"):
        found[key] = [_as_rows(Path(f).expanduser(), data, out_dir, report) for f in data[key]]
    return PreparedRows(found["train_files"], found["val_files"], report)


def _as_rows(path: Path, data: dict[str, Any], out_dir: Path, report: dict[str, Any]) -> Path:
    columns = tables.columns_of(path)
    if "messages" in columns:
        return path
    keys = {k: v for k, v in (data["source"] or {}).items() if k.endswith("_key")}
    if keys.get("problem_key", "problem") not in columns:
        raise InputError(
            f"{path}: no column 'messages' (training rows) and none called {keys.get('problem_key', 'problem')!r} "
            f"(problems); it has {', '.join(sorted(columns))}; rename one, or set data.source.problem_key=NAME"
        )
    source = {"name": "files", "path": str(path), "subset": "first_n", **keys}
    made = _from_source(
        {**data, "source": source}, out_dir / f"{path.name.split('.')[0]}-{sha256_file(path)[:8]}", False
    )
    report[str(path)] = made.report
    return made.train[0]


# ---- made from a source ----


def _from_source(data: dict[str, Any], out_dir: Path, problems_file: bool) -> PreparedRows:
    source = data["source"]
    paths = {part: out_dir / f"{part}.parquet" for part in ("train", "val")}
    request = _request(data)
    reused = _reusable(paths, request)
    if reused is not None and (not problems_file or (out_dir / "problems.jsonl").is_file()):
        return PreparedRows(
            [paths["train"]], [paths["val"]] if paths["val"].is_file() else [], {**reused, "reused": True}
        )
    rows, problems = _make(data)
    report = {"source": source["name"], **problems.report, "num_train": len(rows["train"]), "num_val": len(rows["val"])}
    facts = {"inputs": problems.inputs, "seed": source.get("seed"), "request": request, "report": report}
    if problems_file and problems.train:
        write_problems(out_dir / "problems.jsonl", problems.train)
    if rows["val"]:
        write_rows(paths["val"], rows["val"], **facts)
    else:
        for stale in (paths["val"], Path(f"{paths['val']}.manifest.json")):
            stale.unlink(missing_ok=True)
    write_rows(paths["train"], rows["train"], **facts)  # last: its manifest says that all is done
    return PreparedRows([paths["train"]], [paths["val"]] if rows["val"] else [], {**report, "reused": False})


def _make(data: dict[str, Any]) -> tuple[dict[str, list[Row]], ProblemSet]:
    source = data["source"]
    if source["name"] == "arithmetic_pretrain":
        return _pretraining(source), ProblemSet([], [])
    problems = load_problem_set(source)
    origin = _STYLE_ORIGIN.get(source.get("style", "expert"), "expert")
    parts = {"train": problems.train, "val": problems.val}
    return {part: rows_of(found, data["prompt"], origin) for part, found in parts.items()}, problems


def _pretraining(source: Mapping[str, Any]) -> dict[str, list[Row]]:
    from verl_dft.data.arithmetic import Slips, pretraining_rows

    options = {k: v for k, v in source.items() if k not in ("name", "num_rows", "num_val", "seed", "slips")}
    slips = source.get("slips", {})
    try:
        options["slips"] = None if slips is None else Slips(**slips)
        parts = {"train": source["num_rows"], "val": source.get("num_val") or 0}
        return {part: pretraining_rows(num, source["seed"], split=part, **options) for part, num in parts.items()}
    except (TypeError, KeyError) as error:
        raise InputError(
            f"data.source (arithmetic_pretrain): {error}; see configs/data/arithmetic_pretrain.yaml"
        ) from None


def _request(data: dict[str, Any]) -> dict[str, Any]:
    """Everything the rows depend on, as JSON values."""
    from verl_dft import __version__

    source = data["source"]
    path = source.get("path")
    files = [path] if isinstance(path, str | Path) else list(path or [])
    for file in files:
        if not Path(file).expanduser().is_file():
            raise InputError(f"{file} does not exist; data.source.path must be a .jsonl, .jsonl.gz or .parquet file")
    hashes = [sha256_file(Path(file).expanduser()) for file in files]
    request = {"source": source, "prompt": data["prompt"], "files": hashes, "version": __version__}
    return redacted_values(request)


def _reusable(paths: Mapping[str, Path], request: dict[str, Any]) -> dict[str, Any] | None:
    """The report of the files at ``paths`` if they were made for this very request and are still what was written."""
    report = None
    for part in ("train", "val"):
        manifest = Path(f"{paths[part]}.manifest.json")
        if part == "val" and report is not None and not report["num_val"]:
            return report
        try:
            facts = json.loads(manifest.read_text(encoding="utf-8"))
            same = facts["request"] == request and facts["rows_sha256"] == sha256_file(paths[part])
        except (OSError, ValueError, KeyError):
            return None
        if not same:
            return None
        report = facts["report"]
    return report
