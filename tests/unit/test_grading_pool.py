"""The pool of killable workers: whatever one item does, every other item keeps its verdict."""

import os
import signal
import threading
from pathlib import Path

import pytest

from verl_dft.grading import GradeItem, GraderPool, grade_batch

# Verifies like a worker that some inputs hang, kill, bloat or break. No quick rule applies to what starts with \\psi.
_HOSTILE = r"""
import os, time
def verify(answer, gold, answer_type):
    what = answer.removeprefix("\\psi ")
    if what == "sleep": time.sleep(1000)
    if what == "spin":
        while True: pass
    if what == "die": os._exit(7)
    if what == "bloat": bytearray(8 << 30)
    if what == "raise": raise RecursionError("deep")
    if what == "print": print("noise on stdout", flush=True)
    if what == "killed once" and not os.path.exists(os.environ["MARK"]):
        open(os.environ["MARK"], "w").close()
        os.kill(os.getpid(), 9)
    with open(os.environ["LOG"], "a") as log: log.write(f"{what} {gold}\n")
    return what in ("good", "killed once"), what == "nearly", "scripted"
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GraderPool:
    (tmp_path / "hostile_verify.py").write_text(_HOSTILE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    with GraderPool(2, timeout_s=1.0, memory_mb=1024, verify="hostile_verify:verify") as made:
        yield made


def _item(what: str, gold: str = r"\psi") -> GradeItem:
    return GradeItem(rf"\boxed{{\psi {what}}}", gold)


@pytest.mark.slow
def test_hostile_items_cost_only_themselves(pool: GraderPool) -> None:
    """Hanging, dying, memory and exceptions are verdicts; good items before, between and after are graded."""
    expected = {
        "good": "correct", "bad": "wrong", "sleep": "timeout", "spin": "timeout", "die": "error", "bloat": "error",
        "raise": "error", "print": "wrong", "killed once": "correct",
    }  # fmt: skip
    order = ["good", "sleep", "bad", "die", "good", "bloat", "bad", "raise", "spin", "print", "killed once", "good"]
    grades = pool.grade([_item(what) for what in order])
    assert [grade.verdict for grade in grades] == [expected[what] for what in order]
    assert [grade.qwen for grade in grades] == [
        expected[what] if expected[what] != "correct" else "wrong" for what in order
    ]


def test_details_say_why(pool: GraderPool) -> None:
    died, memory, deep, spin = pool.grade([_item("die"), _item("bloat"), _item("raise"), _item("spin")])
    assert died.rule == "worker_died" and "status 7" in died.detail
    assert memory.rule == "memory_limit" and "1024 MB" in memory.detail
    assert "RecursionError: deep" in deep.detail
    assert "CPU time" in spin.detail or "no reply within" in spin.detail  # on a machine too busy to spend that CPU time


def test_pool_is_rebuilt_and_right_afterwards(pool: GraderPool) -> None:
    pool.grade([_item("die"), _item("spin")])
    started = pool.num_started
    again = pool.grade([_item("good"), _item("bad")])
    assert [grade.verdict for grade in again] == ["correct", "wrong"]
    assert pool.num_started > started >= 3


def test_a_worker_killed_from_outside_costs_a_retry(pool: GraderPool) -> None:
    """The first try is killed by a signal; the second, in a new process, gives the verdict."""
    (grade,) = pool.grade([_item("killed once")])
    assert grade.verdict == "correct" and pool.num_started == 2


def test_workers_killed_while_idle_are_replaced(pool: GraderPool) -> None:
    pool.grade([_item("good"), _item("bad")])
    for pid in pool.worker_pids():
        os.kill(pid, signal.SIGKILL)
    assert [g.verdict for g in pool.grade([_item("good", r"\psi x"), _item("bad", r"\psi x")])] == ["correct", "wrong"]


def test_identical_pairs_are_verified_once(pool: GraderPool) -> None:
    """Within a call and in the next one."""
    grades = pool.grade([_item("good")] * 50 + [_item("good", r"\psi 2")] * 50) + pool.grade([_item("good")])
    assert [g.verdict for g in grades] == ["correct"] * 101
    logged = Path(os.environ["LOG"]).read_text().splitlines()
    assert sorted(line for line in logged if line.startswith("good")) == [r"good \psi", r"good \psi 2"]


def test_nothing_is_silently_wrong(pool: GraderPool) -> None:
    """No answer, and a gold that says nothing, are verdicts of their own; easy items start no process."""
    grades = pool.grade([GradeItem("dunno", "1"), GradeItem(r"\boxed{1}", " "), GradeItem(r"\boxed{1}", "1")])
    assert [g.verdict for g in grades] == ["no_answer", "error", "correct"]
    assert pool.num_started == 0


def test_items_may_be_mappings_and_carry_a_tolerance(pool: GraderPool) -> None:
    item = {"response": r"\boxed{4.25}", "gold": "4.2", "tolerance": 0.1}
    assert [g.rule for g in pool.grade([item, item | {"tolerance": None}])] == ["tolerance", "number"]


def test_several_threads_share_one_pool(pool: GraderPool) -> None:
    """Together they never run more processes than the pool has, and each gets its own verdicts."""
    results: dict[int, list[str]] = {}

    def work(number: int) -> None:
        items = [_item("good", rf"\psi {number} {k}") for k in range(5)] + [_item("bad", rf"\psi {number}")]
        results[number] = [grade.verdict for grade in pool.grade(items)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {number: ["correct"] * 5 + ["wrong"] for number in range(6)}
    assert pool.num_started <= pool.num_workers


def test_closing_ends_every_process(pool: GraderPool) -> None:
    pool.grade([_item("good"), _item("bad")])
    workers = list(pool._idle)
    assert workers and all(worker.alive() for worker in workers)
    pool.close()
    assert not any(worker.alive() for worker in workers)


def test_a_broken_worker_is_an_exception_not_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    with GraderPool(1, verify="no_such_module_anywhere:verify") as broken:
        with pytest.raises(RuntimeError, match="no_such_module_anywhere"):
            broken.grade([_item("good")])


def test_unknown_answer_type_is_named() -> None:
    with pytest.raises(ValueError, match="'letter' is unknown; valid: auto"):
        grade_batch([GradeItem("1", "1", "letter")])


def test_math_verify_decides_what_the_rules_cannot_and_from_a_thread() -> None:
    items = [
        GradeItem(r"\boxed{x+1}", "1+x"),
        GradeItem(r"\boxed{\sin x}", r"\cos x"),
        GradeItem(r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{\sqrt{2}}{2}"),
        GradeItem(r"\boxed{\cos^2 x}", r"1-\sin^2 x"),
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
