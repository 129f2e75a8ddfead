"""Accuracy during training without a training: what is run, when, in which environment, and what becomes of it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from omegaconf import OmegaConf

from verl_dft import processes
from verl_dft.cli import main
from verl_dft.end_processes import still_running
from verl_dft.errors import InputError
from verl_dft.evaluation_plan import plan
from verl_dft.training import evaluate_during
from verl_dft.training.configure import compose_training
from verl_dft.training.evaluate_during import EvaluationFailed, Evaluations, clean_environment, is_due
from verl_dft.training.metrics import read_metrics
from verl_dft.training.tracking import RunTracker

RESULT = {"avg": 0.5, "avg_ci95": [0.25, 0.875], "truncated_frac": 0.125, "no_answer_frac": 0.0}
RESULT |= {"mean_response_tokens": 7.5}
COMMAND = """
import json, os, pathlib, sys
given = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = pathlib.Path(json.loads(given["output_dir"]))
with open(folder / "calls", "a") as calls:
    calls.write(given["model"] + "\\n")
print("error: no memory" if "failing" in given else "done")
if "failing" in given:
    sys.exit(1)
for name in given["benchmarks"].split(","):
    path = folder / name / "result.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(json.loads(given["result"])))
"""


def test_when_it_is_due() -> None:
    def due(**options: Any) -> list[int]:
        trainer = {"eval_every": 3, "eval_before_train": False, **options}
        return [step for step in range(8) if is_due(trainer, step, 7)]

    assert due() == [3, 6, 7] and due(eval_before_train=True) == [0, 3, 6, 7]
    assert due(eval_every=7) == due(eval_every=50) == [7]
    assert due(eval_every=None, eval_before_train=True) == []


def test_the_command_is_no_rank() -> None:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    ranks |= {"MASTER_PORT": "1", "GROUP_RANK": "0", "ROLE_NAME": "x", "TORCHELASTIC_RUN_ID": "y"}
    kept = {"PATH": "p", "CUDA_VISIBLE_DEVICES": "0,1", "VERL_DFT_CACHE": "c", "HF_HOME": "h"}
    assert clean_environment({**kept, **ranks, "VERL_DFT_LAUNCHED": "1", "OMP_NUM_THREADS": "1"}) == kept
    for threads, local in (("4", "2"), ("1", "1")):  # the user's own
        given = {**kept, **ranks, "OMP_NUM_THREADS": threads, "LOCAL_WORLD_SIZE": local}
        assert clean_environment(given) == {**kept, "OMP_NUM_THREADS": threads}


# ---- a step's evaluation, with a small command of our own ----


class Trainer(SimpleNamespace):
    """What evaluations use of a trainer: it exports a folder with one file and saves nothing."""

    def export_to(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.weights))
        self.exported += 1

    def save_checkpoint(self, step: int) -> None:
        self.saved.append(step)

    def open_tracker(self) -> RunTracker:
        if self.tracker is None:
            self.tracker = RunTracker(self, project_name="p", experiment_name="e", default_backend=[])
        return self.tracker


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    (tmp_path / "command.py").write_text(COMMAND)
    command = [sys.executable, str(tmp_path / "command.py"), "benchmarks=.", f"result={json.dumps(RESULT)}"]
    options = {"eval_every": 2, "eval_before_train": False, "eval_failure": "warn", "keep_eval_models": False}
    config = {"trainer": options, "export": {"dtype": "fp32"}, "eval": {"command": command, "benchmarks": ["b"]}}
    one = Trainer(config=OmegaConf.create({**config, "output_dir": str(tmp_path / "run")}), weights="w", exported=0)
    one.ckpt_handler = one
    one.tracker, one.saved, one.run_name = None, [], "dft"
    one.is_first_rank, one.resume_global_step, one.total_training_steps = True, 0, 6
    return one


def calls(trainer: Trainer, step: int) -> list[str]:
    path = Path(trainer.config.output_dir) / "eval" / f"step_{step}" / "calls"
    return path.read_text().splitlines() if path.exists() else []


def logged(trainer: Trainer) -> list[dict[str, float]]:
    lines = read_metrics(Path(trainer.config.output_dir) / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "eval/seconds"} for line in lines]


def test_what_is_logged(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    for step in range(1, 4):
        Evaluations(trainer).after(step)
    assert logged(trainer) == [
        {
            "step": 2,
            "eval/failed": 0.0,
            "eval/b/avg": 0.5,
            "eval/b/ci95_low": 0.25,
            "eval/b/ci95_high": 0.875,
            "eval/b/ci95_half_width": 0.3125,
            "eval/b/truncated_frac": 0.125,
            "eval/b/no_answer_frac": 0.0,
            "eval/b/mean_response_tokens": 7.5,
        }
    ]
    folder = Path(trainer.config.output_dir) / "eval" / "step_2"
    assert calls(trainer, 2) == [str(folder / "model")] and not (folder / "model").exists()
    line = "step 2: b 50.0% (95% interval 25.0 to 87.5), truncated 12.5%, no answer 0.0%, in "
    assert capsys.readouterr().out.startswith(line)


def test_the_weights_are_kept_where_asked(trainer: Trainer) -> None:
    trainer.config.trainer.keep_eval_models = True
    Evaluations(trainer).after(2)
    kept = Path(trainer.config.output_dir) / "eval" / "step_2" / "model" / "config.json"
    assert json.loads(kept.read_text()) == "w"


def test_several_benchmarks_have_a_folder_each(trainer: Trainer) -> None:
    trainer.config.eval.benchmarks = ["one", "two"]
    trainer.config.eval.command[2] = "benchmarks=one,two"
    Evaluations(trainer).after(2)
    assert {key for key in logged(trainer)[0] if key.endswith("/avg")} == {"eval/one/avg", "eval/two/avg"}


@pytest.mark.parametrize(("change", "again"), [("nothing", 1), ("weights", 2), ("command", 2), ("result", 2)])
def test_an_answer_counts_for_its_weights_and_command(trainer: Trainer, change: str, again: int) -> None:
    Evaluations(trainer).after(2)
    if change == "weights":
        trainer.weights = "others"
    elif change == "command":
        trainer.config.eval.command.append("n=8")
    elif change == "result":  # killed before it was written
        (Path(trainer.config.output_dir) / "eval" / "step_2" / "result.json").unlink()
    Evaluations(trainer).after(2)  # as a run that goes on from an earlier step
    assert len(calls(trainer, 2)) == again and trainer.exported == 2


def test_what_is_logged_already_is_left_alone(trainer: Trainer) -> None:
    Evaluations(trainer).after(2)
    trainer.resume_global_step = 2
    Evaluations(trainer).after(2)
    assert len(logged(trainer)) == trainer.exported == 1
    trainer.config.eval.benchmarks = ["another"]
    Evaluations(trainer).after(2)
    assert trainer.exported == 2 and "eval/another/avg" in logged(trainer)[1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda command: command.append("failing=1"), "exit code 1; the last it said: error: no memory; its log: "),
        (lambda command: command.__setitem__(1, "-c"), "exit code 1; the last it said: "),
        (lambda command: command.__setitem__(0, "/nowhere/python"), "exit code 1; the last it said: FileNotFoundError"),
        (lambda command: command.__setitem__(3, 'result={"avg": 1}'), "its results cannot be read: KeyError"),
        (lambda command: command.__setitem__(2, "benchmarks=x"), "its results cannot be read: FileNotFoundError"),
    ],
    ids=["fails", "crashes", "not-found", "other-result", "no-result"],
)
def test_failures(trainer: Trainer, change: Any, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    change(trainer.config.eval.command)
    Evaluations(trainer).after(2)
    assert logged(trainer) == [{"step": 2, "eval/failed": 1.0}] and trainer.saved == []
    error = capsys.readouterr().err
    assert f"warning: the evaluation after step 2 failed ({reason}" in error and "; training goes on" in error
    trainer.config.trainer.eval_failure = "stop"
    with pytest.raises(EvaluationFailed, match="the evaluation after step 4 failed"):
        Evaluations(trainer).after(4)
    assert trainer.saved == [4]


RANKS = """
import datetime, pathlib, sys, time, torch
from types import SimpleNamespace
from verl_dft.training.evaluate_during import Evaluations
limit, here = datetime.timedelta(seconds=8), pathlib.Path(sys.argv[1])
(here / f"ready_{sys.argv[2]}").touch()
while len(list(here.glob("ready_*"))) < 2:  # the other one's imports do not count
    time.sleep(0.02)
