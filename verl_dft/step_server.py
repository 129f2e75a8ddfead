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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from signal import SIGKILL

from verl_dft.files import write_json
from verl_dft.processes import end_with_parent, tied

KINDS = ("train", "evaluate")
"""Verbs that can share a process."""


class Server:
    """The parent's side. ``kind`` is one of ``KINDS``; ``env`` is laid over this process's environment.

    What the process says before its first command goes to the open file ``log``.
    One command at a time; the process ends with this one, however that one ends.
    """

    def __init__(self, kind: str, env: Mapping[str, str], log: int) -> None:
        assert kind in KINDS
        self.kind = kind
        self._folder = tempfile.TemporaryDirectory(prefix="verl_dft_steps_")
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
        return self._process.poll() is None and (not self._num_sent or self._reply().is_file())

    def _reply(self) -> Path:
        return Path(self._folder.name, f"{self._num_sent}.json")

    def start(self, argv: Sequence[str], log: Path) -> "Served":
        """Have ``verl-dft *argv`` run."""
        assert self.idle and self._process.stdin is not None
        self._num_sent += 1
        request = {"argv": list(argv), "log": str(log.resolve()), "reply": str(self._reply())}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # it has just died, which `poll` tells
            pass
        return Served(self)

    def poll(self) -> int | None:
        """The exit code of the last command; None while it runs, the process's own where that has died over it."""
        code = self._process.poll()  # first: a reply may be the last thing that it writes
        if self._reply().is_file():
            return int(json.loads(self._reply().read_text())["code"])
        return code if code is None else code or 1

    def close(self) -> None:
        """End the process and what it runs. Safe to call twice."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._folder.cleanup()


class Served:
    """A command in a server: as much of a process as the runner of steps uses."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def poll(self) -> int | None:
        return self._server.poll()

    def terminate(self) -> None:
        self._server.close()

    def wait(self, timeout: float | None = None) -> None:
        """Nothing: :meth:`terminate` has waited."""


# ---- the process ----


def main(argv: Sequence[str]) -> int:
    """Answer requests until standard input ends."""
    run = {"train": _forking, "evaluate": _evaluating}[argv[0]]()
    for line in sys.stdin:
        request = json.loads(line)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        sys.argv = ["verl-dft", *request["argv"]]  # what manifests call the command
        code = run(request["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
        write_json(Path(request["reply"]), {"code": code})
    return 0


def _forking() -> Callable[[Sequence[str]], int]:
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

    return run


def _evaluating() -> Callable[[Sequence[str]], int]:
    """Every evaluation on the engine of the one before, where its weights fit there."""
    from verl_dft.cli import told
    from verl_dft.evaluation import command
    from verl_dft.sampling.shared import EngineHost

    host = EngineHost()

    def run(argv: Sequence[str]) -> int:
        try:
            return told(lambda: command.main(argv[1:], host))
        except Exception:
            traceback.print_exc()
            return 1

    return run


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
