"""One run in a folder at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verl_dft.errors import InputError

LOCK_FILE = ".run.lock"


@contextmanager
def only_run(output: Path) -> Iterator[int]:
    """Hold the folder for the block. The system lets go of it with the last process that has the descriptor open.

    Yields:
        the descriptor, for the child that goes on with the run (``pass_fds``).

    Raises:
        InputError: a living run has it; the file of one that was killed is no hindrance.
    """
    descriptor = os.open(output / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 100).decode(errors="replace").strip()
            raise InputError(
                f"output_dir={output} is in use by another verl-dft rl ({owner or 'just started'}); wait for it or "
                "end it, or choose another output_dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode())
        yield descriptor
    finally:
        os.close(descriptor)
