"""How the C library hands out memory to a process that trains on a CPU."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Of glibc's malloc.h; see mallopt(3)."""
_LARGE = 32 << 20
"""Bytes, the most that glibc takes as a threshold: an embedding matrix or logits, which would leave holes."""


def keep_freed_memory() -> bool:
    """Keep what torch frees for its next tensor, instead of giving it back and having each page faulted in again.

    glibc maps a large allocation by itself and unmaps it when it is freed, so that every layer of every step pays for
    zeroed pages. Up to 32 MB are kept, in one heap: the forward and the backward pass run in threads of their own, and
    what one of them freed the other could not use (docs/benchmarks/training.md has both measured).

    Returns:
        whether it took effect: not with another C library, and not where the user has set glibc's own variables.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    options = ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, _LARGE), (_M_TRIM_THRESHOLD, -1))
    return mallopt is not None and all([mallopt(option, value) for option, value in options])
