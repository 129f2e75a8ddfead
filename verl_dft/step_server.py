"""Commands of one kind in one process: its imports, and an evaluation's engine, are paid once and not by each command.

``python -m verl_dft.step_server train`` imports verl and forks a child for each training, ``… evaluate`` has an engine
that takes each model's weights in turn. A request is a line of JSON on standard input: ``{"argv": [...], "log": FILE,
"reply": FILE}``; the command's output is added to ``log``, and ``reply`` appears with its exit code when it ends.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGKILL
from typing import Any

from verl_dft.files import write_json
from verl_dft.processes import end_with_parent, tied

KINDS = ("train", "evaluate")
"""Verbs that can share a process."""
PREFIX = "server_"
"""Of the folders of replies, which a killed parent leaves behind."""
_GRACE_S = 10


class Server:
    """The parent's side: a process that runs one command at a time, and ends with this one, however that one ends.

    Args:
        kind: one of ``KINDS``.
        env: laid over this process's environment.
        log: an open file for what the process says before its first command.
        folder: where a folder for its replies is made.
    """

    def __init__(self, kind: str, env: Mapping[str, str], log: int, folder: Path) -> None:
        assert kind in KINDS
        self.kind = kind
        self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder.resolve())
        self._last: Path | None = None
        self._num_sent = 0
        self._process = subprocess.Popen(
            tied([sys.executable, "-m", "verl_dft.step_server", kind]),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            text=True,
        )

    @property
    def idle(self) -> bool:
        """Whether it lives and has nothing to do."""
        return self.poll() is None and (self._last is None or self._last.is_file())

    def start(self, argv: Sequence[str], log: Path) -> "Served":
        """Have ``verl-dft *argv`` run."""
        assert self.idle and self._process.stdin is not None
        self._num_sent += 1
        self._last = Path(self._folder.name, f"{self._num_sent}.json")
        request = {"argv": list(argv), "log": str(log.resolve()), "reply": str(self._last)}
        with suppress(BrokenPipeError):  # it has just died, which `poll` tells
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return Served(self, self._last)

    def poll(self) -> int | None:
        """The process's exit code; None while it lives."""
        return self._process.poll()

    def close(self) -> None:
        """End the process and what it runs; one that is idle closes its engine first. Safe to call twice."""
        ends = [self._process.terminate, self._process.kill]
        if self.idle:
            ends.insert(0, lambda: None)  # the end of its input is enough
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        for end in ends:
            end()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_S)
                break
        self._folder.cleanup()


class Served:
    """A command in a server: as much of a process as the runner of steps uses."""

    def __init__(self, server: Server, reply: Path) -> None:
        self._server, self._reply = server, reply

    def poll(self) -> int | None:
        """The command's exit code; None while it runs, the process's own where that has died over it."""
        code = self._server.poll()  # first: a reply may be the last thing that it writes
        if self._reply.is_file():
            return int(json.loads(self._reply.read_text())["code"])
        return code if code is None else code or 1

    def terminate(self) -> None:
        self._server.close()

    def wait(self, timeout: float | None = None) -> None:
        """Nothing: :meth:`terminate` has waited."""


# ---- the process ----

Run = Callable[[Sequence[str]], int]
"""Runs ``verl-dft *argv`` and returns its exit code."""


def main(argv: Sequence[str]) -> int:
    """Answer requests until standard input ends."""
    with {"train": _forking, "evaluate": _evaluating}[argv[0]]() as run:
        for line in sys.stdin:
            _answer(json.loads(line), run)
    return 0


def _answer(request: Mapping[str, Any], run: Run) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.argv = ["verl-dft", *request["argv"]]  # what manifests call the command
    code = run(request["argv"])
    sys.stdout.flush()
    sys.stderr.flush()
    write_json(Path(request["reply"]), {"code": code})


@contextmanager
def _forking() -> Iterator[Run]:
    """Each command in a child of its own, so that none finds what another has left in torch or verl."""
    importlib.import_module("verl_dft.training.sft")
    from verl_dft import cli

    def run(argv: Sequence[str]) -> int:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                end_with_parent(SIGKILL)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # requests are its parent's
                if os.getppid() == parent:
                    code = cli.main(argv)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    yield run


@contextmanager
def _evaluating() -> Iterator[Run]:
    """Every evaluation on the engine of the one before, where its weights fit there."""
    from verl_dft.cli import told
    from verl_dft.evaluation import command
    from verl_dft.sampling.shared import EngineHost

    def run(argv: Sequence[str]) -> int:
        try:
            return told(lambda: command.main(argv[1:], host))
        except Exception:
            traceback.print_exc()
            return 1

    with EngineHost() as host:
        yield run


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
