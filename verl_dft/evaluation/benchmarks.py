"""Benchmarks: a YAML file each (``configs/benchmark/``), read from a hub, from a local copy, or generated.

The keys and their defaults are those of ``benchmark`` in ``configs/evaluate.yaml``; see ``docs/benchmarks.md``.
"""

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_dft.data import tables
from verl_dft.data.parsing import last_boxed
from verl_dft.errors import InputError
from verl_dft.grading.pool import ANSWER_TYPES

_OVERRIDE = "for a local copy give benchmark.path=FILE"


@dataclass(frozen=True)
class BenchmarkProblem:
    """A question with its gold answer. ``level`` where the benchmark has one; ``tolerance`` as in ``GradeItem``."""

    id: str
    problem: str
    answer: str
    answer_type: str = "auto"
    level: int | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """A named set of problems. ``origin`` says where they came from and under what licence, for the result file."""

    name: str
    problems: list[BenchmarkProblem]
    origin: dict[str, Any]


def load_benchmark(config: Mapping[str, Any], limit: int | None = None) -> Benchmark:
    """The benchmark a configuration describes, its first ``limit`` problems.

    Raises:
        InputError: missing file, hub failure, missing column, empty question, repeated id, wrong limit or tolerance.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}; it is the number of problems to evaluate, at least 1 (null: all)")
    if config.get("generator"):
        problems, origin = _generate(config["generator"]), {"generator": dict(config["generator"])}
    else:
        records, origin = _records(config)
        problems = [_problem(config, origin["label"], i, record) for i, record in enumerate(records)]
    problems = problems[:limit]
    _check(config["name"], problems)
    origin["licence"] = config.get("licence", "none stated")
    return Benchmark(config["name"], problems, origin)


def _generate(generator: Mapping[str, Any]) -> list[BenchmarkProblem]:
    if generator["name"] != "arithmetic":
        raise InputError(f"benchmark.generator.name={generator['name']!r}: the only generator is arithmetic")
    from verl_dft.data.arithmetic import heldout_problems

    drawn = heldout_problems(generator["num_problems"], generator["seed"], tuple(generator["level_weights"]))
    return [BenchmarkProblem(p.id, p.problem, p.answer, "number", p.level) for p in drawn]


def local_file(config: Mapping[str, Any], folder: str | Path) -> Path | None:
    """The benchmark's file in ``folder``: ``file`` or ``name`` with .jsonl, .jsonl.gz or .parquet; None without one.

    Raises:
        InputError: the folder does not exist.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"data_dir={folder} is not a folder; give the one with the benchmarks' files")
    stems = [stem for stem in (config.get("file"), config["name"]) if stem]
    paths = (folder / f"{stem}{suffix}" for stem in stems for suffix in (".jsonl", ".jsonl.gz", ".parquet"))
    return next((path for path in paths if path.is_file()), None)


