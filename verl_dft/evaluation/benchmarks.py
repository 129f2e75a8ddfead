"""Benchmarks: a YAML file each (``configs/benchmark/``), read from a hub, from a local copy, or generated.

Keys of a benchmark::

    name           how results name it
    path           local .jsonl, .jsonl.gz or .parquet file; overrides the hub
    hub            {name, config, split} of a Hugging Face data set
    generator      {name: arithmetic, num_problems, seed, level_weights} instead of a file
    columns        {id, problem, answer}: names to look for, first found wins
    answer_after   text after which the gold answer stands in its column ("####"), where it occurs
    answer_type    auto, number, latex, choice, text or multi (see verl_dft.grading); a file's own column wins
    prompt         named prompt (verl_dft.data.prompts)
    max_tokens     of a response
    limit          first so many problems; null: all
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_dft.data import tables
from verl_dft.errors import InputError
from verl_dft.grading.pool import ANSWER_TYPES

_OVERRIDE = "for a local copy give benchmark.path=FILE"


@dataclass(frozen=True)
class BenchmarkProblem:
    """A question with its gold answer. ``level`` where the benchmark has one."""

    id: str
    problem: str
    answer: str
    answer_type: str = "auto"
    level: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """A named set of problems and how to ask them. ``origin`` says where they came from, for the result file."""

    name: str
    problems: list[BenchmarkProblem]
    origin: dict[str, Any]


def load_benchmark(config: Mapping[str, Any], limit: int | None = None) -> Benchmark:
    """The benchmark a configuration describes, its first ``limit`` problems.

    Raises:
        InputError: missing file, hub failure, missing column, empty question, repeated id, wrong limit.
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
    return Benchmark(config["name"], problems, origin)


def _generate(generator: Mapping[str, Any]) -> list[BenchmarkProblem]:
    if generator["name"] != "arithmetic":
        raise InputError(f"benchmark.generator.name={generator['name']!r}: the only generator is arithmetic")
    from verl_dft.data.arithmetic import heldout_problems

    drawn = heldout_problems(generator["num_problems"], generator["seed"], tuple(generator["level_weights"]))
    return [BenchmarkProblem(p.id, p.problem, p.answer, "number", p.level) for p in drawn]


def _records(config: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from verl_dft.files import sha256_file

    if path := config.get("path"):
        if not Path(path).expanduser().is_file():
            raise InputError(f"benchmark file {path} does not exist; give benchmark.path=FILE (.jsonl or .parquet)")
        path = Path(path).expanduser()
        return tables.read_records(path), {"label": str(path), "path": str(path), "sha256": sha256_file(path)}
    hub = config.get("hub")
    if not hub:
        raise InputError(f"benchmark={config['name']} has no file; give benchmark.path=FILE (.jsonl or .parquet)")
    import datasets

    label = f"{hub['name']} ({hub['split']})"
    try:
        table = datasets.load_dataset(hub["name"], hub.get("config"), split=hub["split"])
    except Exception as error:  # the hub's client raises a dozen kinds, from no network to no such split
        detail = " ".join(str(error).split())[:160]
        raise InputError(
            f"benchmark {config['name']}: cannot load {label} from the hub: {detail}; {_OVERRIDE}"
        ) from None
    return table.to_list(), {"label": label, "hub": dict(hub), "fingerprint": table._fingerprint}


def _problem(config: Mapping[str, Any], label: str, index: int, record: Mapping[str, Any]) -> BenchmarkProblem:
    columns = config["columns"]
    question = _column(label, index, record, "problem", columns["problem"])
    answer = _column(label, index, record, "answer", columns["answer"])
    if mark := config.get("answer_after"):
        answer = answer.rpartition(mark)[2].strip()
    found = next((str(record[name]) for name in columns["id"] if record.get(name) is not None), None)
    answer_type = record.get("answer_type") or config["answer_type"]
    if answer_type not in ANSWER_TYPES:
        raise InputError(f"{label}: row {index}: answer_type {answer_type!r}; use one of {', '.join(ANSWER_TYPES)}")
    level = record.get("level")
    return BenchmarkProblem(
        found or f"{config['name']}/{index}", question, answer, answer_type, level if isinstance(level, int) else None
    )


def _column(label: str, index: int, record: Mapping[str, Any], what: str, names: Sequence[str]) -> str:
    for name in names:
        if record.get(name) is not None:
            return str(record[name])
    have = ", ".join(map(str, record)) or "none"
    raise InputError(
        f"{label}: row {index}: no {what} (looked for {', '.join(names)}; columns: {have}); "
        f"set benchmark.columns.{what}=[NAME]"
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
