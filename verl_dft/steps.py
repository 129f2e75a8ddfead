"""A run made of steps, each a command in a process of its own: in the order of their needs, resumed where it was left.

What a finished step depended on and made is recorded in ``<root>/steps/NAME.json``; run again, a step whose record
still holds is not run again. Killed in the middle, a step is run again by the same command in the same folder, where
it may find work it can continue; after a change of configuration its folder is emptied first.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from verl_dft.errors import InputError
from verl_dft.files import sha256_file, versions, write_json
from verl_dft.processes import tied
from verl_dft.provenance import commit, made_here
from verl_dft.step_server import PREFIX, Served, Server

_POLL_S = 0.2
_HEARTBEAT_S = 15.0
_GRACE_S = 5.0


@dataclass(frozen=True)
class Step:
    """One command.

    ``folder`` is the step's own: nothing else writes there, and it is emptied when the step's configuration changes.
    ``outputs`` must exist afterwards. ``inputs`` are files outside the run whose content matters. ``needs`` names steps
    that come first. ``progress`` says in a few words how far the running command is. ``label`` is what it is called on
    the terminal, where that is not its name. ``served`` are the command's arguments, verb first, where it may run in a
    process that others share (``step_server``).
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    outputs: tuple[Path, ...]
    inputs: tuple[Path, ...] = ()
    needs: tuple[str, ...] = ()
    progress: Callable[[], str] | None = None
    label: str | None = None
    served: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        return self.label or self.name


class StepError(RuntimeError):
    """A step failed; the message names it, its exit code and its log."""


