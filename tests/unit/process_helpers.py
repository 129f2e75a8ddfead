"""Processes that a command may have left behind."""

import os

import psutil

from verl_dft.end_processes import lives


def with_id(number: int) -> list[psutil.Process]:
    """The process of that number, if there is one."""
    return [psutil.Process(number)] if psutil.pid_exists(number) else []


def of_session(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and lives(process):
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess, PermissionError):
            continue
    return found


def of_mark(mark: str) -> list[psutil.Process]:
    """Processes that inherited our environment, whatever session they have gone to."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("VERL_DFT_LEFTOVERS") == mark and lives(process):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found