def _records(config: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from verl_dft.files import sha256_file

    if path := config.get("path"):
        if not Path(path).expanduser().is_file():
            raise InputError(f"benchmark file {path} does not exist; give benchmark.path=FILE (.jsonl or .parquet)")
        path = Path(path).expanduser()
        return tables.read_records(path), {"label": str(path), "path": str(path), "sha256": sha256_file(path)}
    if not (hub := config.get("hub")):
        raise InputError(f"benchmark={config['name']} has no file; give benchmark.path=FILE (.jsonl or .parquet)")
    return _from_hub(config["name"], hub)


def _from_hub(name: str, hub: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    import datasets

    label = f"{hub.get('files') or hub['name']} ({hub['split']})"
    configs = hub.get("config")
    options = {"split": hub["split"]} | ({"data_files": hub["files"]} if hub.get("files") else {})
    try:
        parts = [
            datasets.load_dataset(hub["name"], one, **options)
            for one in (configs if isinstance(configs, list | tuple) else [configs])
        ]
    except Exception as error:  # the hub's client raises a dozen kinds, from no network to no such split
        detail = " ".join(str(error).split())[:160]
        raise InputError(f"benchmark {name}: cannot load {label} from the hub: {detail}; {_OVERRIDE}") from None
    records = [record for part in parts for record in part.to_list()]
    return records, {"label": label, "hub": dict(hub), "fingerprint": "-".join(part._fingerprint for part in parts)}


def _problem(config: Mapping[str, Any], label: str, index: int, record: Mapping[str, Any]) -> BenchmarkProblem:
    columns = config["columns"]
    where = f"{label}: row {index}"
    rewrite = config.get("rewrite") or {}
    question = _rewritten(_column(where, record, "problem", columns["problem"]), rewrite.get("problem") or ())
    answer_type = _find(record, columns.get("answer_type", ["answer_type"])) or config["answer_type"]
    if answer_type not in ANSWER_TYPES:
        raise InputError(f"{where}: answer_type {answer_type!r}; use one of {', '.join(ANSWER_TYPES)}")
    found = _find(record, columns["id"])
    level = re.fullmatch(r"(?:Level )?(\d+)", _find(record, ["level"]) or "")
    return BenchmarkProblem(
        id=f"{config['name']}/{index}" if found is None else found,
        problem=question,
        answer=_gold(config, where, record, answer_type),
        answer_type=answer_type,
        level=int(level[1]) if level else None,
        tolerance=_tolerance(where, _find(record, columns.get("tolerance", ["tolerance"]))),
    )


def _gold(config: Mapping[str, Any], where: str, record: Mapping[str, Any], answer_type: str) -> str:
    names = config["columns"]["answer"]
    if answer_type == "choice":
        raw = next((record[name] for name in names if record.get(name) is not None), None)
        if isinstance(raw, int) and not isinstance(raw, bool):  # the number of an option, from 0
            return string.ascii_uppercase[raw]
    answer = _column(where, record, "answer", names)
    if config.get("answer_boxed"):
        answer = last_boxed(answer) if "\\boxed" in answer or "\\fbox" in answer else answer
    if mark := config.get("answer_after"):
        answer = answer.rpartition(mark)[2].strip()
    return _rewritten(answer, (config.get("rewrite") or {}).get("answer") or ())


def _rewritten(text: str, pairs: Sequence[Sequence[str]]) -> str:
    if not pairs:
        return text
    for pattern, replacement in pairs:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def _tolerance(where: str, text: str | None) -> float | None:
    if not text or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"{where}: tolerance {text!r}; it must be a number of at least 0")
    return value


class _Options(list):
    """A column's list: ``{column}`` in a template gives ``(A) first (B) second``, ``{column!r}`` the list itself."""

    def __format__(self, spec: str) -> str:
        pairs = zip(string.ascii_uppercase, self, strict=False)
        return " ".join(f"({letter}) {str(option).strip()}" for letter, option in pairs)


def _find(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of ``names`` that the record has, as text. A name with braces is a template of columns."""
    for name in names:
        if "{" in name:
            fields = [field for _, field, _, _ in string.Formatter().parse(name) if field]
            if all(record.get(field) not in (None, "", []) for field in fields):
                values = {field: record[field] for field in fields}
                return name.format(**{k: _Options(v) if isinstance(v, list) else _text(v) for k, v in values.items()})
        elif record.get(name) is not None:
            return _text(record[name], strip=False)
    return None


def _text(value: Any, strip: bool = True) -> str:
    """Numbers that are whole without ``.0``, lists joined by commas."""
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return text.strip() if strip else text


def _column(where: str, record: Mapping[str, Any], what: str, names: Sequence[str]) -> str:
    if (found := _find(record, names)) is not None:
        return found
    have = ", ".join(map(str, record)) or "none"
    raise InputError(
        f"{where}: no {what} (looked for {', '.join(names)}; columns: {have}); set benchmark.columns.{what}=[NAME]"
    )


def _check(name: str, problems: Sequence[BenchmarkProblem]) -> None:
    if not problems:
        raise InputError(f"benchmark {name} has no problems")
    seen: dict[str, int] = {}
    for index, problem in enumerate(problems):
        if not problem.problem.strip():
            raise InputError(f"benchmark {name}: row {index} ({problem.id}) has an empty question")
        if problem.id in seen:
            raise InputError(f"benchmark {name}: id {problem.id!r} is in rows {seen[problem.id]} and {index}")
        seen[problem.id] = index
