"""``verl-dft data check``: what is wrong with a benchmark before a model is measured on it.

Lists golds that are empty, damaged or do not grade as correct against themselves, questions that occur more than once,
and questions that the training data holds. All of these are facts about the data, none an error of the command.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_dft.data import tables
from verl_dft.errors import InputError

if TYPE_CHECKING:
    from verl_dft.evaluation.benchmarks import Benchmark, BenchmarkProblem

_SHOWN = 8
"""Defective golds printed per benchmark; the JSON file has all."""
# "145solution:" and "Solution is: x = 1", but not "No solution" or "3x^2"
_GLUED = re.compile(r"(?<![\\A-Za-z{])\d[A-Za-z]{4,}|:\s*$")
_LABELLED = re.compile(r"\s*(?:the\s+)?(?:general\s+)?(?:solution|answer)s?\s*(?:is|are)?\s*:", re.IGNORECASE)
_NOT_ALNUM = re.compile(r"\W+")


def main(argv: Sequence[str]) -> int:
    """``verl-dft data check [benchmark=NAME|all] [data_dir=…] [train=FILE]``: print a table, write ``check.json``.

    Returns 0 whatever is found.

    Raises:
        InputError: unknown benchmark, missing or unreadable file.
    """
    from omegaconf import OmegaConf

    from verl_dft.evaluation.benchmarks import load_benchmark
    from verl_dft.evaluation.command import expand_benchmarks, parse_list
    from verl_dft.files import write_json

    train_files = [file for item in argv if item.startswith("train=") for file in parse_list("train", item[6:])]
    argv = [item for item in argv if not item.startswith("train=")]
    everything = "benchmark=all" in argv or not any(item.startswith("benchmark=") for item in argv)
    if everything:
        argv = [f"benchmark=[{','.join(_all_benchmarks())}]", *(item for item in argv if item != "benchmark=all")]
    local = any(item.startswith("data_dir=") for item in argv)
    configs = expand_benchmarks(argv, need_files=not everything)
    if missing := [c.benchmark.name for c in configs if local and not c.benchmark.path and not c.benchmark.generator]:
        print(f"no file in data_dir: {', '.join(missing)}")
    configs = [config for config in configs if config.benchmark.name not in missing]
    if not configs:
        raise InputError("data_dir has no file of any benchmark; they are named NAME.jsonl, .jsonl.gz, .parquet")
    train = TrainQuestions(train_files) if train_files else None
    reports = []
    for config in configs:
        plain = OmegaConf.to_container(config, resolve=True)
        benchmark = load_benchmark(plain["benchmark"], plain["limit"])
        reports.append(check_benchmark(benchmark, train, plain["grading"]))
    print(format_reports(reports))
    path = Path(configs[0].output_dir or "runs/data_check", "check.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"train": train_files, "benchmarks": reports})
    print(f"written: {path}")
    return 0


def _all_benchmarks() -> list[str]:
    """Names of the shipped benchmarks that are read from somewhere: no suites, nothing generated, not ``file``."""
    from omegaconf import OmegaConf

    from verl_dft.config import group_options
    from verl_dft.paths import configs_dir

    folder = configs_dir() / "benchmark"
    return [name for name in group_options("benchmark") if "hub" in OmegaConf.load(folder / f"{name}.yaml")]


class TrainQuestions:
    """The questions of training files: ``problem`` or ``question`` columns, or the first user turn of ``messages``.

    Raises:
        InputError: a file cannot be read, or a row has no question.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        self.files = [Path(file).expanduser() for file in files]
        self.exact: dict[str, str] = {}
        self.alike: dict[str, str] = {}
        for file in self.files:
            for row, record in enumerate(tables.read_records(file)):
                question, where = _question(file, row, record), f"{file}: row {row}"
                self.exact.setdefault(question.strip(), where)
                self.alike.setdefault(letters_and_digits(question), where)

    def overlap(self, problems: Sequence[BenchmarkProblem]) -> list[dict[str, Any]]:
        """Problems that occur in the files: ``row``, ``id``, ``train`` (where) and whether the text is the same."""
        found = []
        for row, problem in enumerate(problems):
            exact = self.exact.get(problem.problem.strip())
            where = exact or self.alike.get(letters_and_digits(problem.problem))
            if where:
                found.append({"row": row, "id": problem.id, "train": where, "exact": exact is not None})
        return found


def _question(file: Path, row: int, record: Mapping[str, Any]) -> str:
    for name in ("problem", "question"):
        if isinstance(record.get(name), str):
            return record[name]
    for turn in record.get("messages") if isinstance(record.get("messages"), list) else ():
        if isinstance(turn, Mapping) and turn.get("role") == "user" and isinstance(turn.get("content"), str):
            return turn["content"]
    raise InputError(f"{file}: row {row}: no question (a column problem or question, or messages with a user turn)")


