"""The labelled cases and every benchmark's golds. Both need the shared material."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from verl_dft.grading import Grade, GradeItem, grade_batch

# Rows whose gold is empty: a benchmark's own defect, which only an error can report.
DEFECTIVE = [
    ("gaokao2023en.jsonl", 167), ("gaokao2023en.jsonl", 192),
    ("math_train.jsonl.gz", 5341), ("math_train.jsonl.gz", 5343),
]  # fmt: skip
LENIENT_KINDS = {"num_x100", "num_div100", "num_off_rel5e-5"}


def _lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def graded(shared_dir: Path) -> list[tuple[dict[str, Any], Grade]]:
    cases = _lines(shared_dir / "data" / "grading" / "cases.jsonl")
    return list(zip(cases, grade_batch([GradeItem(c["response"], c["gold"]) for c in cases], 2), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_at_most_one_percent_of_labelled_cases_is_wrong(graded: list[tuple[dict[str, Any], Grade]], half: int) -> None:
    """In each half, split by a hash of the gold."""
    mine = [(case, grade) for case, grade in graded if zlib.crc32(case["gold"].encode()) % 2 == half]
    wrong = [
        (case["kind"], case["gold"], grade) for case, grade in mine if (grade.verdict == "correct") != case["expected"]
    ]
    assert len(mine) > 1000 and len(wrong) <= len(mine) / 100, wrong


@pytest.mark.slow
def test_the_qwen_verdict_accepts_what_that_harness_is_known_to(graded: list[tuple[dict[str, Any], Grade]]) -> None:
    """Factors of 100, 5e-5 off and swapped ends pass there (grading notes); other wrong answers do not."""
    lenient = [(case, grade) for case, grade in graded if case["kind"] in LENIENT_KINDS]
    assert len(lenient) == 120
    assert all(grade.verdict == "wrong" and grade.qwen == "correct" for _, grade in lenient)
    flipped = [grade for case, grade in graded if case["kind"] == "r2_interval_flip_right"]
    assert flipped and all((grade.verdict, grade.qwen) == ("wrong", "correct") for grade in flipped)
    assert all(grade.qwen != "correct" for case, grade in graded if case["kind"] == "num_negated")


def test_every_gold_is_correct_against_itself(shared_dir: Path) -> None:
    """All 33,210 of them, under their own answer type; those that are not are the defective ones."""
    failed, count = [], 0
    for path in sorted((shared_dir / "data" / "benchmarks").glob("*.jsonl*")):
        rows = _lines(path)
        grades = grade_batch([GradeItem(rf"\boxed{{{r['answer']}}}", r["answer"], r["answer_type"]) for r in rows], 2)
        count += len(rows)
        failed += [(path.name, number) for number, grade in enumerate(grades) if grade.verdict != "correct"]
    assert count > 33_000 and failed == DEFECTIVE
