"""Grading while generation goes on: a thread takes each finished shard, so that no core waits for the other."""

import queue
import threading
from collections.abc import Callable, Sequence

from verl_dft.grading.pool import Grade, GradeItem, GraderPool

_LOT = 64
_MOST_LOTS = 256
"""Handed over and not yet graded: beyond that, those who hand over wait, so that texts do not pile up in memory."""


class BackgroundGrader:
    """Grades items by key in the order they are given. Use as a context manager; leaving it ends the thread.

    Leaving it by an exception does not wait for what is still to be graded.

    Args:
        pool: what grades. It is not closed.
        on_grades: called in the grading thread with each finished lot.
    """

    def __init__(self, pool: GraderPool, on_grades: Callable[[Sequence[Grade]], None] | None = None) -> None:
        self._pool = pool
        self._tell = on_grades or (lambda grades: None)
        self._lots: queue.Queue[tuple[list[str], list[GradeItem]] | None] = queue.Queue(_MOST_LOTS)
        self._grades: dict[str, Grade] = {}
        self._failure: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="grader", daemon=True)

    def __enter__(self) -> "BackgroundGrader":
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stopped = kind is not None
        self._put(None)
        self._thread.join()

    def submit(self, keys: Sequence[str], items: Sequence[GradeItem]) -> None:
        """Hand over a lot. Waits only where grading is far behind. Raises what grading an earlier one raised."""
        # small lots, so that an error elsewhere has little to wait for
        for start in range(0, len(keys), _LOT):
            self._put((list(keys[start : start + _LOT]), list(items[start : start + _LOT])))
            if self._failure is not None:
                raise self._failure

    def finish(self) -> dict[str, Grade]:
        """Wait for everything handed over; the grades by key. Raises what grading raised."""
        self._put(None)
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._grades

    def _put(self, lot: tuple[list[str], list[GradeItem]] | None) -> None:
        """Into the queue, unless nobody takes from it any more."""
        while self._thread.is_alive():
            try:
                return self._lots.put(lot, timeout=0.2)
            except queue.Full:
                continue

    def _run(self) -> None:
        while (lot := self._lots.get()) is not None and not self._stopped:
            keys, items = lot
            try:
                grades = self._pool.grade(items)
                self._tell(grades)
            except BaseException as error:
                self._failure = error
                return
            self._grades.update(zip(keys, grades, strict=True))
