"""``verl-dft data check``: what it finds in made-up sets, and the known facts of the real ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from verl_dft.data.check import TrainQuestions, check_benchmark, format_reports, letters_and_digits, main
from verl_dft.errors import InputError
from verl_dft.evaluation.benchmarks import Benchmark, BenchmarkProblem


def _jsonl(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _check(*golds: str, answer_type: str = "latex") -> list[dict[str, Any]]:
    problems = [BenchmarkProblem(str(i), f"question {i}", gold, answer_type) for i, gold in enumerate(golds)]
    return check_benchmark(Benchmark("b", problems, {}), grading={"num_workers": 1})["defects"]


def test_defective_golds_are_told_from_sound_ones() -> None:
    found = _check(
        "", "145solution:", "No solution", "3x^2", "Solution is: [x=1, y=2]", "Solution is: k=4.", " ", "12 cm"
    )
    assert [(defect["row"], defect["reason"]) for defect in found] == [
        (0, "empty"),
        (1, "text left over after the value"),
        (4, "a label that the answer must repeat: without it graded wrong"),
        (6, "empty"),
    ]


def test_a_gold_that_the_grader_refuses_is_a_defect() -> None:
    (found,) = _check("\\frac{1}{2", "2")  # cut off, so that the box around it never closes
    assert found["row"] == 0 and found["reason"].startswith("graded ") and "against itself" in found["reason"]


def test_repeats_name_the_first_row_and_whether_the_gold_is_the_same() -> None:
    texts = [("What is 1+1?", "2"), ("other", "2"), ("What is 1+1?", "3"), ("what is 1 + 1", "2"), (" other ", "2")]
    problems = [BenchmarkProblem(str(i), text, gold) for i, (text, gold) in enumerate(texts)]
    report = check_benchmark(Benchmark("b", problems, {}), grading={"num_workers": 1})
    assert [(r["row"], r["first"], r["same_gold"]) for r in report["duplicates"]] == [(2, 0, False), (4, 1, True)]
    assert [(r["row"], r["first"]) for r in report["alike"]] == [(2, 0), (3, 0), (4, 1)]
    assert report["overlap"] is None


def test_letters_and_digits_never_make_different_signs_equal_alone() -> None:
    assert letters_and_digits("X + 1!") == letters_and_digits("x-1") == "x1"
    assert letters_and_digits("+") != letters_and_digits("-")  # nothing left: the text itself


def test_overlap_with_training_files(tmp_path: Path) -> None:
    rows = _jsonl(tmp_path / "rows.jsonl", {"messages": [{"role": "system", "content": "s"},
                                                         {"role": "user", "content": "Q one?"}]})  # fmt: skip
    files = [rows, _jsonl(tmp_path / "problems.jsonl", {"question": "other"}, {"problem": "Q two ?"})]
    problems = [BenchmarkProblem(str(i), text, "1") for i, text in enumerate(["q", "Q one?", "q TWO"])]
    assert TrainQuestions(files).overlap(problems) == [
        {"row": 1, "id": "1", "train": f"{files[0]}: row 0", "exact": True},
        {"row": 2, "id": "2", "train": f"{files[1]}: row 1", "exact": False},
    ]
    with pytest.raises(InputError, match="row 0: no question"):
        TrainQuestions([_jsonl(tmp_path / "bad.jsonl", {"text": "q"})])


def test_a_set_is_not_compared_with_itself(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "b.jsonl", {"problem": "q", "answer": "1"})
    benchmark = Benchmark("b", [BenchmarkProblem("0", "q", "1")], {"path": str(path)})
    assert check_benchmark(benchmark, TrainQuestions([path]))["overlap"] is None


def test_the_table_counts_and_cuts() -> None:
    defects = [{"row": i, "id": str(i), "gold": "x" * 80, "reason": "empty"} for i in range(10)]
    repeat = {"row": 1, "id": "1", "first": 0, "same_gold": False}
    report = {"name": "b", "rows": 20, "licence": "MIT", "defects": defects, "duplicates": [repeat],
              "alike": [repeat] * 3, "overlap": [{"exact": True}, {"exact": False}]}  # fmt: skip
    lines = format_reports([report]).splitlines()
    assert lines[2].split() == ["b", "20", "10", "1", "1", "3", "1", "2", "MIT"]
    assert lines[3] == f"b row 0: empty: {'x' * 59 + '…'!r}" and lines[-1] == "b: 2 more in check.json"


@pytest.mark.slow
def test_command_writes_what_it_found(tmp_path: Path, run_cli: Callable) -> None:
    _jsonl(tmp_path / "aime24.jsonl", {"problem": "q", "answer": "1"}, {"problem": "r", "answer": ""})
    train = _jsonl(tmp_path / "train.jsonl", {"problem": "Q!"})
    argv = [f"data_dir={tmp_path}", f"train={train}", f"output_dir={tmp_path / 'out'}", "grading.num_workers=1"]
    done = run_cli(["data", "check", *argv])
    assert done.rc == 0, done.stderr
    assert "no file in data_dir: amc23, " in done.stdout and "aime24 row 1: empty: ''" in done.stdout
    (report,) = json.loads((tmp_path / "out" / "check.json").read_text())["benchmarks"]
    assert (report["name"], report["rows"], len(report["overlap"])) == ("aime24", 2, 1)
    missing = run_cli(["data", "check", "benchmark=dft", *argv])
    assert missing.rc == 2 and "has no math500.jsonl" in missing.stderr


def test_bad_input(tmp_path: Path) -> None:
    for argv, message in (
        (["benchmark=no_such"], "no option 'no_such'"),
        ([f"data_dir={tmp_path}"], "no file of any benchmark"),
        ([f"data_dir={tmp_path}", "benchmark=aime24"], "has no aime24.jsonl"),
        (["benchmark=arithmetic", "train=nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            main(argv)


@pytest.mark.slow
def test_known_facts_of_the_real_sets(shared_dir: Path, tmp_path: Path) -> None:
    """All golds grade as correct in a box but the empty ones; repeats and overlaps are as counted by other means."""
    folder = shared_dir / "data" / "benchmarks"
    train = folder / "math_train.jsonl.gz"
    assert main([f"data_dir={folder}", f"train={train}", f"output_dir={tmp_path}", "grading.num_workers=1"]) == 0
    reports = {report["name"]: report for report in json.loads((tmp_path / "check.json").read_text())["benchmarks"]}
    assert sum(report["rows"] for report in reports.values()) == 33_210
    defects = {(name, d["row"]): d["reason"] for name, report in reports.items() for d in report["defects"]}
    labels = {where for where, reason in defects.items() if "label" in reason}
    assert len(labels) == 36 and {name for name, _ in labels} == {"college_math"}
    assert {where: defects[where] for where in defects.keys() - labels} == {
        ("gaokao2023en", 107): "text left over after the value",
        ("gaokao2023en", 167): "empty",
        ("gaokao2023en", 192): "empty",
        ("math_train", 5341): "empty",
        ("math_train", 5343): "empty",
    }
    duplicates = {name: len(report["duplicates"]) for name, report in reports.items() if report["duplicates"]}
    assert duplicates == {"mawps": 84, "college_math": 36, "mmlu_stem": 12}
    overlap = {name: len(report["overlap"]) for name, report in reports.items() if report["overlap"]}
    assert overlap == {"math500": 1, "olympiadbench": 2, "math": 11, "college_math": 1}
    assert reports["math_train"]["overlap"] is None
