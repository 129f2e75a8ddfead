"""A recipe of each paper for real at the tiny scale: killed at a random moment, continued, and the same report.

Shorter than at that scale (fewer steps, problems and samples), with the same graph.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from verl_dft.end_processes import still_running

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]

SHORT = {
    "data": ["verbs.data.data.source.num_rows=128"],
    "groups": ["steps.few.data.source.num_rows=64"],
    "rewrite": ["verbs.rewrite.self.n=2", "verbs.rewrite.guided.n=2"],
    "train": ["verbs.train.trainer.total_training_steps=6", "verbs.train.trainer.save_freq=2"],
    "rl": ["verbs.rl.trainer.total_training_steps=3", "verbs.rl.trainer.save_freq=1"],
    "evaluate": ["verbs.evaluate.limit=40", "verbs.evaluate.n=4"],
}
RUN_S = 300
"""Seconds that a whole run may take on a slow machine."""


def command(recipe: str, verbs: list[str], root: Path) -> list[str]:
    short = [override for verb in verbs for override in SHORT[verb]]
    return [sys.executable, "-m", "verl_dft.cli", "recipe", "run", recipe, "scale=tiny", f"output_dir={root}", *short]


def end_at(command: list[str], root: Path, seconds: float) -> bool:
    """Start the command and kill it, with nothing told to its children, after so long. Returns whether it ran yet."""
    with open(root.parent / f"{root.name}.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    running = process.poll() is None
    if running:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = still_running(lambda: family, 30)
    assert not left, f"left over: {left}"
    return running


def reported(root: Path, run_cli: Callable[..., Any]) -> dict[str, Any]:
    """What the report says that is not about when, how long or where."""
    done = run_cli(["report", root, f"output_dir={root.parent / 'report'}"], timeout=120)
    assert done.rc == 0, done.stderr
    (run,) = json.loads((root.parent / "report" / "report.json").read_text())["runs"]
    assert not run["problems"] and all(step["state"] == "done" for step in run["steps"])
    return {"cells": run["cells"], "numbers": [{**number, "steps": None} for number in run["numbers"]]}


@pytest.mark.parametrize(
    ("recipe", "verbs", "straight"),
    [
        pytest.param("dft/table1", ["data", "train", "evaluate"], True, id="dft"),
        pytest.param("data_rewriting/table2", ["data", "rewrite", "train", "evaluate"], True,
                     id="data_rewriting-compared", marks=pytest.mark.nightly),
        pytest.param("gft/sft_grpo", ["train", "rl", "evaluate"], False, id="staged", marks=pytest.mark.nightly),
        pytest.param("gft/fig6", ["groups", "train", "evaluate"], True, id="gft-compared", marks=pytest.mark.nightly),
    ],
)  # fmt: skip
def test_killed_at_random_it_goes_on_to_the_same_report(
    recipe: str, verbs: list[str], straight: bool, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    """``straight``: beside a run that nothing stopped; else the report is only complete."""
    root, seed = tmp_path / "killed", time.time_ns()
    moment = random.Random(seed).uniform(4, 90 if "rl" in verbs else 20)
    print(f"killed after {moment:.1f} s (seed {seed})")
    killed = end_at(command(recipe, verbs, root), root, moment)
    assert killed, "it had ended before"
    done = run_cli(command(recipe, verbs, root)[3:], timeout=RUN_S)
    assert done.rc == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = reported(root, run_cli)
    assert report["numbers"]
    if straight:
        other = tmp_path / "straight"
        done = run_cli(command(recipe, verbs, other)[3:], timeout=RUN_S)
        assert done.rc == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert reported(other, run_cli) == report
