"""Accuracy during training: logged once, as ``verl-dft evaluate`` writes it, and training is as without it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import ForkServer, TrainArgv, assert_same_weights, losses

from verl_dft.end_processes import still_running
from verl_dft.training.resume import completed_steps

pytestmark = pytest.mark.integration
REAL = ("eval.benchmark=arithmetic", "eval.limit=8", "eval.n=2")
SCRIPTED = ("eval.planner=scripted_evaluation.plan",)
STEPS = 5


@pytest.fixture(scope="session")
def argv(train_argv: TrainArgv) -> TrainArgv:
    """Five steps, a checkpoint at every second one, an evaluation before the first, at the third and at the last."""

    def build(out: Path, *overrides: str, **kwargs: Path) -> list[str]:
        common = (f"trainer.total_training_steps={STEPS}", "trainer.save_freq=2", "trainer.logger=[tensorboard]")
        every = ("trainer.eval_every=3", "trainer.eval_before_train=true")
        return train_argv(out, *common, *every, *overrides, **kwargs)

    return build


def evaluations(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/failed" in line]


def without_time(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "eval/seconds"} for line in lines]


def calls(out: Path) -> dict[int, int]:
    """How often each step's command was started."""
    files = {int(path.parent.name.removeprefix("step_")): path for path in out.glob("eval/step_*/calls")}
    return {step: len(files[step].read_text().split()) for step in sorted(files)}


