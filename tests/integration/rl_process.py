"""A run of ``verl-dft rl`` on the tiny world whose processes a test can stop and kill, and what is left of it."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from verl_dft.end_processes import lives
from verl_dft.platform.shared_memory import shared_memory_files
from verl_dft.training.metrics import read_metrics

SMALL = ("--config-name", "tiny/rl", "trainer.logger=[]", "data.train_batch_size=4", "data.max_response_length=48")
ENGINE, WORKER, LOOPS, DRIVER = "VLLM::EngineCore", "ray::WorkerDict", "ray::AgentLoopWorkerTQ", r"online\.driver"


class RlProcess:
    """``RlProcess(out, *overrides)`` starts the command; its output goes to ``<out>.err`` and ``<out>.log``."""

    def __init__(self, out: Path, *overrides: str, env: dict[str, str] | None = None, cwd: Path) -> None:
        self.out, self._shared = out, shared_memory_files()
        self._err = out.with_suffix(".err")
        self._seen: dict[int, psutil.Process] = {}
        command = [
            sys.executable,
            "-m",
            "verl_dft.cli",
            "rl",
            *SMALL,
            "algorithm=grpo",
            f"output_dir={out}",
            *overrides,
        ]
        with open(out.with_suffix(".log"), "a") as log, open(self._err, "w") as err:
            self.process = subprocess.Popen(command, stdout=log, stderr=err, env=env, cwd=cwd, start_new_session=True)

    def processes(self) -> list[psutil.Process]:
        """The living ones of all that have been seen; to be called now and then, for one that is alone is not found."""
        for root in [self.process.pid, *self._seen]:
            try:
                found = psutil.Process(root)
                for process in [found, *found.children(recursive=True)]:
                    self._seen.setdefault(process.pid, process)
            except psutil.NoSuchProcess:
                continue
        return [process for process in self._seen.values() if lives(process)]

    def find(self, title: str) -> psutil.Process | None:
        """A process of which the title, which Ray sets to what it is doing, matches."""
        for process in self.processes():
            try:
                if process.pid != self.process.pid and re.search(title, " ".join(process.cmdline())):
                    return process
            except psutil.Error:
                continue
        return None

    def caught(self, title: str, doing: str) -> psutil.Process:
        """The process of that title once it is doing that, which may last a tenth of a second."""
        process = self.wait_for(lambda: self.find(title))
        self.wait_for(lambda: re.search(doing, " ".join(process.cmdline())))
        return process

    def wait_for(self, condition: Callable[[], object], seconds: float = 300) -> object:
        """The first true value of ``condition``; the run must go on meanwhile."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert self.process.poll() is None, self.tail()
            assert time.monotonic() < deadline, self.tail()
            time.sleep(0.01)
        return value

    def trained(self, count: int) -> None:
        """Wait until this process has trained ``count`` steps."""
        self.wait_for(lambda: (self.out / "metrics.jsonl").is_file())
        begun = self.steps_on_disk()
        self.wait_for(lambda: self.steps_on_disk() >= begun + count)

    def steps_on_disk(self) -> int:
        path = self.out / "metrics.jsonl"
        return path.read_text().count("\n") if path.is_file() else 0

    def killed(self, process: psutil.Process | None, number: signal.Signals = signal.SIGKILL) -> tuple[int, str, float]:
        """Kill, and wait for the end: exit code, last line, and seconds until nothing was left."""
        assert process is not None, self.tail()
        self.processes()
        begun = time.monotonic()
        process.send_signal(number)
        return *self.end(60), time.monotonic() - begun

    def end(self, seconds: float) -> tuple[int, str]:
        """Wait for the end; nothing may be left after ``seconds``. Returns exit code and last line."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            self.process.poll()
            time.sleep(0.1)
        assert not left, f"left after {seconds} s: {[process.cmdline()[:3] for process in left]}\n{self.tail()}"
        assert shared_memory_files() <= self._shared
        return self.process.wait(1), (self._err.read_text().splitlines() or [""])[-1]

    def tail(self) -> str:
        return self._err.read_text(errors="replace")[-3000:]

    def clean(self) -> None:
        """Kill whatever a failed test has left."""
        for process in self.processes():
            process.kill()
        self.process.wait()


def rewards(out: Path) -> dict[int, float]:
    """Mean reward by step; each step is there once."""
    lines = read_metrics(out / "metrics.jsonl")
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    return {line["step"]: line["critic/rewards/mean"] for line in lines}
