"""Places where a test can end the process as ``kill -9`` would, at the narrow moments that random kills miss.

``VERL_DFT_FAILPOINT=name`` or ``name:count`` kills the process when it passes the place for the first (``count``-th)
time; unset, a failpoint costs one dictionary look-up.
"""

import os
import signal

_passed: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Die here if the environment asks for it."""
    wanted = os.environ.get("VERL_DFT_FAILPOINT")
    if not wanted:
        return
    wanted_name, _, count = wanted.partition(":")
    if name == wanted_name:
        _passed[name] = _passed.get(name, 0) + 1
        if _passed[name] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)
