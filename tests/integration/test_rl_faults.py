"""Processes of an online run killed and stopped: one clear line, nothing left, and the result of an uninterrupted run.

Each run goes on from the checkpoints of the one before, in one folder: starting takes a minute. The tests here are in
this order.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import assert_same_weights, turn_a_bit
from rl_process import DRIVER, ENGINE, LOOPS, WORKER, RlProcess, rewards

from verl_dft.training.resume import completed_steps

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]
TOTAL = 6
STEPS = (f"trainer.total_training_steps={TOTAL}", "trainer.save_freq=2", "actor_rollout_ref.actor.optim.lr=1e-3")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that dies again and again."""
    return tmp_path_factory.mktemp("faults") / "run"


@pytest.fixture
def start(repo_root: Path) -> Iterator[Callable[..., RlProcess]]:
    """``start(out, *overrides, failpoint=…)``: a run, which does not outlive the test."""
    runs: list[RlProcess] = []

    def begin(folder: Path, *overrides: str, failpoint: str | None = None) -> RlProcess:
        env = {**os.environ, "VERL_DFT_FAILPOINT": failpoint} if failpoint else None
        runs.append(RlProcess(folder, *STEPS, *overrides, env=env, cwd=repo_root))
        return runs[-1]

    yield begin
    for run in runs:
        run.clean()


def whole(out: Path) -> list[int]:
    return completed_steps(out / "checkpoints")


def test_the_trainer_dies_while_saving(start: Callable, out: Path, repo_root: Path) -> None:
    """Meanwhile a second run in the folder is refused."""
    run = start(out, failpoint="checkpoint.before_marker:2")
    run.wait_for(lambda: run.find(WORKER))
    command = [sys.executable, "-m", "verl_dft.cli", "rl", *("--config-name", "tiny/rl"), f"output_dir={out}"]
    second = subprocess.run(command, capture_output=True, text=True, cwd=repo_root, timeout=120)
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert f"is in use by another verl-dft rl (process {run.process.pid} on " in second.stderr

    code, line = run.end(400)
    assert code == 1 and line.startswith("error: the trainer's process has died after step 4 (killed"), line
    assert line.endswith("run the same command again to go on from step 2") and whole(out) == [2]
    assert (out / "checkpoints" / "global_step_4" / "actor").is_dir()  # half a checkpoint, which does not count

    file = next((out / "checkpoints" / "global_step_2" / "actor").glob("model_*.pt"))
    turn_a_bit(file)
    code, line = start(out).end(120)
    assert code == 2 and line.startswith(f"error: {file} is damaged; delete ") and line.endswith("it starts over"), line
    turn_a_bit(file)  # back


@pytest.mark.nightly
def test_the_engine_dies_while_the_trainer_updates(start: Callable, out: Path) -> None:
    """The trainer does not use the engine, and hangs besides."""
    run = start(out)
    engine = run.wait_for(lambda: run.find(ENGINE))
    run.caught(WORKER, "update_actor").suspend()
    code, line, seconds = run.killed(engine)
    assert code == 1 and line.startswith("error: the vLLM engine of vllm_server_0_0 has died ("), line
    assert line.endswith(" in step 3 while updating; run the same command again to go on from step 2")
    assert seconds < 60 and whole(out) == [2]


@pytest.mark.nightly
def test_a_worker_that_writes_responses_dies_while_sampling(start: Callable, out: Path) -> None:
    """verl would wait for its responses for ever."""
    run = start(out)
    engine = run.wait_for(lambda: run.find(ENGINE))
    run.wait_for(lambda: run.find("ray::vLLMHttpServer.generate"))
    engine.suspend()  # no response comes
    time.sleep(2)
    code, line, seconds = run.killed(run.find(LOOPS))
    assert code == 1 and line.startswith("error: an agent loop worker (AgentLoopWorkerTQ, process "), line
    assert " while sampling and grading; run the same command again" in line and seconds < 60
    assert whole(out) == [2]


@pytest.mark.nightly
def test_the_result_is_that_of_an_uninterrupted_run(start: Callable, out: Path, tmp_path: Path) -> None:
    """After three deaths, and one just after a checkpoint."""
    run = start(out, failpoint="checkpoint.after_marker:1")
    code, line = run.end(400)
    assert code == 1 and line.endswith("run the same command again to go on from step 4"), line
    assert whole(out) == [2, 4]
    assert start(out).end(400)[0] == 0

    reference = tmp_path / "reference"
    assert start(reference).end(400)[0] == 0
    assert rewards(out) == rewards(reference) and list(rewards(out)) == list(range(1, TOTAL + 1))
    assert whole(out) == whole(reference) == [4, 6]
    assert_same_weights(out / "model", reference / "model", atol=1e-6)


@pytest.mark.nightly
def test_a_start_that_takes_too_long(start: Callable, tmp_path: Path) -> None:
    code, line = start(tmp_path / "run", "limits.start=4").end(200)
    assert code == 1 and "the run hangs: more than limits.start=4 seconds" in line, line
    assert "while the workers started; run the same command again to start over" in line


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("limit", "during", "stopped", "phase"),
    [
        ("sample", ("ray::vLLMHttpServer", "generate"), ENGINE, "sampling and grading"),
        ("update", (WORKER, "update_actor"), WORKER, "updating"),
    ],
)
def test_a_part_that_hangs(
    start: Callable, tmp_path: Path, limit: str, during: tuple[str, str], stopped: str, phase: str
) -> None:
    """Everybody lives, and one does nothing any more."""
    run = start(tmp_path / "run", f"limits.{limit}=40")
    run.trained(1)
    process = run.find(stopped)
    run.caught(*during)
    process.suspend()
    code, line = run.end(120)
    assert code == 1 and f"the run hangs: more than limits.{limit}=40 seconds" in line, line
    assert f"while {phase}; run the same command again" in line, line


@pytest.mark.nightly
def test_nothing_is_left_of_a_run_whose_command_was_killed(start: Callable, tmp_path: Path) -> None:
    """Nor of one whose driver was, whose folder is free at once."""
    run = start(tmp_path / "run")
    run.wait_for(lambda: run.find(WORKER))
    assert run.killed(run.process, signal.SIGKILL)[0] == -signal.SIGKILL
    run = start(tmp_path / "run")
    run.wait_for(lambda: run.find("ray::"))
    code, line, _ = run.killed(run.find(DRIVER))
    assert code == 1 and line.startswith("error: the run's driver was ended by signal 9 (SIGKILL) before the end"), line


@pytest.mark.nightly
def test_a_cluster_that_is_too_small_is_refused(start: Callable, tmp_path: Path) -> None:
    few = ("trainer.n_gpus_per_node=2", "+ray_kwargs.ray_init.num_gpus=1")
    code, line = start(tmp_path / "run", *few).end(120)
    assert code == 2 and line.startswith("error: the Ray cluster has no room for 2 workers, one GPU and 3 CPU"), line
