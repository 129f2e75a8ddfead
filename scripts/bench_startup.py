"""How long each command takes until it does what it was called for, in wall time and in CPU time.

    python scripts/bench_startup.py [--repeats 5] [--only help train] [--model FOLDER]

`help` and `doctor` run to their end. `train` runs until the first step stands in metrics.jsonl, `evaluate` until the
first sample stands in its store (one problem, one sample, one token), both from nothing with the tiny world's base
(recipes/tiny/base) on the machine's CPU cores. CPU time is user and system time of the command and all its children up
to that moment, which neighbours disturb less than wall time: on a quiet machine the wall time of a start is at most
about its CPU time. The first run of each is left out of the table (it fills the caches of files and of tokenised rows).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
CLI = (sys.executable, "-m", "verl_dft.cli")


@dataclass(frozen=True)
class Start:
    """A command to measure.

    arguments: of ``verl-dft``; ``{model}``, ``{rows}`` and ``{out}`` are filled in.
    until: whether it has come as far as it is measured, given its output directory; None for its end.
    goal: seconds of wall time.
    """

    arguments: tuple[str, ...]
    goal: float
    until: Callable[[Path], bool] | None = None


def has_line(folder: Path, pattern: str) -> bool:
    """Whether a file of that pattern in ``folder`` holds a whole line."""
    return any(b"\n" in path.read_bytes() for path in folder.glob(pattern))


_TRAIN = ("train", "model={model}", "data={rows}", "output_dir={out}", "data.train_batch_size=16")
_EVALUATE = ("evaluate", "model={model}", "benchmark=arithmetic", "limit=1", "n=1", "max_tokens=1", "output_dir={out}")
STARTS = {
    "help": Start(("--help",), 0.5),
    "train help": Start(("train", "--help"), 0.5),
    "doctor": Start(("doctor",), 10),
    "train": Start(
        (*_TRAIN, "trainer.total_training_steps=200", "trainer.test_freq=-1", "trainer.logger=[]"),
        15,
        lambda out: has_line(out, "metrics.jsonl"),
    ),
    "evaluate": Start(_EVALUATE, 30, lambda out: has_line(out, "store/*.jsonl")),
}


def cpu_of(process: psutil.Process) -> float:
    """CPU seconds of a process, its children so far, and those that have ended."""
    total = 0.0
    for member in [process, *process.children(recursive=True)]:
        try:
            times = member.cpu_times()
            total += times.user + times.system
            if member.pid == process.pid:
                total += times.children_user + times.children_system
        except psutil.NoSuchProcess:
            continue
    return total


def measure(start: Start, fill: dict[str, str], out: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one run."""
    command = [*CLI, *(argument.format(**fill, out=out) for argument in start.arguments)]
    if start.until is None:
        before, begun = os.times(), time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, timeout=600)
        seconds, after = time.perf_counter() - begun, os.times()
        return seconds, after[2] + after[3] - before[2] - before[3]
    with (out.with_suffix(".log")).open("w") as log:
        begun = time.perf_counter()
        child = psutil.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        while not start.until(out):
            if child.poll() is not None and not start.until(out):
                sys.exit(f"{' '.join(command)} ended without it:\n{Path(log.name).read_text()[-2000:]}")
            if time.perf_counter() - begun > 600:
                sys.exit(f"{' '.join(command)} is not there after 600 s")
            time.sleep(0.01)
        return time.perf_counter() - begun, cpu_of(child)
    finally:
        members = child.children(recursive=True) if child.is_running() else []
        for member in [child, *members]:
            if member.is_running():
                member.kill()
        child.wait()


def shown(values: list[float]) -> str:
    """Smallest, median and largest."""
    return f"{min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f}"


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--model", default=str(REPOSITORY / "recipes" / "tiny" / "base"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_startup_") as temporary:
        rows = Path(temporary, "arithmetic")
        if "train" in options.only:
            made = [*CLI, "data", "make", "data=arithmetic", "data.source.num_rows=64", f"output_dir={rows}"]
            subprocess.run(made, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=600)
        fill = {"model": options.model, "rows": str(rows / "train.parquet")}
        print(f"{options.repeats} runs each, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        print("| command | wall s: min / median / max | CPU s: min / median / max | goal, wall | goal is |")
        print("|---|---|---|---:|---|", flush=True)
        for name in options.only:
            found = [
                measure(STARTS[name], fill, Path(temporary, f"{name}-{run}")) for run in range(options.repeats + 1)
            ]
            wall, cpu = ([run[which] for run in found[1:]] for which in (0, 1))
            goal = STARTS[name].goal
            met = "met" if max(wall) <= goal else "missed" if min(wall) > goal else "undecided"
            print(f"| {name} | {shown(wall)} | {shown(cpu)} | {goal:g} | {met} |", flush=True)


if __name__ == "__main__":
    main()
