"""Runs a command that starts Ray on this machine, and ends whatever of it is left when it has ended.

Every process of the run inherits a mark in its environment, by which the left-overs are found: Ray puts its processes
into sessions of their own, and vLLM's engines outlive a server that was killed.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from verl_dft.platform.shared_memory import remove_abandoned, shared_memory_files
from verl_dft.training.online.watchdog import MARK

VARIABLE = "VERL_DFT_RUN"
"""Environment variable with the mark."""
_ENDING_S = 20.0
"""How long a command that was asked to end may take."""
_LEAVING_S = 5.0
"""How long Ray's daemons may take to notice that the driver has gone."""


def supervise(command: Sequence[str], environment: Mapping[str, str], output: Path) -> int:
    """Run ``command`` to its end, showing what it prints. Returns its exit code, 1 for a signal.

    A reason that the watchdog gave is told again as the last line. Interrupted, it ends the command first.

    Raises:
        KeyboardInterrupt: after everything has been ended.
    """
    mark, before = uuid.uuid4().hex, shared_memory_files()
    child = subprocess.Popen(
        command,
        env={**os.environ, **environment, VARIABLE: mark},
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C comes to this process alone, which ends the others in order
    )
    reasons: deque[str] = deque(maxlen=1)
    reader = threading.Thread(target=_forward, args=(child, reasons), daemon=True)
    reader.start()
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = child.wait()
        reader.join(timeout=2)
    except KeyboardInterrupt:
        print("interrupted; ending the run's processes", file=sys.stderr, flush=True)
        _ask_to_end(child)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
        end_marked(mark)
        remove_abandoned(before)
    if reasons:
        print(f"error: {reasons[-1]}", file=sys.stderr, flush=True)
    elif code not in (0, 2):
        print(f"error: the run has failed (exit code {code}); its output is above", file=sys.stderr, flush=True)
    return code if code >= 0 and not reasons else 1


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _forward(child: subprocess.Popen, reasons: deque[str]) -> None:
    """Show the child's stderr and keep the watchdog's reason."""
    assert child.stderr is not None
    for line in child.stderr:
        sys.stderr.write(line)
        sys.stderr.flush()
        if MARK in line:
            reasons.append(line.partition(MARK)[2].strip())


def _ask_to_end(child: subprocess.Popen) -> None:
    child.terminate()
    try:
        child.wait(_ENDING_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def marked_processes(mark: str) -> list[psutil.Process]:
    """Living processes with ``mark`` in their environment, this one excepted."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(VARIABLE) == mark:
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def end_marked(mark: str) -> None:
    """Wait a little for the run's processes to leave by themselves, then kill those that are left."""
    deadline = time.monotonic() + _LEAVING_S
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=5)
