"""How the C library hands out memory to a process that trains on a CPU."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h; see mallopt(3)."""


def keep_freed_memory() -> bool:
    """Keep what torch frees for its next tensor, instead of giving it back and having each page faulted in again.

    glibc maps a large allocation by itself and unmaps it when it is freed, so that every layer of every step pays for
    zeroed pages. The process then stays at its peak, which is a little higher (docs/benchmarks/training.md).

    Returns:
        whether it took effect: not with another C library, and not where the user has set glibc's own variables.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
