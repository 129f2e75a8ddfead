"""The end of processes that ours have started, with as little force as it takes."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil

_KILLED_S = 10.0


def end_processes(found: Callable[[], Sequence[psutil.Process]], leaving_s: float) -> None:
    """Wait until none is left, and kill those that are there after ``leaving_s`` seconds.

    Args:
        found: asked again and again, because what a killed process had started may only then be seen. Those that have
            ended may be among them.
    """
    left = still_running(found, leaving_s)
    deadline = time.monotonic() + _KILLED_S
    while left and time.monotonic() < deadline:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=0.1)  # our own children leave the table with this
        left = still_running(found, 0)


def still_running(found: Callable[[], Sequence[psutil.Process]], seconds: float) -> list[psutil.Process]:
    """Those of ``found()`` that run after so many seconds; returns as soon as there are none."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in found() if lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def lives(process: psutil.Process) -> bool:
    """Whether it runs. One that has ended stays in the table until its parent asks for it, which may be late."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
