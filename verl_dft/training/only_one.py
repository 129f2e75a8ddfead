"""One run in a folder at a time. Imports no verl."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from verl_dft.errors import InputError

LOCK_FILE = ".run.lock"
LAUNCHED = "VERL_DFT_LAUNCHED"
"""Set in the environment of ranks that a command started: it holds the folder, and it tells their errors, once."""


@contextmanager
def only_run(output: str | Path, command: str, lock: Callable[[int, int], object] = fcntl.flock) -> Iterator[int]:
    """Hold the folder for the block.

    Args:
        output: the folder.
        command: who holds it, for the message.
        lock: ``fcntl.flock``, which the system lets go of with the last process that has the descriptor open, or
            ``fcntl.lockf``, which is this process's alone.

    Yields:
        the descriptor, for a child that goes on with the run (``pass_fds``).

    Raises:
        InputError: a living run has it; the file of one that was killed is no hindrance.
    """
    descriptor = os.open(Path(output) / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.read(descriptor, 100).decode(errors="replace").strip()
            raise InputError(
                f"output_dir={output} is in use by another verl-dft {command} ({owner or 'just started'}); wait for "
                "it or end it, or choose another output_dir"
            ) from None
        except OSError:  # a file system without locks
            pass
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def only_training(output: str | Path) -> Iterator[None]:
    """Hold the folder for the block, where this process is the first of its run; other ranks go with it.

    Raises:
        InputError: as of :func:`only_run`.
    """
    if LAUNCHED in os.environ or os.environ.get("RANK", os.environ.get("NODE_RANK", "0")) != "0":
        yield
        return
    # this process's alone: a lock that a worker of the data inherited would outlive a kill
    with only_run(output, "train", fcntl.lockf):
        yield
