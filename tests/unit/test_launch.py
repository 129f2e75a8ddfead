"""Ranks started by ``verl-dft train``: how their failures are told, and that nobody outlives an interrupted command."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from verl_dft.cli import main
from verl_dft.end_processes import still_running
from verl_dft.training import launch
from verl_dft.training.configure import compose_training

COMMAND = """
import sys
from verl_dft import cli
from verl_dft.training import launch

# the command line as it is, with other ranks than those of a training
launch.main = lambda argv: launch.run_ranks(["--standalone", "--nproc-per-node=2", *argv])
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""

RANK = """
import os, pathlib, sys, time
from verl_dft.errors import InputError
from verl_dft.training.launch import run_guarded

def run():
    what, rank = sys.argv[1], os.environ["RANK"]
    if what == "input" and rank == "1":
        raise InputError("the rows are wrong")
    if what == "crash" and rank == "1":
        raise RuntimeError("a bug")
    if what == "die" and rank == "1":
        os.kill(os.getpid(), 9)
    pathlib.Path(sys.argv[2], f"rank_{rank}").write_text(str(os.getpid()))
    time.sleep(60)

sys.exit(run_guarded(run))
"""


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., list[str]]:
    (tmp_path / "command.py").write_text(COMMAND)
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "temporary").mkdir()

    def build(what: str) -> list[str]:
        return [sys.executable, str(tmp_path / "command.py"), str(tmp_path / "rank.py"), what, str(tmp_path)]

    return build


@pytest.mark.parametrize(
    ("what", "code", "last"),
    [
        ("input", 2, "error: the rows are wrong"),
        ("die", 1, "error: rank 1 was ended by signal 9 (SIGKILL), which is what the system does when memory runs out"),
        pytest.param(
            *("crash", 1, "error: rank 1 ended with exit code 1; its traceback is above"), marks=pytest.mark.slow
        ),
    ],
    ids=["input", "die", "crash"],
)
def test_exit_code_and_one_line(
    what: str, code: int, last: str, command: Callable, run_command: Callable, tmp_path: Path
) -> None:
    done = run_command(command(what), timeout=60, env={"TMPDIR": str(tmp_path / "temporary")})
    lines = done.stderr.splitlines()
    assert (done.rc, lines[-1:]) == (code, [last]), done.stderr
    assert ("a bug" in done.stderr) == (what == "crash")
    assert len(lines) == 1 or what == "crash", "a traceback of the launcher"
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
        signal.SIGTERM,
    ],
    ids=lambda s: s.name,
)
def test_a_signal_ends_the_ranks_too(number: signal.Signals, command: Callable, tmp_path: Path) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    process = subprocess.Popen(command("wait"), stderr=subprocess.PIPE, text=True, start_new_session=True, env=env)
    files = [tmp_path / f"rank_{rank}" for rank in (0, 1)]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    ranks = [psutil.Process(int(file.read_text())) for file in files]
    os.killpg(process.pid, number)  # as a terminal does; the ranks are in sessions of their own
    _, stderr = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 1 and stderr.splitlines()[-1].startswith("interrupted; run the same command")
    else:
        assert process.returncode == -number
    assert "Traceback" not in stderr, stderr
    assert not still_running(lambda: ranks, 10)


BASE = ["model=/some/folder", "output_dir=/tmp/never-made", "data=/some/rows.parquet", "data.train_batch_size=32"]


def test_several_machines_need_their_addresses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")
    argv = [*BASE, "trainer.nnodes=2", "trainer.n_gpus_per_node=4"]
    assert main(["train", *argv]) == 2
    assert "needs MASTER_ADDR and NODE_RANK in the environment" in capsys.readouterr().err
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert main(["train", *argv]) == 2
    assert "needs NODE_RANK in" in capsys.readouterr().err
    monkeypatch.setenv("NODE_RANK", "1")
    options = launch.torchrun_options(compose_training(argv))
    assert {"--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1", "--nproc-per-node=4"} <= set(options)
    assert compose_training([*argv, "launcher=ray"]).trainer.nnodes == 2
