"""Grading many responses: extract, decide the easy ones here, send the rest to processes that can be killed.

A worker that takes too long is killed and its item is a ``timeout``. One that dies is replaced and its item tried once
more in a fresh process, since the cause may have been outside (the kernel, a user); dying again is an ``error``. No
other item notices. Each worker is driven by a thread that waits on its pipe, so a pool can be used from any thread.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_dft.grading.extract import extract_answer
from verl_dft.grading.quick import quick_verdict

VERDICTS = ("correct", "wrong", "no_answer", "timeout", "error")
ANSWER_TYPES = ("auto", "number", "latex", "choice", "text", "multi")
_START_TIMEOUT_S = 120.0
_MAX_WORKERS = 8


@dataclass(frozen=True)
class GradeItem:
    """A response to grade. ``answer_type``: one of ``auto number latex choice text multi``."""

    response: str
    gold: str
    answer_type: str = "auto"


@dataclass(frozen=True)
class Grade:
    """The verdict (one of ``VERDICTS``), the extracted answer, the rule that decided and, for an error, its reason."""

    verdict: str
    answer: str | None
    rule: str
    detail: str = ""


class _WorkerDied(Exception):
    pass


class _Worker:
    """One subprocess. ``ask`` returns its reply, raises ``TimeoutError`` or ``_WorkerDied``; both leave it ended."""

    def __init__(self, verify: str, timeout_s: float, memory_mb: int) -> None:
        command = [sys.executable, "-m", "verl_dft.grading.worker", "--verify", verify]
        command += ["--timeout", str(timeout_s), "--memory-mb", str(memory_mb)]
        self._buffer = b""
        with tempfile.TemporaryFile() as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=_worker_environment()
            )
            try:
                self._reply(_START_TIMEOUT_S)
            except (TimeoutError, _WorkerDied) as error:
                stderr.seek(0)
                tail = stderr.read().decode(errors="replace").strip()[-2000:]
                raise RuntimeError(f"a grading worker did not start ({error}):\n{tail}") from None

    def ask(self, request: Sequence[str], timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(list(request)).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died() from None
        return self._reply(timeout_s)

    def _reply(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        while b"\n" not in self._buffer:
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0:
                self.close()
                raise TimeoutError(f"no reply within {timeout_s:g} s")
            if poll.poll(left_ms):
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise self._died()
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _died(self) -> _WorkerDied:
        # The pipe can close a moment before the process is gone; its own status is worth that moment.
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            pass
        self.close()
        return _WorkerDied(f"worker ended with status {self._process.returncode}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            try:
                stream.close()
            except OSError:  # a request that was never read is flushed into a broken pipe
                pass


def _worker_environment() -> dict[str, str]:
    """This process's environment without what an engine put there to be preloaded, and with this package importable."""
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    package_root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, environment.get("PYTHONPATH")]))
    environment["PYTHONSAFEPATH"] = "1"
    return environment


