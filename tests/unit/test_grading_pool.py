"""The pool of killable workers: whatever one item does, every other item keeps its verdict."""

import json
import os
import random
import threading
from pathlib import Path

import pytest

from verl_dft.grading import GradeItem, GraderPool, grade_batch

# Verifies like a worker that some inputs hang, kill, bloat or break. Answers are letters so that no quick rule applies.
_HOSTILE = r"""
import os, time
def verify(answer, gold, answer_type):
    if answer == "h+h": time.sleep(1000)
    if answer == "d+d": os._exit(7)
    if answer == "m+m": bytearray(8 << 30)
    if answer == "e+e": raise RecursionError("deep")
    if answer == "p+p": print("noise on stdout", flush=True)
    if answer == "o+p" and not os.path.exists(os.environ["MARK"]):
        open(os.environ["MARK"], "w").close()
        os.kill(os.getpid(), 9)
    with open(os.environ["LOG"], "a") as log: log.write(answer + "\n")
    return answer == gold[::-1], "reversed"
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GraderPool:
    (tmp_path / "hostile_verify.py").write_text(_HOSTILE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    with GraderPool(2, timeout_s=1.0, memory_mb=1024, verify="hostile_verify:verify") as made:
        yield made


def _item(answer: str, gold: str = "b+a") -> GradeItem:
    return GradeItem(rf"\boxed{{{answer}}}", gold)


def test_hostile_items_cost_only_themselves(pool: GraderPool) -> None:
    """Hanging, dying, memory and exceptions are verdicts; good items before, between and after are graded."""
    answers = ["a+b", "h+h", "b+b", "d+d", "a+b", "m+m", "c+c", "e+e", "p+p", "o+p", "a+b"]
    verdicts = [grade.verdict for grade in pool.grade([_item(answer) for answer in answers])]
    assert verdicts == [
        "correct", "timeout", "wrong", "error", "correct", "error", "wrong", "error", "wrong", "wrong", "correct",
    ]  # fmt: skip


def test_details_say_why(pool: GraderPool) -> None:
    died, memory, deep = pool.grade([_item("d+d"), _item("m+m"), _item("e+e")])
    assert died.rule == "worker_died" and "status 7" in died.detail
    assert "1024 MB" in memory.detail and "RecursionError: deep" in deep.detail


def test_pool_is_rebuilt_and_right_afterwards(pool: GraderPool) -> None:
    pool.grade([_item("d+d"), _item("h+h")])
    started = pool.num_started
    again = pool.grade([_item("a+b"), _item("b+b")])
    assert [grade.verdict for grade in again] == ["correct", "wrong"]
    assert pool.num_started > started >= 3


def test_a_worker_killed_from_outside_costs_a_retry(pool: GraderPool) -> None:
    """The first try is killed by a signal; the second, in a new process, gives the verdict."""
    (grade,) = pool.grade([_item("o+p", gold="p+o")])
    assert grade.verdict == "correct" and pool.num_started == 2


def test_identical_pairs_are_verified_once(pool: GraderPool) -> None:
    grades = pool.grade([_item("a+b")] * 50 + [_item("a+b", "c+d")] * 50)
    assert [g.verdict for g in grades] == ["correct"] * 50 + ["wrong"] * 50
    logged = Path(os.environ["LOG"]).read_text().split()
    assert logged.count("a+b") == 2


def test_nothing_is_silently_wrong(pool: GraderPool) -> None:
    """No answer, and a gold that says nothing, are verdicts of their own; easy items start no process."""
    grades = pool.grade([GradeItem("dunno", "1"), GradeItem(r"\boxed{1}", " "), GradeItem(r"\boxed{1}", "1")])
    assert [g.verdict for g in grades] == ["no_answer", "error", "correct"]
    assert pool.num_started == 0


def test_closing_ends_every_process(pool: GraderPool) -> None:
    pool.grade([_item("a+b"), _item("b+b")])
    processes = [worker._process for worker in pool._idle]
    assert processes and all(process.poll() is None for process in processes)
    pool.close()
    assert all(process.poll() is not None for process in processes)


def test_a_broken_worker_is_an_exception_not_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    with GraderPool(1, verify="no_such_module_anywhere:verify") as broken:
        with pytest.raises(RuntimeError, match="no_such_module_anywhere"):
            broken.grade([_item("a+b")])


def test_unknown_answer_type_is_named() -> None:
    with pytest.raises(ValueError, match="'letter' is unknown; valid: auto"):
        grade_batch([GradeItem("1", "1", "letter")])


def test_math_verify_decides_what_the_rules_cannot_and_from_a_thread() -> None:
    items = [
        GradeItem(r"\boxed{x+1}", "1+x"),
        GradeItem(r"\boxed{x+2}", "1+x"),
        GradeItem(r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{\sqrt{2}}{2}"),
        GradeItem(r"\boxed{1<x<2}", "(1,2)"),
    ]
    grades = []
    thread = threading.Thread(target=lambda: grades.extend(grade_batch(items, 1)))
    thread.start()
    thread.join(120)
    assert [(g.verdict, g.rule) for g in grades] == [
        ("correct", "math_verify"),
        ("wrong", "math_verify"),
        ("correct", "math_verify"),
        ("correct", "math_verify"),
    ]


def test_accuracy_on_labelled_cases(shared_dir: Path) -> None:
    """A fixed sample of 300 labelled cases: at most 3 wrong verdicts (measured: 4 wrong of all 2,888)."""
    path = shared_dir / "data" / "grading" / "cases.jsonl"
    cases = random.Random(0).sample([json.loads(line) for line in path.open()], 300)
    grades = grade_batch([GradeItem(case["response"], case["gold"]) for case in cases], 2)
    wrong = [
        f"{case['kind']}: {grade.answer!r} for {case['gold']!r} is {grade.verdict} ({grade.rule})"
        for case, grade in zip(cases, grades, strict=True)
        if (grade.verdict == "correct") != case["expected"]
    ]
    assert len(wrong) <= 3, wrong
