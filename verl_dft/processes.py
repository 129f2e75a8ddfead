"""Processes that end with the one that started them, however that one ends.

As a module it is a command's first moment: ``python -m verl_dft.processes PARENT COMMAND …`` asks the system to be
killed with its parent and then becomes the command. Nothing of ours runs between fork and exec, which would not be safe
in a parent that has threads.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def end_with_parent(number: signal.Signals) -> None:
    """Have the system send this signal to this process when its parent ends. On Linux; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that they can be found. On Linux, as above."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def tied(command: Sequence[str]) -> list[str]:
    """``command`` for a child of this process that is killed when the thread that starts it ends, even by SIGKILL."""
    return [sys.executable, "-m", "verl_dft.processes", str(os.getpid()), *command]


def main(argv: Sequence[str]) -> int:
    """Become ``argv[1:]``, tied to process ``argv[0]``. Returns only where that one is gone already."""
    end_with_parent(signal.SIGKILL)
    if os.getppid() != int(argv[0]):
        return 1
    os.execvp(argv[1], list(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
