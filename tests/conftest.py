"""Fixtures shared by every test: where things are, and how to run the command line in a process of its own."""

from __future__ import annotations

import os

# Read when numpy and torch are first imported, so before them. Each test process and each rank it starts gets one
# thread: ranks that share cores lose far more to each other's thread pools than they gain.
_TEST_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # A test never reaches the network: what it needs is in the tree, in shared/ or made by the test.
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MPLBACKEND": "Agg",
}
for _name, _value in _TEST_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Mapping, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NamedTuple  # noqa: E402

import psutil  # noqa: E402
import pytest  # noqa: E402

from verl_dft.end_processes import end_processes  # noqa: E402

REPO_ROOT = Path(__file__).resolve().parent.parent
collect_ignore = ["plugin_package"]  # a package with tests of its own: integration/test_plugin_package.py runs them
GRACE_S = 15
"""Seconds a timed-out command gets between SIGTERM and SIGKILL, so that torchrun can end its own ranks."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process for each core where `-m` leaves out what must have the machine to itself."""
    together = any(f"not {name}" in config.option.markexpr for name in ("integration", "alone"))
    return min(len(os.sched_getaffinity(0)), 8) if together else 0


class CliResult(NamedTuple):
    """What a finished command left: exit status and its whole output."""

    rc: int
    stdout: str
    stderr: str


@pytest.fixture(autouse=True)
def _tokenizers_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's trainer modules switch threads on when a test imports them; a child that another test forks would hang."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The project's root folder."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared material beside the project's root; the test is skipped where it is missing."""
    path = REPO_ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the shared material in {path}, which does not exist (it is not part of the project)")
    return path


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End `process`, its group and the descendants it had: torchrun and Ray put theirs in sessions of their own."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            pass
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
    end_processes(lambda: family, leaving_s=0)


def run_command(
    command: Sequence[str | Path],
    timeout: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> CliResult:
    """Run `command` in a process group of its own for at most `timeout` seconds.

    `env` is laid over this process's environment. Output goes through files, because a daemon that a command leaves
    behind would keep a pipe open for ever. On a timeout the group is ended and the test fails with the output's tail.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=cwd or REPO_ROOT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.poll() is None:
                _end_group(process)
        out.seek(0)
        err.seek(0)
        stdout, stderr = (stream.read().decode(errors="replace") for stream in (out, err))
    if timed_out:
        shown = " ".join(str(part) for part in command)
        pytest.fail(f"still running after {timeout} s: {shown}\n{stdout[-3000:]}\n{stderr[-3000:]}", pytrace=False)
    return CliResult(process.returncode, stdout, stderr)


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., CliResult]:
    """`run_cli(["train", ...], timeout=120, cwd=None, env=None)` runs `verl-dft` in a process of its own."""

    def run(
        args: Sequence[str | Path],
        timeout: float = 120,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> CliResult:
        return run_command([sys.executable, "-m", "verl_dft.cli", *args], timeout, cwd, env)

    return run


@pytest.fixture(scope="session", name="run_command")
def run_command_fixture() -> Callable[..., CliResult]:
    """`run_command([...], timeout, cwd=None, env=None)`: the same for any command."""
    return run_command
