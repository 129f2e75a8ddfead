"""Grading while generation goes on: a thread takes each finished shard, so that no core waits for the other."""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from verl_dft.grading.pool import Grade, GradeItem, GraderPool


class BackgroundGrader:
    """Grades items by key in the order they are given. Use as a context manager; leaving it ends the thread.

    Args:
        options: of :class:`verl_dft.grading.pool.GraderPool`.
        on_grades: called in the grading thread with each finished lot.
    """

    def __init__(self, options: Mapping[str, Any], on_grades: Callable[[Sequence[Grade]], None] | None = None) -> None:
        self._pool = GraderPool(**options)
        self._tell = on_grades or (lambda grades: None)
        self._lots: queue.SimpleQueue[tuple[list[str], list[GradeItem]] | None] = queue.SimpleQueue()
        self._grades: dict[str, Grade] = {}
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="grader", daemon=True)

    def __enter__(self) -> "BackgroundGrader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._lots.put(None)
        self._thread.join()
        self._pool.close()

    def submit(self, keys: Sequence[str], items: Sequence[GradeItem]) -> None:
        """Hand over a lot. Returns at once."""
        self._lots.put((list(keys), list(items)))

    def finish(self) -> dict[str, Grade]:
        """Wait for everything handed over; the grades by key. Raises what grading raised."""
        self._lots.put(None)
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._grades

    def _run(self) -> None:
        while (lot := self._lots.get()) is not None:
            keys, items = lot
            try:
                grades = self._pool.grade(items)
                self._tell(grades)
            except BaseException as error:
                self._failure = error
                return
            self._grades.update(zip(keys, grades, strict=True))
