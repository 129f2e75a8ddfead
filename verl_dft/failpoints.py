"""Places where a test can end the process as ``kill -9`` would, at the narrow moments that random kills miss.

``VERL_DFT_FAILPOINT`` is ``NAME[@DETAIL][:COUNT[:ACTION]]``. The process that passes the place for the ``COUNT``-th
time (the first) is killed; with the action ``enospc`` the disk is full there. ``trace:FILE`` instead adds a line
``PID NAME@DETAIL`` to the file for each place passed. Unset, a failpoint costs one dictionary look-up.
"""

import errno
import os
import signal

_passed: dict[str, int] = {}


def failpoint(name: str, detail: str = "") -> None:
    """Die here if the environment asks for it.

    Args:
        detail: which of several things that pass the same place, e.g. the name of the file that is written.

    Raises:
        OSError: the environment asks for a full disk.
    """
    wanted = os.environ.get("VERL_DFT_FAILPOINT")
    if not wanted:
        return
    names = (name, f"{name}@{detail}")
    first, _, rest = wanted.partition(":")
    if first == "trace":
        _trace(rest, names[bool(detail)])
    elif first in names:
        count, _, action = rest.partition(":")
        _passed[first] = _passed.get(first, 0) + 1
        if _passed[first] == int(count or 1):
            if action == "enospc":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.kill(os.getpid(), signal.SIGKILL)


def _trace(path: str, place: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, f"{os.getpid()} {place}\n".encode())
    finally:
        os.close(descriptor)
