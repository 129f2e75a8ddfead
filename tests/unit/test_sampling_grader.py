"""Grading beside generation: order, waiting, failure."""

import threading
import time

import pytest

from verl_dft.grading.pool import Grade, GradeItem
from verl_dft.sampling import grader as module
from verl_dft.sampling.grader import BackgroundGrader


class _Pool:
    """Grades when it is let, by the length of the text."""

    def __init__(self, fails: bool = False) -> None:
        self.let, self.fails, self.seen = threading.Event(), fails, 0

    def grade(self, items: list[GradeItem]) -> list[Grade]:
        assert self.let.wait(30)
        if self.fails:
            raise OSError("no process can be started")
        self.seen += len(items)
        return [Grade("correct", str(len(item.response)), "length") for item in items]


def _lot(start: int, num: int) -> tuple[list[str], list[GradeItem]]:
    return [f"k{i}" for i in range(start, start + num)], [GradeItem("x" * i, "1") for i in range(start, start + num)]


def test_texts_do_not_pile_up_where_grading_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOT", 2)
    monkeypatch.setattr(module, "_MOST_LOTS", 3)
    pool, handed = _Pool(), []
    with BackgroundGrader(pool) as grader:

        def hand_over() -> None:
            for start in range(0, 40, 4):
                grader.submit(*_lot(start, 4))
                handed.append(start)

        thread = threading.Thread(target=hand_over)
        thread.start()
        time.sleep(0.5)
        assert len(handed) <= 2 and thread.is_alive()  # one lot is being graded, three wait
        pool.let.set()
        thread.join(30)
        grades = grader.finish()
    assert {key: grade.answer for key, grade in grades.items()} == {f"k{i}": str(i) for i in range(40)}


def test_a_failure_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOT", 1)
    monkeypatch.setattr(module, "_MOST_LOTS", 2)
    pool = _Pool(fails=True)
    threading.Timer(0.3, pool.let.set).start()
    with pytest.raises(OSError, match="no process"), BackgroundGrader(pool) as grader:
        grader.submit(*_lot(0, 20))
    assert not grader._thread.is_alive()


def test_leaving_by_an_exception_grades_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOT", 1)
    pool = _Pool()
    threading.Timer(0.3, pool.let.set).start()
    with pytest.raises(KeyboardInterrupt), BackgroundGrader(pool) as grader:
        grader.submit(*_lot(0, 20))
        raise KeyboardInterrupt
    assert pool.seen <= 1 and not grader._thread.is_alive()
