"""Processes end: those that leave by themselves, those that have to be killed, those that are seen only then."""

import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from verl_dft.end_processes import end_processes, lives

SLEEPS = "import time; time.sleep(100)"
PARENT = (
    f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {SLEEPS!r}]).pid, flush=True); {SLEEPS}"
)
"""Never asks for its child, which so stays in the table."""


@pytest.fixture
def family() -> Iterator[tuple[psutil.Process, psutil.Process]]:
    """A process and its child."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        yield psutil.Process(parent.pid), child
        for process in (child, parent):
            if process.pid == parent.pid or process.is_running():
                process.kill()


def test_one_that_has_ended_is_not_waited_for(family: tuple[psutil.Process, psutil.Process]) -> None:
    _, child = family
    child.kill()
    deadline = time.monotonic() + 10
    while lives(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert child.is_running() and child.status() == psutil.STATUS_ZOMBIE
    asked = []
    end_processes(lambda: asked.append(1) or [child], leaving_s=60)
    assert asked == [1], "it was waited for"


def test_one_that_is_seen_only_when_another_is_killed_ends_too(family: tuple[psutil.Process, psutil.Process]) -> None:
    parent, child = family
    end_processes(lambda: [parent] if lives(parent) else [child], leaving_s=0)
    assert not lives(parent) and not lives(child)


def test_one_that_leaves_by_itself_is_not_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"]) as process:
        end_processes(lambda: [psutil.Process(process.pid)], leaving_s=60)
        assert process.wait() == 0
