"""verl's GRPO trainer, with its vLLM server and weight sync, trains the tiny base model with our policy losses."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from online import ENVIRONMENT, HERE, overrides, write_prompts
from online_turns import VARIABLE

from verl_dft.end_processes import lives, still_running
from verl_dft.platform.shared_memory import remove_abandoned, shared_memory_files

pytestmark = [pytest.mark.integration, pytest.mark.alone]
POLICY_LOSS = "actor_rollout_ref.actor.policy_loss"
MARK = "VERL_DFT_ONLINE_TEST"
TURNS = [
    ("sft", {}),
    ("dft", {}),
    ("gft", {}),
    ("is_sft", {"behavior": "self"}),
    ("iw_sft", {}),
    ("psft", {}),
    ("chord", {}),
    ("focal", {}),
    ("luffy", {}),
    ("chord_mix", {}),
]
STEPS = 2
"""Steps of each objective."""


def marked_processes(mark: str) -> list[psutil.Process]:
    """Living processes that inherited the run's mark, whatever session Ray put them in."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and lives(process):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.fixture
def train(run_command: Callable, tmp_path: Path, repo_root: Path) -> Iterator[Callable]:
    """`train([overrides], timeout, env)` runs verl's `main_ppo`; returns its result and the metrics of each step.

    Afterwards no process may be left, and no shared memory that a process still holds.
    """
    mark, before = str(tmp_path), shared_memory_files()
    log = tmp_path / "metrics.jsonl"

    def run(extra: Sequence[str], timeout: float, env: Mapping[str, str] | None = None) -> tuple:
        prompts = write_prompts(tmp_path / "prompts.parquet", 32)
        command = [sys.executable, "-m", "verl.trainer.main_ppo"]
        command += overrides(repo_root / "recipes" / "tiny" / "base", prompts, tmp_path)
        marks = {MARK: mark, "VERL_FILE_LOGGER_PATH": str(log)}
        done = run_command([*command, *extra], timeout, tmp_path, {**ENVIRONMENT, **marks, **(env or {})})
        steps = [json.loads(line)["data"] for line in log.read_text().splitlines()] if log.exists() else []
        return done, steps

    yield run
    alive = still_running(lambda: marked_processes(mark), 20)  # daemons notice that the driver is gone
    shown = [" ".join(process.cmdline())[:200] for process in alive]
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=10)
    remove_abandoned(before)
    assert not shown, f"processes were left behind: {shown}"
    assert shared_memory_files() <= before


def ours(step: dict) -> dict[str, float]:
    """The metrics of an objective among a step's, without their prefix."""
    theirs = ("loss", "grad_norm", "lr", "entropy")
    metrics = {k.removeprefix("actor/"): v for k, v in step.items() if k.startswith("actor/")}
    return {k: v for k, v in metrics.items() if k not in theirs and not k.startswith("perf/")}


def check_step(name: str, step: dict) -> None:
    """What holds in any step with objective ``name``."""
    metrics, updates = ours(step), 2
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert {"nll", "token_weight", "changed_frac", "tokens", "pg_loss"} <= set(metrics)
    assert metrics["tokens"] * updates == pytest.approx(step["response_length/mean"] * 32)  # end tokens included
    assert metrics["nll"] > 0 and 0 <= metrics["changed_frac"] <= 1 and step["actor/grad_norm"] > 0
    # vLLM sampled with the trainer's weights: about 1e-6 here, and some 1e-3 where a weight sync has failed
    assert step["training/rollout_probs_diff_mean"] < 2e-5


def check_objective(name: str, steps: list[dict]) -> None:
    """What tells ``name`` from the others, over its two steps."""
    for metrics in (ours(step) for step in steps):
        loss, nll, weight = metrics["pg_loss"], metrics["nll"], metrics["token_weight"]
        if name == "sft":
            assert loss == pytest.approx(nll, rel=1e-5) and weight == pytest.approx(1) and metrics["changed_frac"] == 0
        elif name in ("dft", "chord"):
            assert 0 < loss < nll and 0 < weight < 1
        elif name == "focal":
            assert 0 < loss < nll
        elif name == "gft":
            assert 0 < metrics["rectified_frac"] < 1 and metrics["advantage"] != 0
        elif name == "is_sft":  # all its rows are the policy's own, so the weight starts at 1 and stays near
            assert metrics["self_frac"] == metrics["stored_frac"] == 1 and metrics["unknown_frac"] == 0
            assert weight == pytest.approx(1, abs=0.2) and weight != 1
        elif name == "iw_sft":  # the second update of a step has moved away from the rollout policy
            assert metrics["log_ratio"] != 0 and weight == pytest.approx(1, abs=0.2)
        elif name in ("luffy", "chord_mix"):  # verl's own command: every row is the policy's
            assert metrics["others_frac"] == 0 and metrics["clipped_frac"] >= 0 and weight != 0
        elif name == "psft":
            assert loss == pytest.approx(-1, abs=0.2) and metrics["ratio"] != 1 and metrics["clipped_frac"] >= 0


@pytest.mark.slow
@pytest.mark.nightly
def test_every_online_objective_trains_two_steps(train: Callable) -> None:
    """One run, objectives in turn (see ``online_turns.py``)."""
    from verl_dft.training.policy_options import online_names

    assert sorted(name for name, _ in TURNS) == online_names()
    turns = [turn for turn in TURNS for _ in range(STEPS)]
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    env = {VARIABLE: json.dumps(turns), "VERL_USE_EXTERNAL_MODULES": "online_turns", "PYTHONPATH": path}
    done, steps = train(
        [f"trainer.total_training_steps={len(turns)}", "actor_rollout_ref.actor.optim.lr=1e-4"], 420, env
    )
    assert done.rc == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(steps) == len(turns)
    for index, (name, _) in enumerate(TURNS):
        mine = steps[index * STEPS : (index + 1) * STEPS]
        for step in mine:
            check_step(name, step)
        check_objective(name, mine)
    assert len({frozenset(ours(step)) for step in steps}) >= 5  # each logs its own


@pytest.mark.slow
@pytest.mark.nightly
def test_an_objective_and_its_option_from_verls_command_line(train: Callable) -> None:
    """As a user runs it; tau above 1 rectifies every token, and vLLM's own log-probs are the old ones."""
    extra = [f"{POLICY_LOSS}.loss_mode=gft", f"+{POLICY_LOSS}.objective.tau=1.5"]
    done, steps = train([*extra, "algorithm.rollout_correction.bypass_mode=true"], 300)
    assert done.rc == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(steps) == 2
    for step in steps:
        metrics = ours(step)
        assert metrics["rectified_frac"] == pytest.approx(1) and math.isfinite(metrics["pg_loss"])
        assert metrics["tokens"] * 2 == pytest.approx(step["response_length/mean"] * 32)
    assert "actor/nll:" in done.stdout


def test_what_cannot_run_online_ends_before_ray_starts(train: Callable) -> None:
    done, steps = train([f"{POLICY_LOSS}.loss_mode=asft"], 60)
    assert done.rc != 0 and not steps and "Started a local Ray instance" not in done.stdout + done.stderr
    assert "asft cannot run in verl's online trainer" in done.stderr and "verl-dft train objective=asft" in done.stderr
