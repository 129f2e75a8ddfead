"""Runs of commands that may be killed: started, found again with all their descendants, ended, cleared up after."""

import importlib
import itertools
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

MARK = "VERL_DFT_FAULTS_RUN"
"""Environment variable by which a descendant is known, whatever has become of its parents."""
_GRACE_S = 15.0
"""How long descendants may take to notice that the command is gone."""
_FIRST, _LAST = 20_000, 30_000
_PORTS = (_FIRST + (os.getpid() * 101 + n) % (_LAST - _FIRST) for n in itertools.count())
"""Programs that run at the same time start far apart."""


class Found(NamedTuple):
    """A living process."""

    pid: int
    title: str


@dataclass
class Run:
    """One command. ``codes``: exit code of each of its first processes (negative: a signal); None while it runs."""

    mark: str
    log: Path
    pids: list[int]
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self) -> bool:
        """Whether all of it has ended. Of several ranks the others are ended with one that fails, as torchrun does."""
        for pid in self.pids:
            if pid not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        if any(self.codes.values()):
            for pid in self.pids:
                if pid not in self.codes:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    self.codes[pid] = -signal.SIGTERM
        if len(self.codes) == len(self.pids) and self.ended is None:
            self.ended = time.monotonic()
        return self.ended is not None

    def kill(self) -> None:
        """Kill the command's own processes."""
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, signal.SIGKILL)
        self.wait(10)

    def wait(self, seconds: float) -> bool:
        """Whether it ended within so long."""
        deadline = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    @property
    def code(self) -> int:
        """0 where all processes ended with 0, else that of the one that says most: killed, failed, ended with it."""
        codes = set(self.codes.values())
        failed = [code for code in codes if code not in (0, -signal.SIGTERM)]
        return min(failed or codes)

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.started

    @property
    def text(self) -> str:
        """What it printed."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""

    def family(self) -> list[Found]:
        """Every living process of it."""
        return _living(self.mark, set(self.pids))

    def find(self, title: str) -> list[int]:
        """Descendants whose command line matches."""
        return [found.pid for found in self.family() if re.search(title, found.title)]

    def clear(self) -> list[str]:
        """Kill what is left; returns the titles of descendants that outlived the command by more than the grace."""
        deadline = time.monotonic() + _GRACE_S
        while (left := self.family()) and time.monotonic() < deadline:
            self.poll()
            time.sleep(0.1)
        for found in left:
            with suppress(ProcessLookupError):
                os.kill(found.pid, signal.SIGKILL)
        if self.ended is None:
            self.wait(10)
        return [found.title[:120] for found in left]


def start(call: str | None, argv: Sequence[str], env: Mapping[str, str], log: Path, mark: str, ranks: int = 0) -> Run:
    """Start ``verl-dft *argv``, or ``call(argv)`` (``module:function``) in a process forked from this one.

    Args:
        call: None: the command in a fresh interpreter. A forked one has this process's imports and nothing else.
        ranks: so many processes with the environment that torchrun would give them; 0: one without it.
    """
    port = _free_port()
    pids = []
    for rank in range(ranks or 1):
        several = {} if not ranks else {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        pid = os.fork()
        if pid == 0:
            _become(call, list(argv), {**env, MARK: mark, **several}, log)
        pids.append(pid)
    return Run(mark, log, pids)


def _become(call: str | None, argv: list[str], env: Mapping[str, str], log: Path) -> None:
    """The child's side; does not return."""
    code = 1
    try:
        os.setsid()
        os.environ.update(env)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if call is None:
            os.execv(sys.executable, [sys.executable, "-m", "verl_dft.cli", *argv])
        sys.argv = ["verl-dft", *argv]
        module, _, name = call.partition(":")
        code = int(getattr(importlib.import_module(module), name)(argv) or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _free_port() -> int:
    """One that the system gives to nobody by itself: rank 0 listens on it only a second later."""
    for port in _PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError


def _living(mark: str, sessions: set[int]) -> list[Found]:
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if state in "ZX" or int(folder.name) == os.getpid():
                continue
            if int(session) in sessions or wanted in (folder / "environ").read_bytes().split(b"\0"):
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found.append(Found(int(folder.name), title))
    return found


def wait_for(run: Run, condition: Callable[[], object], seconds: float) -> object:
    """The first true value of ``condition`` while the run goes on; None where it ends or the time does."""
    deadline = time.monotonic() + seconds
    while not run.poll() and time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    return None


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def abandoned(names: set[str]) -> set[str]:
    """Those of ``names`` that are this user's and that no living process has open or mapped."""
    found = {}
    for name in names:
        with suppress(OSError):
            status = os.stat(f"/dev/shm/{name}")
            if status.st_uid == os.getuid():
                found[status.st_ino] = name
    # by number: a semaphore is mapped under another name than its own
    for process in Path("/proc").glob("[0-9]*") if found else []:
        with suppress(OSError):
            lines = (process / "maps").read_text(errors="replace").splitlines()
            for line in lines:
                if "/dev/shm/" in line:
                    found.pop(int(line.split()[4]), None)
        with suppress(OSError):
            for link in (process / "fd").iterdir():
                with suppress(OSError):
                    found.pop(os.stat(link).st_ino, None)
    return set(found.values())