def letters_and_digits(text: str) -> str:
    """What is compared for "alike": letters and digits, lower case. Signs are lost, so that x+1 and x-1 are alike."""
    return _NOT_ALNUM.sub("", text).lower() or text.strip()


def check_benchmark(
    benchmark: Benchmark, train: TrainQuestions | None = None, grading: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Facts about a benchmark, rows counted from 0.

    Args:
        benchmark: as loaded.
        train: questions to look for; null in the report where the benchmark itself is the training file.
        grading: options of ``verl_dft.grading.GraderPool``.

    Returns:
        ``defects``: ``{row, id, gold, reason}``; ``duplicates`` and ``alike``: ``{row, id, first, same_gold}``, where
        ``first`` is the row that it repeats; ``overlap``: as :meth:`TrainQuestions.overlap`.
    """
    problems = benchmark.problems
    path = benchmark.origin.get("path")
    itself = train is not None and path is not None and Path(path).resolve() in {f.resolve() for f in train.files}
    return {
        "name": benchmark.name,
        "rows": len(problems),
        "licence": benchmark.origin.get("licence"),
        "origin": benchmark.origin,
        "defects": gold_defects(problems, grading),
        "duplicates": _repeats(problems, (problem.problem.strip() for problem in problems)),
        "alike": _repeats(problems, (letters_and_digits(problem.problem) for problem in problems)),
        "overlap": None if train is None or itself else train.overlap(problems),
    }


def gold_defects(
    problems: Sequence[BenchmarkProblem], grading: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Golds that are empty, not ``correct`` as a boxed answer of their own, or that carry text beside the answer."""
    from verl_dft.grading import GraderPool

    labels = [_LABELLED.match(problem.answer) for problem in problems]
    bare = [p.answer[label.end() :] if label else p.answer for p, label in zip(problems, labels, strict=True)]
    items = [_boxed(problem, problem.answer) for problem in problems]
    items += [_boxed(problem, value) for problem, value in zip(problems, bare, strict=True)]
    with GraderPool(**(grading or {})) as pool:
        grades = pool.grade(items)
    defects = []
    for row, problem in enumerate(problems):
        own, unlabelled = grades[row], grades[len(problems) + row]
        if not problem.answer.strip():
            reason = "empty"
        elif own.verdict != "correct":
            reason = f"graded {own.verdict} against itself ({own.rule})"
        elif _GLUED.search(problem.answer):
            reason = "text left over after the value"
        elif unlabelled.verdict != "correct":
            reason = f"a label that the answer must repeat: without it graded {unlabelled.verdict}"
        else:
            continue
        defects.append({"row": row, "id": problem.id, "gold": problem.answer, "reason": reason})
    return defects


def _boxed(problem: BenchmarkProblem, answer: str) -> Any:
    from verl_dft.grading import GradeItem

    return GradeItem(f"\\boxed{{{answer}}}", problem.answer, problem.answer_type, problem.tolerance)


def _repeats(problems: Sequence[BenchmarkProblem], keys: Iterable[str]) -> list[dict[str, Any]]:
    first: dict[str, int] = {}
    repeats = []
    for row, key in enumerate(keys):
        if (earlier := first.setdefault(key, row)) != row:
            same = problems[row].answer == problems[earlier].answer
            repeats.append({"row": row, "id": problems[row].id, "first": earlier, "same_gold": same})
    return repeats


def format_reports(reports: Sequence[Mapping[str, Any]]) -> str:
    """A table with a row per benchmark, then the defective golds."""
    header = ["benchmark", "rows", "defects", "duplicates", "other gold", "alike", "in train", "train alike", "licence"]
    rows = [header, *(_row(report) for report in reports)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    ends = (0, len(header) - 1)
    lines = []
    for row in rows:
        cells = [f"{cell:{'<' if i in ends else '>'}{widths[i]}}" for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    for report in reports:
        for defect in report["defects"][:_SHOWN]:
            gold = " ".join(defect["gold"].split())
            gold = gold if len(gold) <= 60 else gold[:59] + "…"
            lines.append(f"{report['name']} row {defect['row']}: {defect['reason']}: {gold!r}")
        if (more := len(report["defects"]) - _SHOWN) > 0:
            lines.append(f"{report['name']}: {more} more in check.json")
    return "\n".join(lines)


def _row(report: Mapping[str, Any]) -> list[str]:
    overlap = report["overlap"]
    found = ["-", "-"] if overlap is None else [str(sum(one["exact"] for one in overlap)), str(len(overlap))]
    return [
        report["name"],
        str(report["rows"]),
        str(len(report["defects"])),
        str(len(report["duplicates"])),
        str(sum(not one["same_gold"] for one in report["duplicates"])),
        str(len(report["alike"])),
        *found,
        str(report["licence"]),
    ]