@pytest.fixture(
    scope="module", params=[pytest.param(1, id="1-rank"), pytest.param(2, id="2-ranks", marks=pytest.mark.slow)]
)
def whole(
    request: pytest.FixtureRequest, ranks: ForkServer, argv: TrainArgv, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """A run that nothing interrupts, with the scripted command, and its number of ranks."""
    out = tmp_path_factory.mktemp("whole") / "run"
    log = ranks.ok(argv(out, *SCRIPTED), world=request.param)
    for step in (0, 3, STEPS):
        assert f"step {step}: scripted " in log
    return request.param, out


def test_steps_and_numbers(whole: tuple[int, Path]) -> None:
    _, out = whole
    lines = evaluations(out)
    assert [line["step"] for line in lines] == [0, 3, STEPS] and calls(out) == {0: 1, 3: 1, STEPS: 1}
    for line in lines:
        result = json.loads((out / "eval" / f"step_{line['step']}" / "result.json").read_text())
        assert line["eval/scripted/avg"] == result["avg"] and line["eval/failed"] == 0
        assert [line["eval/scripted/ci95_low"], line["eval/scripted/ci95_high"]] == result["avg_ci95"]
        assert line["eval/scripted/ci95_half_width"] == pytest.approx(0.25)
        assert (line["eval/scripted/truncated_frac"], line["eval/scripted/no_answer_frac"]) == (0.25, 0.0)
    assert len({line["eval/scripted/avg"] for line in lines}) == 3, "the weights are not those of the step"
    assert not list(out.glob("eval/*/model")) and (out / "model" / "model.safetensors").is_file()


def test_tensorboard_got_them(whole: tuple[int, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole[1] / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/scripted/avg")] == [0, 3, STEPS]


def test_training_is_as_without_it(whole: tuple[int, Path], ranks: ForkServer, argv: TrainArgv, tmp_path: Path) -> None:
    world, out = whole
    ranks.ok(argv(tmp_path / "run", "trainer.eval_every=null"), world=world)
    assert not (tmp_path / "run" / "eval").exists()
    for key in ("train/loss", "train/grad_norm", "train/lr"):
        assert losses(out, key) == losses(tmp_path / "run", key), key
    assert_same_weights(out / "model", tmp_path / "run" / "model", atol=0)


@pytest.mark.parametrize(
    ("failpoint", "again"),
    [
        ("evaluation.started", {0: 2, 3: 1, STEPS: 1}),  # before step 1, with nothing answered
        ("evaluation.before_log:2", {0: 1, 3: 1, STEPS: 1}),  # step 3 answered; the run goes on from step 2
        pytest.param(
            "evaluation.after_log:2", {0: 1, 3: 1, STEPS: 1}, marks=[pytest.mark.slow, pytest.mark.nightly]
        ),  # step 3 logged, and its weights not deleted yet
        ("evaluation.before_log:3", {0: 1, 3: 1, STEPS: 1}),  # after the last step: only this is left to do
        pytest.param("evaluation.after_log:3", {0: 1, 3: 1, STEPS: 1}, marks=[pytest.mark.slow, pytest.mark.nightly]),
        pytest.param("worker.step:5", {0: 1, 3: 1, STEPS: 1}, marks=[pytest.mark.slow, pytest.mark.nightly]),
    ],
)
def test_killed_and_resumed(
    failpoint: str, again: dict, whole: tuple[int, Path], ranks: ForkServer, argv: TrainArgv, tmp_path: Path
) -> None:
    """No evaluation that was answered is run again, none is logged twice, none is lost."""
    world, reference = whole
    command = argv(tmp_path / "run", *SCRIPTED)
    killed = ranks.run(command, world=world, env={"VERL_DFT_FAILPOINT": failpoint})
    assert -signal.SIGKILL in killed.codes
    ranks.ok(command, world=world)
    assert without_time(evaluations(tmp_path / "run")) == without_time(evaluations(reference))
    found = calls(tmp_path / "run")
    if failpoint == "evaluation.started":  # the command died with its trainer, perhaps before it wrote its line
        again, found = {**again, 0: 0}, {**found, 0: 0}
    assert found == again
    assert losses(tmp_path / "run") == losses(reference) and not list(tmp_path.glob("run/eval/*/model"))
    ranks.ok(command, world=world)  # nothing is left to do
    assert calls(tmp_path / "run") | {0: 0} == again | {0: 0}
    assert without_time(evaluations(tmp_path / "run")) == without_time(evaluations(reference))


@pytest.mark.parametrize(
    ("number", "world"),
    [
        pytest.param(signal.SIGKILL, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_trainer_leaves_no_command_behind(
    number: signal.Signals, world: int, argv: TrainArgv, tmp_path: Path
) -> None:
    """One rank in the process of ``verl-dft train``, and two that it started."""
    out = tmp_path / "run"
    env = {**os.environ, "SCRIPTED_EVALUATION": "sleep", "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "verl_dft.cli", "train", *argv(out, *SCRIPTED, f"trainer.n_gpus_per_node={world}")],
        env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    file, deadline = out / "eval" / "step_0" / "calls", time.monotonic() + 90
    while not (file.exists() and file.read_text().strip()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.1)
    evaluation = psutil.Process(int(file.read_text()))
    family = psutil.Process(process.pid).children(recursive=True)
    assert evaluation in family
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert not still_running(lambda: family, 15)
    if number == signal.SIGINT:
        assert process.returncode == 1 and stderr.splitlines()[-1].startswith("interrupted; run the same command")


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_failed_evaluation_is_told_and_counted(
    ranks: ForkServer, argv: TrainArgv, tmp_path: Path, world: int
) -> None:
    out = tmp_path / "run"
    log = ranks.ok(argv(out, *SCRIPTED), world=world, env={"SCRIPTED_EVALUATION": "fail"})
    assert without_time(evaluations(out)) == [{"step": step, "eval/failed": 1} for step in (0, 3, STEPS)]
    warning = "warning: the evaluation after step 3 failed (exit code 3; the last it said: error: it was told to fail;"
    assert log.count(warning) == 1 and "training goes on" in log and log.count("warning: the evaluation") == 3
    assert (out / "model" / "model.safetensors").is_file() and len(losses(out)) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_a_failed_evaluation_stops_where_it_should(
    ranks: ForkServer, argv: TrainArgv, tmp_path: Path, run_cli: Callable, whole: tuple[int, Path], world: int
) -> None:
    """With a checkpoint of that step, from which the same command goes on once the cause is mended."""
    out = tmp_path / "run"
    command = argv(out, *SCRIPTED, "trainer.eval_before_train=false", f"trainer.n_gpus_per_node={world}")
    env = {"SCRIPTED_EVALUATION": "fail", "PYTHONPATH": str(Path(__file__).parent)}
    done = run_cli(["train", *command, "trainer.eval_failure=stop"], timeout=120, env=env)
    assert done.rc == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the evaluation after step 3 failed (exit code 3; the last it said: error: it was")
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert completed_steps(out / "checkpoints")[-1] == 3 and len(losses(out)) == 3
    log = ranks.ok(command, world=world)
    assert "resuming after step 3" in log and calls(out) == {3: 2, STEPS: 1}
    steps = [(line["step"], line["eval/failed"]) for line in evaluations(out)]
    assert steps == [(3, 1), (3, 0), (STEPS, 0)] and len(losses(out)) == STEPS
    assert world != whole[0] or losses(out) == losses(whole[1])


@pytest.mark.alone
@pytest.mark.slow
def test_the_real_command(
    ranks: ForkServer, train_argv: TrainArgv, tiny_base: Path, tmp_path: Path, run_cli: Callable
) -> None:
    """The score of the last step is that of ``verl-dft evaluate`` on the model that the run leaves."""
    out = tmp_path / "run"
    command = train_argv(out, *REAL, "trainer.total_training_steps=2", "trainer.eval_every=2", model=tiny_base)
    log = ranks.ok([*command, "trainer.keep_eval_models=true"], timeout=240)
    assert "step 2: arithmetic " in log
    (line,) = evaluations(out)
    by_hand = ["evaluate", f"model={out / 'model'}", "benchmark=arithmetic", "limit=8", "n=2"]
    done = run_cli([*by_hand, f"output_dir={tmp_path / 'by_hand'}"], timeout=120)
    assert done.rc == 0, done.stderr[-3000:]
    assert_same_weights(out / "model", out / "eval" / "step_2" / "model", atol=0)
    result = json.loads((tmp_path / "by_hand" / "result.json").read_text())
    assert (line["step"], line["eval/arithmetic/avg"]) == (2, result["avg"])
    assert [line["eval/arithmetic/ci95_low"], line["eval/arithmetic/ci95_high"]] == result["avg_ci95"]
    assert line["eval/arithmetic/mean_response_tokens"] == result["mean_response_tokens"]
    assert (out / "eval" / "step_2" / "samples.html").is_file()


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "ray"])
@pytest.mark.nightly
def test_the_real_command_with_two_ranks(
    launcher: str, train_argv: TrainArgv, tiny_base: Path, tmp_path: Path, run_cli: Callable
) -> None:
    out = tmp_path / "run"
    command = train_argv(out, *REAL, "trainer.total_training_steps=3", "trainer.eval_every=2", model=tiny_base)
    more = [f"launcher={launcher}", "trainer.n_gpus_per_node=2", "trainer.eval_before_train=true"]
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="vd") as short:
        done = run_cli(["train", *command, *more], timeout=400, env={"TMPDIR": short})
    assert done.rc == 0, done.stderr[-3000:]
    lines = evaluations(out)
    assert [(line["step"], line["eval/failed"]) for line in lines] == [(0, 0), (2, 0), (3, 0)]
    for line in lines:
        result = json.loads((out / "eval" / f"step_{line['step']}" / "result.json").read_text())
        assert line["eval/arithmetic/avg"] == result["avg"] and result["num_samples"] == 16


@pytest.mark.nightly
@pytest.mark.slow
def test_the_real_command_killed_and_resumed(
    train_argv: TrainArgv, ranks: ForkServer, tiny_base: Path, tmp_path: Path
) -> None:
    """Killed inside the evaluation itself, after a stored shard: training goes on, and a resumed run fills the gap."""
    out = tmp_path / "run"
    options = ("trainer.total_training_steps=1", "trainer.eval_every=1", "+eval.overrides.shard_size=4")
    command = train_argv(out, *REAL, *options, model=tiny_base)
    log = ranks.ok(command, env={"VERL_DFT_FAILPOINT": "store.after_rename:2"}, timeout=240)
    assert "warning: the evaluation after step 1 failed (signal 9;" in log
    assert [line["eval/failed"] for line in evaluations(out)] == [1]
    log = ranks.ok(command, timeout=240)
    assert "all 1 steps are done already" in log and "step 1: arithmetic " in log
    result = json.loads((out / "eval" / "step_1" / "result.json").read_text())
    assert (result["num_reused"], result["num_generated"]) == (8, 8)
    assert [line["eval/failed"] for line in evaluations(out)] == [1, 0]
