"""Where a number comes from: the machine, the commit of the code, the time, a command as one would type it."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from verl_dft.files import versions


def made_here(of: str | None) -> dict[str, Any]:
    """``at`` (UTC), ``commit``, ``hardware`` and ``versions``, of what commit ``of`` made here."""
    return {"at": now(), "commit": of, "hardware": hardware(), "versions": versions()}


def now() -> str:
    """The time, UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@lru_cache
def hardware() -> str:
    """Processor, its logical cores that this process may use, and NVIDIA GPUs by name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join([processor(), f"{cores} logical cores", *_gpus()])


def processor() -> str:
    """The processor's name, or its kind where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str | None:
    """Commit of the checkout that the package runs from, `` with changes`` behind it; None outside of a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # a package below somebody else's repository is not of its commit
        return None
    found = _output("git", "-C", str(root), "rev-parse", "HEAD")
    if not found:
        return None
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--", "verl_dft", "configs", "recipes")
    return found + (" with changes" if changed else "")


def typed(command: str) -> str:
    """A step's command as one would type it."""
    python = shlex.quote(sys.executable)
    return command.replace(f"{python} -m verl_dft.cli", "verl-dft").replace(python, "python")


def relative(path: str | Path, root: Path) -> str:
    """``path`` as it is seen from ``root``; what lies elsewhere as it is."""
    return str(Path(path).relative_to(root)) if Path(path).is_relative_to(root) else str(path)


def _gpus() -> list[str]:
    names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]


def _output(*command: str) -> str:
    """What a command prints; nothing where it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