torch.distributed.init_process_group("gloo", init_method=f"file://{here}/meet", rank=int(sys.argv[2]),
                                     world_size=2, timeout=limit)
first = sys.argv[2] == "0"
if sys.argv[3] == "barrier":
    time.sleep(12 * first)
    torch.distributed.barrier()
else:
    ends = time.monotonic() + 12
    one = SimpleNamespace(advance=lambda: time.sleep(0.5) or ("running" if time.monotonic() < ends else "failed so"),
                          end=lambda: None)
    evaluations = Evaluations(SimpleNamespace(config=None, is_first_rank=first))
    assert evaluations._wait(one) == "failed so"
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "codes"), [("meet", [0, 0]), ("barrier", [1, 1])])
def test_no_collective_times_out_however_long_it_takes(how: str, codes: list[int], tmp_path: Path) -> None:
    """12 seconds where a collective may take 8; a plain barrier fails."""
    (tmp_path / "ranks.py").write_text(RANKS)
    processes = [
        subprocess.Popen([sys.executable, str(tmp_path / "ranks.py"), str(tmp_path), str(rank), how],
                         env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"}, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]  # fmt: skip
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == codes, errors


# ---- the process ----


def test_a_tied_process_dies_with_its_parent() -> None:
    code = (
        "import os, signal, subprocess, sys, time\n"
        "from verl_dft.processes import tied\n"
        "wait = [sys.executable, '-c', 'print(7, flush=True); import time; time.sleep(60)']\n"
        "child = subprocess.Popen(tied(wait), stdout=subprocess.PIPE, text=True)\n"
        "assert child.stdout.readline() == '7\\n'\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running() and child.ppid() == parent.pid
    parent.send_signal(signal.SIGKILL)
    parent.communicate(timeout=30)
    assert not still_running(lambda: [child], 10)


def test_a_command_whose_parent_is_gone_is_not_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "verl_dft.processes", "1", "touch", str(tmp_path / "file")]
    assert subprocess.run(command).returncode == 1 and not (tmp_path / "file").exists()
    command[3] = str(os.getpid())
    assert command == processes.tied(command[4:])
    assert subprocess.run(command).returncode == 0 and (tmp_path / "file").exists()


# ---- what is planned ----

BASE = ["model=/some/folder", "data=/some/rows.parquet", "data.train_batch_size=32", "trainer.eval_every=5"]


def planned(*overrides: str) -> dict[str, list[str]]:
    return plan(compose_training([*BASE, "output_dir=/tmp/never-made", *overrides]).eval)


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")


def test_the_plan_is_a_command_that_evaluate_takes(tmp_path: Path) -> None:
    from verl_dft.evaluation.command import compose_evaluate

    folder = tmp_path / "a, folder"
    folder.mkdir()
    more = ["eval.limit=8", "eval.max_tokens=64", "eval.temperature=0.5", "+eval.overrides.engine.max_num_seqs=3"]
    found = planned("eval.benchmark=arithmetic", *more, f"+eval.overrides.data_dir='{folder}'")
    assert found["command"][:4] == [sys.executable, "-m", "verl_dft.cli", "evaluate"]
    assert found["benchmarks"] == ["arithmetic"]
    config = compose_evaluate([*found["command"][4:], "model=/m"])
    assert (config.n, config.limit, config.max_tokens, config.temperature) == (4, 8, 64, 0.5)
    assert (config.engine.max_num_seqs, config.engine.gpu_memory_utilization) == (3, 0.3)
    bare = compose_evaluate([*planned("eval.benchmark=arithmetic")["command"][4:], "model=/m"])
    assert (bare.limit, bare.max_tokens, bare.temperature) == (None, 128, None)


def test_local_files_and_several_benchmarks(tmp_path: Path) -> None:
    for name in ("amc23", "math500"):
        row = {"id": "1", "problem": "1+1", "answer": "2", "answer_type": "number"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    given = ("eval.benchmark=[amc23,math500]", f"+eval.overrides.data_dir={tmp_path}")
    assert planned(*given)["benchmarks"] == ["amc23", "math500"]
    (tmp_path / "math500.jsonl").unlink()
    with pytest.raises(InputError, match="eval: data_dir=.* has no math500.jsonl"):
        planned(*given)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.benchmark=null", "trainer.eval_every needs a benchmark; give eval.benchmark=NAME"),
        ("eval.benchmark=arithmetik", "eval: config group 'benchmark' has no option 'arithmetik' (did you mean"),
        ("+eval.overrides.max_token=3", "eval: config 'evaluate' has no key 'max_token' (did you mean max_tokens"),
        ("eval.temperature=0", "eval: temperature=0 gives the same text 4 times"),
        ("eval.temperature=hot", "eval: temperature=hot; it must be a number"),
        ("eval.n=0", "eval: n=0; it must be a whole number of at least 1"),
        ("eval.max_tokens=0", "eval: max_tokens=0; it must be a whole number of at least 1"),
        (
            "eval.planner=verl_dft.nothing.here",
            "eval.planner=verl_dft.nothing.here is no function",
        ),
        ("trainer.eval_every=0", "trainer.eval_every=0 must be a number of steps of at least 1, or null"),
        ("trainer.eval_failure=ignore", "trainer.eval_failure=ignore is not one of warn, stop"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_loaded(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*BASE, "eval.benchmark=arithmetic", f"output_dir={tmp_path / 'run'}", override]
    assert main(["train", *given]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


def test_only_where_it_is_asked_for() -> None:
    config = compose_training([*BASE, "output_dir=/tmp/never-made", "trainer.eval_every=null"])
    evaluate_during.add_plan(config)
    assert "command" not in config.eval
