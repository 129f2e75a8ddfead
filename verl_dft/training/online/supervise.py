"""Runs the driver of a run as a child, and leaves nothing behind however that ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from verl_dft.config import command_line
from verl_dft.training.online.failures import advice, last_step
from verl_dft.training.online.progress import last_error
from verl_dft.training.online.remains import Remains

TOLD = (0, 1, 2)
"""Exit codes of a driver that has said itself what became of the run."""
_ENDED_BY = (signal.SIGINT, signal.SIGTERM)
_ENDING_S = 10.0
"""How long a command that was asked to end may take: nothing is lost with one that is killed."""


def supervise(
    command: Sequence[str],
    environment: Mapping[str, str],
    output: Path,
    checkpoints: str | Path,
    keep: Sequence[int] = (),
    log: Path | None = None,
) -> int:
    """Run ``command`` to its end. Returns its exit code, 1 for one that it cannot have chosen.

    Args:
        environment: of the command, besides this process's.
        output: folder of the run, with its metrics.
        checkpoints: folder of its checkpoints.
        keep: descriptors that stay open in it.
        log: gets what the command prints, behind what is in it, and its last line that begins with ``error:`` is shown
            here; None: all is shown here.

    Raises:
        KeyboardInterrupt: on SIGINT and SIGTERM, after everything has been ended.
    """
    start = _begin(log) if log else 0
    remains = Remains()
    previous = {number: signal.getsignal(number) for number in _ENDED_BY}
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with open(log, "ab") if log else nullcontext() as shown:
            child = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdout=shown,
                stderr=shown,
                pass_fds=keep,
                start_new_session=True,  # Ctrl-C comes to this process alone, which ends the others in order
            )
        try:
            code = child.wait()
        except KeyboardInterrupt:
            _deaf()  # an impatient second one must not leave half of it behind
            print("interrupted; ending the run's processes (half a minute at most)", file=sys.stderr, flush=True)
            _ask_to_end(child)
            raise
        finally:
            _deaf()
            remains.end()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    told = last_error(log, start) if log else None
    if told:
        print(f"error: {told}", file=sys.stderr, flush=True)
    if code in TOLD:
        return code
    how = f"was ended by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    print(f"error: the run's driver {how} {last_step(output)}; {advice(checkpoints)}", file=sys.stderr, flush=True)
    return 1


def _begin(log: Path) -> int:
    """Mark a new start in the log. Returns its size, from which on the lines are this start's."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"==== {time.strftime('%Y-%m-%d %H:%M:%S')} {command_line()}\n")
        return file.tell()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _deaf() -> None:
    for number in _ENDED_BY:
        signal.signal(number, signal.SIG_IGN)


def _ask_to_end(child: subprocess.Popen) -> None:
    child.terminate()
    try:
        child.wait(_ENDING_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
