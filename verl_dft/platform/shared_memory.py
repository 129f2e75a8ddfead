"""Clearing up /dev/shm after a run whose processes were killed.

verl ends its vLLM servers by letting Ray kill them, and vLLM's message queues (about 400 MB of address space, sparse)
and semaphores stay behind under names that Python's ``multiprocessing`` chose. The memory through which a CPU engine's
tensor-parallel processes exchange tensors (``vllm_dist_``) stays behind too when vLLM itself ends them, and so does
that through which verl sends weights (``verl_weights_``) when an engine dies meanwhile.
"""

import os
from contextlib import suppress
from pathlib import Path

_FOLDER = Path("/dev/shm")
_PREFIXES = ("psm_", "sem.mp-", "vllm_dist_", "verl_weights_")


def shared_memory_files() -> set[str]:
    """Names of shared blocks and semaphores of multiprocessing, vLLM and verl; empty without /dev/shm."""
    return {name for name in os.listdir(_FOLDER) if name.startswith(_PREFIXES)} if _FOLDER.is_dir() else set()


def remove_abandoned(before: set[str]) -> set[str]:
    """Remove what appeared since ``before``, is this user's, and no living process has open or mapped.

    Args:
        before: :func:`shared_memory_files` from before the run.

    Returns:
        the names removed.
    """
    ours = {name: number for name in shared_memory_files() - before if (number := _inode_if_ours(_FOLDER / name))}
    if not ours:
        return set()
    used = _inodes_in_use()
    abandoned = {name for name, number in ours.items() if number not in used}
    for name in abandoned:
        (_FOLDER / name).unlink(missing_ok=True)
    return abandoned


def _inode_if_ours(path: Path) -> int | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino if status.st_uid == os.getuid() else None


def _inodes_in_use() -> set[int]:
    """Inodes in /dev/shm that processes hold; those of other users cannot be read, nor can they hold ours.

    By name it would not do: sem_open maps a new semaphore under a temporary name and links it to its own afterwards.
    """
    numbers: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile, or another user's
            lines = (process / "maps").read_text(errors="replace").splitlines()
            numbers |= {int(line.split()[4]) for line in lines if f"{_FOLDER}/" in line}
        with suppress(OSError):
            for descriptor in os.listdir(process / "fd"):
                with suppress(OSError):  # closed meanwhile
                    if os.readlink(process / "fd" / descriptor).startswith(f"{_FOLDER}/"):
                        numbers.add((process / "fd" / descriptor).stat().st_ino)
    return numbers
