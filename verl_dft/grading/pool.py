"""Grading many responses: extract, decide the easy ones here, send the rest to processes that can be killed.

A worker that takes too long is killed and its item is a ``timeout``. One that dies is replaced and its item tried once
more in a fresh process, since the cause may have been outside (the kernel, a user); dying again is an ``error``. No
other item notices. Each worker is driven by a thread that waits on its pipe, so a pool can be used from any thread and
from several at once.
"""

import atexit
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from verl_dft.grading.extract import extract_answer, qwen_answer
from verl_dft.grading.judge import Verdict, gold_type
from verl_dft.grading.process import Worker, WorkerDied
from verl_dft.grading.quick import quick_judge, within

VERDICTS = ("correct", "wrong", "no_answer", "timeout", "error")
ANSWER_TYPES = ("auto", "number", "latex", "choice", "text", "multi")
_MAX_WORKERS = 8
# Verdicts remembered from one call to the next: at most this many, of pairs at most this long together.
_MAX_KNOWN, _MAX_KNOWN_CHARS = 50_000, 1_000


@dataclass(frozen=True)
class GradeItem:
    """A response to grade.

    ``answer_type``: one of ``auto number latex choice text multi``; ``auto`` goes by the gold, and so do ``number``,
    ``latex`` and ``multi`` where a gold is plainly words or a letter. ``tolerance``: absolute error a number may have.
    """

    response: str
    gold: str
    answer_type: str = "auto"
    tolerance: float | None = None


@dataclass(frozen=True)
class Grade:
    """How a response was graded.

    ``verdict``: one of ``VERDICTS``. ``answer``: as extracted. ``rule``: what decided. ``detail``: an error's reason.
    ``qwen``: whether the Qwen2.5-Math harness's leniencies accept it (``correct``), else the verdict, or ``wrong``
    where a number was found that strict extraction does not take for an answer.
    """

    verdict: str
    answer: str | None
    rule: str
    detail: str = ""
    qwen: str = ""


class _Key(NamedTuple):
    answer: str
    gold: str
    answer_type: str


