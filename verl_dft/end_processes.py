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

    def left() -> list[psutil.Process]:
        return [process for process in found() if lives(process)]

    deadline = time.monotonic() + leaving_s
    while left() and time.monotonic() < deadline:
        time.sleep(0.05)
    deadline = time.monotonic() + _KILLED_S
    while (processes := left()) and time.monotonic() < deadline:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=0.1)  # our own children leave the table with this


def lives(process: psutil.Process) -> bool:
    """Whether it runs. One that has ended stays in the table until its parent asks for it, which may be late."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
