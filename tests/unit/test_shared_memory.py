"""What killed processes leave in /dev/shm is removed; what living ones hold is not."""

import multiprocessing
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory

import pytest

from verl_dft.platform.shared_memory import remove_abandoned, shared_memory_files

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/shm is Linux's"),
    pytest.mark.usefixtures("only_sweeper"),
]

KILLED = """
import os, signal
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=64)
resource_tracker.unregister(memory._name, "shared_memory")  # Ray kills the tracker too
print(memory.name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def leave_one() -> str:
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=60)
    name = done.stdout.strip()
    assert done.returncode == -9 and name in shared_memory_files(), done.stderr
    return name


def test_only_what_nobody_holds_is_removed() -> None:
    before = shared_memory_files()
    held = SharedMemory(create=True, size=64)
    try:
        abandoned = leave_one()
        assert remove_abandoned(before) == {abandoned}
        assert held.name in shared_memory_files() and abandoned not in shared_memory_files()
    finally:
        held.close()
        held.unlink()


def test_a_semaphore_that_only_its_maker_holds_is_kept() -> None:
    """A run that ends would break another that is starting its workers: they open it by its name."""
    before = shared_memory_files()
    semaphore = multiprocessing.get_context("spawn").Semaphore(1)
    name = f"sem.{semaphore._semlock.name.lstrip('/')}"
    assert name in shared_memory_files() - before
    assert name not in remove_abandoned(before) and name in shared_memory_files()


def test_what_was_there_before_stays() -> None:
    abandoned = leave_one()
    assert remove_abandoned(shared_memory_files()) == set() and abandoned in shared_memory_files()
    assert abandoned in remove_abandoned(shared_memory_files() - {abandoned})