def available_cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class GraderPool:
    """Up to ``num_workers`` processes, started when first needed; close it, or use it as a context manager.

    Args:
        num_workers: processes at most (default: the cores this process may use, 8 at most).
        timeout_s: seconds of wall time for one (answer, gold) pair.
        memory_mb: address space of one worker in MB.
        verify: ``module:function`` called as ``verify(answer, gold, answer_type) -> (equal, rule)`` in the worker.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        timeout_s: float = 10.0,
        memory_mb: int = 2048,
        verify: str = "verl_dft.grading.verify:verify",
    ) -> None:
        self.num_workers = num_workers or min(available_cpus(), _MAX_WORKERS)
        self.timeout_s, self.memory_mb, self.verify = timeout_s, memory_mb, verify
        self.num_started = 0
        self._idle: deque[_Worker] = deque()
        self._lock = threading.Lock()

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every worker."""
        while self._idle:
            self._idle.pop().close()

    def grade(self, items: Sequence[GradeItem], on_progress: Callable[[int], None] | None = None) -> list[Grade]:
        """Grade ``items`` in order. Identical (answer, gold, type) triples are verified once.

        Args:
            on_progress: called with the number of items just decided.
        """
        grades: list[Grade | None] = [None] * len(items)
        waiting: dict[tuple[str, str, str], list[int]] = {}
        for index, item in enumerate(items):
            grades[index] = self._quick(item, waiting, index)
        tell = on_progress or (lambda count: None)
        tell(sum(grade is not None for grade in grades))
        for key, grade in self._verify_all(list(waiting), lambda key: tell(len(waiting[key]))).items():
            for index in waiting[key]:
                grades[index] = grade
        assert all(grade is not None for grade in grades)
        return grades

    def _quick(self, item: GradeItem, waiting: dict[tuple[str, str, str], list[int]], index: int) -> Grade | None:
        if item.answer_type not in ANSWER_TYPES:
            raise ValueError(f"answer_type {item.answer_type!r} is unknown; valid: {', '.join(ANSWER_TYPES)}")
        if not item.gold.strip():
            return Grade("error", None, "empty_gold", "the problem has an empty gold answer")
        answer = extract_answer(item.response)
        if answer is None:
            return Grade("no_answer", None, "extract")
        equal, rule = quick_verdict(answer, item.gold, item.answer_type)
        if equal is not None:
            return Grade("correct" if equal else "wrong", answer, rule)
        waiting.setdefault((answer, item.gold, item.answer_type), []).append(index)
        return None

    def _verify_all(
        self, keys: list[tuple[str, str, str]], on_done: Callable[[tuple[str, str, str]], None]
    ) -> dict[tuple[str, str, str], Grade]:
        queue, done, failures = deque(keys), {}, []

        def drive() -> None:
            worker: _Worker | None = None
            try:
                while queue and not failures:
                    try:
                        key = queue.popleft()
                    except IndexError:  # another thread took the last one
                        break
                    grade, worker = self._verify_one(key, worker)
                    with self._lock:
                        done[key] = grade
                        on_done(key)
            except BaseException as error:
                failures.append(error)
            finally:
                if worker is not None:
                    self._idle.append(worker)

        threads = [threading.Thread(target=drive, daemon=True) for _ in range(min(self.num_workers, len(keys)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return done

    def _verify_one(self, key: tuple[str, str, str], worker: _Worker | None) -> tuple[Grade, _Worker | None]:
        """Grade one pair; returns the worker if it is still usable."""
        answer = key[0]
        for attempt in (1, 2):
            worker = worker or self._take_worker()
            try:
                reply = worker.ask(key, self.timeout_s)
            except TimeoutError as error:
                return Grade("timeout", answer, "timeout", str(error)), None
            except _WorkerDied as error:
                worker = None
                if attempt == 2:
                    return Grade("error", answer, "worker_died", f"{error}, twice"), None
                continue
            if "error" in reply:
                # Whatever state an exception (memory above all) left behind goes with the process.
                worker.close()
                return Grade("error", answer, "exception", reply["error"]), None
            return Grade("correct" if reply["equal"] else "wrong", answer, reply["rule"]), worker
        raise AssertionError("unreachable")

    def _take_worker(self) -> _Worker:
        try:
            return self._idle.pop()
        except IndexError:
            with self._lock:
                self.num_started += 1
            return _Worker(self.verify, self.timeout_s, self.memory_mb)


def grade_batch(
    items: Sequence[GradeItem],
    num_workers: int | None = None,
    *,
    timeout_s: float = 10.0,
    memory_mb: int = 2048,
    on_progress: Callable[[int], None] | None = None,
) -> list[Grade]:
    """Grade ``items`` with a pool that lives for this call; see :class:`GraderPool`."""
    with GraderPool(num_workers, timeout_s, memory_mb) as pool:
        return pool.grade(items, on_progress)
