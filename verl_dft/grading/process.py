"""One grading worker, seen from the process that started it: ask, wait, kill."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_START_TIMEOUT_S = 120.0
# The worker's own limit is CPU time, so that a busy machine does not change a verdict. This is for one that sleeps.
_WALL_FACTOR, _WALL_EXTRA_S = 3.0, 1.0


class WorkerDied(Exception):
    """The worker ended without a reply."""


class Worker:
    """One subprocess. ``ask`` returns its reply, raises ``TimeoutError`` or ``WorkerDied``; both leave it ended.

    Args:
        verify: ``module:function`` to call in it.
        timeout_s: seconds of CPU time for one request.
        memory_mb: address space in MB.
    """

    def __init__(self, verify: str, timeout_s: float, memory_mb: int) -> None:
        command = [sys.executable, "-m", "verl_dft.grading.worker", "--verify", verify]
        command += ["--timeout", str(timeout_s), "--memory-mb", str(memory_mb)]
        self._timeout_s = timeout_s
        try:
            self._start(command)
        except RuntimeError:
            if self._process.returncode != -signal.SIGKILL:  # else the kernel or a user did it
                raise
            self._start(command)

    def _start(self, command: Sequence[str]) -> None:
        self._buffer = b""
        with tempfile.TemporaryFile() as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=_worker_environment()
            )
            try:
                self._reply(_START_TIMEOUT_S)
            except (TimeoutError, WorkerDied) as error:
                stderr.seek(0)
                tail = stderr.read().decode(errors="replace").strip()[-2000:]
                raise RuntimeError(f"a grading worker did not start ({error}):\n{tail}") from None

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def ask(self, request: Sequence[str]) -> dict[str, Any]:
        """Send ``request`` and wait for its reply."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(list(request)).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died() from None
        return self._reply(_WALL_FACTOR * self._timeout_s + _WALL_EXTRA_S)

    def _reply(self, wall_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + wall_s
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        while b"\n" not in self._buffer:
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0:
                self.close()
                raise TimeoutError(f"no reply within {wall_s:g} s")
            if poll.poll(left_ms):
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise self._died()
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _died(self) -> Exception:
        # The pipe can close a moment before the process is gone; its own status is worth that moment.
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            pass
        self.close()
        if self._process.returncode == -signal.SIGPROF:
            return TimeoutError(f"more than {self._timeout_s:g} s of CPU time")
        return WorkerDied(f"worker ended with status {self._process.returncode}")

    def close(self) -> None:
        """Kill the process and free its pipes."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            try:
                stream.close()
            except OSError:  # a request that was never read is flushed into a broken pipe
                pass


def _worker_environment() -> dict[str, str]:
    """This process's environment without what an engine put there to be preloaded, and with this package importable."""
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    package_root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, environment.get("PYTHONPATH")]))
    environment["PYTHONSAFEPATH"] = "1"
    return environment