class GraderPool:
    """Up to ``num_workers`` processes, started when first needed; close it, or use it as a context manager.

    Args:
        num_workers: processes at most (default: the cores this process may use, 8 at most).
        timeout_s: seconds of CPU time for one (answer, gold) pair.
        memory_mb: address space of one worker in MB.
        verify: ``module:function``, called in the worker as ``verify(answer, gold, type) -> (equal, qwen, rule)``.
        deduplicate: grade identical (answer, gold, type) triples once, also across calls.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        timeout_s: float = 10.0,
        memory_mb: int = 2048,
        verify: str = "verl_dft.grading.verify:verify",
        deduplicate: bool = True,
    ) -> None:
        self.num_workers = num_workers or min(available_cpus(), _MAX_WORKERS)
        self.timeout_s, self.memory_mb, self.verify = timeout_s, memory_mb, verify
        self.deduplicate = deduplicate
        self.num_started = 0
        self._idle: deque[Worker] = deque()
        self._slots = threading.BoundedSemaphore(self.num_workers)
        self._lock = threading.Lock()
        self._known: dict[_Key, Verdict] = {}

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every worker."""
        while self._idle:
            self._idle.pop().close()

    def worker_pids(self) -> list[int]:
        """The processes now idle in the pool."""
        return [worker.pid for worker in list(self._idle)]

    def grade(
        self, items: Sequence[GradeItem | Mapping[str, Any]], on_progress: Callable[[int], None] | None = None
    ) -> list[Grade]:
        """Grade ``items`` in order.

        Args:
            items: each with ``response``, ``gold`` and, optionally, ``answer_type``.
            on_progress: called with the number of items just decided.
        """
        tell = on_progress or (lambda count: None)
        grades: list[Grade | None] = [None] * len(items)
        waiting: dict[Any, list[int]] = {}
        keys: dict[Any, _Key] = {}
        for index, item in enumerate(items):
            outcome = self._first_look(_as_item(item))
            if isinstance(outcome, Grade):
                grades[index] = outcome
            else:
                group = outcome if self.deduplicate else index
                keys[group] = outcome
                waiting.setdefault(group, []).append(index)
        tell(len(items) - sum(map(len, waiting.values())))

        def done(group: Any, grade: Grade) -> None:
            for index in waiting[group]:
                grades[index] = grade
            tell(len(waiting[group]))

        self._verify_all(keys, done)
        assert all(grade is not None for grade in grades)
        return grades  # type: ignore[return-value]

    def _first_look(self, item: GradeItem) -> Grade | _Key:
        """A grade where the cheap rules suffice, else what a worker has to verify."""
        if item.answer_type not in ANSWER_TYPES:
            raise ValueError(f"answer_type {item.answer_type!r} is unknown; valid: {', '.join(ANSWER_TYPES)}")
        response, gold = _UNPRINTABLE.sub(" ", item.response), _UNPRINTABLE.sub(" ", item.gold)
        if not gold.strip():
            return Grade("error", None, "empty_gold", "the problem has an empty gold answer", "error")
        answer = extract_answer(response, several=item.answer_type == "multi" or gold_type(gold) == "multi")
        if answer is None:
            return Grade("no_answer", None, "extract", qwen=_last_number(response, gold))
        if item.tolerance and within(answer, gold, item.tolerance):
            return Grade("correct", answer, "tolerance", qwen="correct")
        key = _Key(answer, gold, item.answer_type)
        verdict = self._known.get(key) or quick_judge(*key)
        return key if verdict is None else _grade(answer, verdict)

    def _verify_all(self, keys: Mapping[Any, _Key], done: Callable[[Any, Grade], None]) -> None:
        queue, failures = deque(keys.items()), []

        def drive() -> None:
            try:
                while queue and not failures:
                    try:
                        group, key = queue.popleft()
                    except IndexError:  # another thread took the last one
                        break
                    with self._slots:
                        grade = self._verify_one(key)
                    with self._lock:
                        done(group, grade)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=drive, daemon=True) for _ in range(min(self.num_workers, len(keys)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def _verify_one(self, key: _Key) -> Grade:
        answer = key.answer
        for attempt in (1, 2):
            # again only in a fresh process: others that were killed at the same moment may still seem alive
            worker = self._take_worker() if attempt == 1 else self._new_worker()
            try:
                reply = worker.ask(key)
            except TimeoutError as error:
                return Grade("timeout", answer, "timeout", str(error), "timeout")
            except WorkerDied as error:
                if attempt == 2:
                    return Grade("error", answer, "worker_died", f"{error}, twice", "error")
                continue
            except BaseException:
                worker.close()
                raise
            if "error" in reply:
                # Whatever state an exception (memory above all) left behind goes with the process.
                worker.close()
                return Grade("error", answer, reply["rule"], reply["error"], "error")
            self._idle.append(worker)
            verdict = Verdict(reply["equal"], reply["qwen"], reply["rule"])
            self._remember(key, verdict)
            return _grade(answer, verdict)
        raise AssertionError("unreachable")

    def _take_worker(self) -> Worker:
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return self._new_worker()
            if worker.alive():
                return worker
            worker.close()

    def _new_worker(self) -> Worker:
        with self._lock:
            self.num_started += 1
        return Worker(self.verify, self.timeout_s, self.memory_mb)

    def _remember(self, key: _Key, verdict: Verdict) -> None:
        if self.deduplicate and sum(map(len, key)) <= _MAX_KNOWN_CHARS:
            with self._lock:
                if len(self._known) >= _MAX_KNOWN:
                    self._known.clear()
                self._known[key] = verdict


def _grade(answer: str, verdict: Verdict) -> Grade:
    names = {True: "correct", False: "wrong"}
    return Grade(names[verdict.equal], answer, verdict.rule, qwen=names[verdict.qwen])


def _as_item(item: Any) -> GradeItem:
    if isinstance(item, GradeItem):
        return item
    if isinstance(item, Mapping):
        return GradeItem(item["response"], item["gold"], item.get("answer_type", "auto"), item.get("tolerance"))
    return GradeItem(item.response, item.gold, getattr(item, "answer_type", "auto"), getattr(item, "tolerance", None))


# Lone surrogates, which no pipe carries, and control characters, which no answer needs.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def _last_number(response: str, gold: str) -> str:
    """The Qwen harness falls back on the last number of a response that marks none as its answer."""
    number = qwen_answer(response)
    verdict = number and quick_judge(number, gold)
    return "no_answer" if number is None else "correct" if verdict and verdict.qwen else "wrong"


def available_cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_shared: dict[tuple[Any, ...], GraderPool] = {}
_shared_lock = threading.Lock()


def shared_pool(num_workers: int | None = None, timeout_s: float = 10.0, memory_mb: int = 2048) -> GraderPool:
    """This process's pool with these settings: made at first use, kept until the process ends. Safe after a fork."""
    key = (os.getpid(), num_workers, timeout_s, memory_mb)
    with _shared_lock:
        if key not in _shared:
            _shared[key] = GraderPool(num_workers, timeout_s, memory_mb)
        return _shared[key]


@atexit.register
def close_shared_pools() -> None:
    """End the workers of this process's shared pools; the next use starts new ones."""
    for key in [key for key in _shared if key[0] == os.getpid()]:
        _shared.pop(key).close()


def _forget_parent() -> None:
    """In a forked child: the parent's workers, and a lock that another of its threads may hold, are not ours."""
    global _shared_lock
    _shared_lock = threading.Lock()
    _shared.clear()


os.register_at_fork(after_in_child=_forget_parent)


def grade_batch(
    items: Sequence[GradeItem | Mapping[str, Any]],
    num_workers: int | None = None,
    *,
    timeout_s: float = 10.0,
    memory_mb: int = 2048,
    on_progress: Callable[[int], None] | None = None,
) -> list[Grade]:
    """Grade ``items`` with this process's shared pool, from any thread; see :class:`GraderPool`.

    Blocks; in asyncio code, ``await asyncio.to_thread(grade_batch, items)``.
    """
    return shared_pool(num_workers, timeout_s, memory_mb).grade(items, on_progress)