@dataclass
class StepRunner:
    """Runs steps below ``root``, at most ``at_once`` at a time.

    ``track_code=False``: a step made by other code or with other versions is still done, and reported as such. Then a
    step's name and command have to say all that decides its outputs. ``share``: steps that may share a process do.

    Raises:
        InputError: ``root`` holds something else than such a run, or another process is running in it.
    """

    root: Path
    at_once: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    track_code: bool = True
    share: bool = False
    echo: Callable[[str], None] = lambda line: print(line, flush=True)

    def __post_init__(self) -> None:
        self.records, self.logs = self.root / "steps", self.root / "logs"
        self.running: dict[str, tuple[Step, subprocess.Popen[bytes] | Served, float]] = {}
        self.servers: list[Server] = []
        self.done: dict[str, dict[str, Any]] = {}
        self.failed: Step | None = None
        self.code = _code_hash()
        self.started = self.last_shown = time.monotonic()
        self.shown_width = 0

    def run(self, steps: Sequence[Step], begin: Callable[[], object] = lambda: None) -> dict[str, dict[str, Any]]:
        """Run what is not done yet. Returns each step's record (command, seconds, reused).

        Args:
            begin: called before the first step, when nobody else can be running in ``root``.

        Raises:
            StepError: a step failed or did not make its outputs; steps running beside it have been ended.
        """
        names = [step.name for step in steps]
        assert len(set(names)) == len(names) and all(need in names for step in steps for need in step.needs)
        self._claim_root()
        try:
            with FileLock(self.records / ".lock", timeout=0):
                for left in self.logs.glob(f"{PREFIX}*"):  # by a run that was killed
                    shutil.rmtree(left, ignore_errors=True)
                begin()
                return self._run(list(steps))
        except Timeout:
            raise InputError(
                f"output_dir={self.root}: another process is running in it; wait, or choose another"
            ) from None

    def _claim_root(self) -> None:
        if not self.records.is_dir() and self.root.is_dir() and any(self.root.iterdir()):
            raise InputError(f"output_dir={self.root} is not empty and holds no such run; choose another")
        self.records.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(exist_ok=True)

    def _run(self, waiting: list[Step]) -> dict[str, dict[str, Any]]:
        keys: dict[str, str] = {}
        try:
            while waiting or self.running:
                for step in [s for s in waiting if all(need in self.done for need in s.needs)]:
                    if step.name not in keys:
                        keys[step.name] = step_key(step, [self.done[need] for need in step.needs], self.track_code)
                        if self._reuse(step, keys[step.name]):
                            waiting.remove(step)
                            continue
                    if len(self.running) < self.at_once:
                        waiting.remove(step)
                        self._start(step, keys[step.name])
                time.sleep(_POLL_S if self.running else 0)
                self._collect(keys)
                self._show_progress()
        finally:
            self._end_all()
        return self.done

    # ---- one step ----

    def _record(self, step: Step) -> Path:
        return self.records / f"{step.name}.json"

    def log(self, step: Step) -> Path:
        """Where the step's output goes."""
        return self.logs / f"{step.name}.log"

    def tail(self, lines: int = 15) -> str:
        """The end of the failed step's log; empty where none has failed."""
        if self.failed is None:
            return ""
        text = self.log(self.failed).read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"  | {line[-300:]}" for line in text[-lines:])

    def _reuse(self, step: Step, key: str) -> bool:
        record = _read_json(self._record(step))
        if record.get("key") != key or record.get("status") != "done":
            return False
        if any(not Path(path).is_file() or sha256_file(path) != digest for path, digest in record["outputs"].items()):
            self._record(step).unlink()  # damaged: made anew in an empty folder
            return False
        self.done[step.name] = {**record, "reused": True}
        other = " by other code" if record.get("code", self.code) != self.code else ""
        self._say(f"{step.shown:<14} reused ({record['seconds']:.0f} s when it was made{other})")
        return True

    def _start(self, step: Step, key: str) -> None:
        continues = _read_json(self._record(step)).get("key") == key
        if not continues and step.folder.exists():
            shutil.rmtree(step.folder)
        started = {"key": key, "status": "started", "command": shlex.join(step.command), "commit": commit()}
        write_json(self._record(step), started)
        with open(self.log(step), "ab" if continues else "wb") as log:
            log.write(f"$ {shlex.join(step.command)}\n".encode())
            log.flush()
            process = self._process(step, log.fileno())
        self.running[step.name] = (step, process, time.monotonic())
        self._say(f"{step.shown:<14} {'continued' if continues else 'started'}, log: {self.log(step)}")

    def _process(self, step: Step, log: int) -> subprocess.Popen[bytes] | Served:
        """The step's command, begun."""
        if self.share and step.served:
            kind = step.served[0]
            server = next((server for server in self.servers if server.kind == kind and server.idle), None)
            if server is None:
                server = Server(kind, self.env, log, self.logs)
                self.servers.append(server)
            return server.start(step.served, self.log(step))
        return subprocess.Popen(
            tied(step.command),  # a killed run leaves nobody in its folders
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self.env},
        )

    def _collect(self, keys: Mapping[str, str]) -> None:
        for name, (step, process, begun) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[name]
            seconds = time.monotonic() - begun
            missing = [path for path in step.outputs if not path.is_file()]
            if code or missing:
                self.failed = step
                why = f"exit code {code}" if code else f"it did not write {missing[0]}"
                raise StepError(f"step {step.shown} failed after {seconds:.0f} s ({why}); its log: {self.log(step)}")
            outputs = {str(path): sha256_file(path) for path in step.outputs}
            record = {"key": keys[name], "status": "done", "command": shlex.join(step.command), "code": self.code}
            record |= {"seconds": round(seconds, 1), "outputs": outputs, "inputs": _hashes(step.inputs)}
            record["made"] = made_here(_read_json(self._record(step)).get("commit"))
            write_json(self._record(step), record)
            self.done[name] = {**record, "reused": False}
            self._say(f"{step.shown:<14} done in {seconds:.0f} s")

    def _end_all(self) -> None:
        for server in self.servers:
            server.close()
        self.servers.clear()
        processes = [process for _, process, _ in self.running.values()]
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.running.clear()

    # ---- what is shown ----

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        return f"[{minutes:02d}:{seconds:02d}]"

    def _say(self, text: str) -> None:
        self._clear()
        self.echo(f"{self._elapsed()} {text}")
        self.last_shown = time.monotonic()

    def _show_progress(self) -> None:
        if not self.running:
            return
        parts = [
            f"{step.shown} {step.progress() if step.progress else ''}".strip() for step, _, _ in self.running.values()
        ]
        line = f"{self._elapsed()} running: {'; '.join(parts)}"
        if sys.stdout.isatty():
            self._clear()
            print(line, end="\r", flush=True)
            self.shown_width = len(line)
        elif time.monotonic() - self.last_shown > _HEARTBEAT_S:
            self.echo(line)
            self.last_shown = time.monotonic()

    def _clear(self) -> None:
        if self.shown_width:
            print(" " * self.shown_width, end="\r", flush=True)
            self.shown_width = 0


def step_key(step: Step, needed: Iterable[Mapping[str, Any]], track_code: bool = True) -> str:
    """Hash of everything the step's outputs depend on: command, inputs, code, versions, records of the steps before."""
    before = sorted((record["key"], sorted(record["outputs"].values())) for record in needed)
    made_by = [_code_hash(), versions()] if track_code else []
    parts = [step.command, sorted(_hashes(step.inputs).values()), *made_by, before]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _code_hash() -> str:
    """Hash of the package's own modules and of the configs and recipes: after an edit nothing old is shown as new."""
    from verl_dft.paths import configs_dir, recipes_dir

    digest = hashlib.sha256()
    folders = {Path(__file__).resolve().parent: "*.py", configs_dir(): "*.yaml", recipes_dir(): "*.yaml"}
    for folder, pattern in folders.items():
        for path in sorted(folder.rglob(pattern)):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _hashes(paths: Iterable[Path]) -> dict[str, str]:
    return {str(path): sha256_file(path) for path in paths}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
