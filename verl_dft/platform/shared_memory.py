"""Clearing up /dev/shm after a run whose processes were killed.

verl ends its vLLM servers by letting Ray kill them, and vLLM's message queues (about 400 MB of address space, sparse)
and semaphores stay behind under names that Python's ``multiprocessing`` chose. The memory through which a CPU engine's
tensor-parallel processes exchange tensors (``vllm_dist_``) stays behind too when vLLM itself ends them.
"""

import os
from contextlib import suppress
from pathlib import Path

_FOLDER = Path("/dev/shm")
_PREFIXES = ("psm_", "sem.mp-", "vllm_dist_")


def shared_memory_files() -> set[str]:
    """Names of multiprocessing's and vLLM's shared blocks and semaphores in /dev/shm; empty without that folder."""
    return {name for name in os.listdir(_FOLDER) if name.startswith(_PREFIXES)} if _FOLDER.is_dir() else set()


def remove_abandoned(before: set[str]) -> set[str]:
    """Remove what appeared since ``before``, is this user's, and no living process has open or mapped.

    Args:
        before: :func:`shared_memory_files` from before the run.

    Returns:
        the names removed.
    """
    ours = {name for name in shared_memory_files() - before if _is_ours(_FOLDER / name)}
    if not ours:
        return set()
    abandoned = ours - _in_use()
    for name in abandoned:
        (_FOLDER / name).unlink(missing_ok=True)
    return abandoned


def _is_ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except FileNotFoundError:
        return False


def _in_use() -> set[str]:
    """Names in /dev/shm that processes hold; those of other users cannot be read, nor can they hold ours."""
    paths: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile, or another user's
            paths += (process / "maps").read_text(errors="replace").splitlines()
        with suppress(OSError):
            for descriptor in os.listdir(process / "fd"):
                with suppress(OSError):  # closed meanwhile
                    paths.append(os.readlink(process / "fd" / descriptor))
    return {path.partition("/dev/shm/")[2].removesuffix(" (deleted)") for path in paths if "/dev/shm/" in path}
