"""What a command leaves behind when it has ended, well or not: its output folder, and nothing else.

Each runs in a session, a temporary folder and a working directory of its own. Sampling, training and evaluation with
engines are nightly; the tests of killed runs (test_rl_faults.py, test_sampling_replicas.py, test_launchers.py) look for
leftovers too.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from process_helpers import of_mark, of_session

BASE = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "base"
SMALL = ["data=arithmetic", "data.source.num_rows=16", "data.source.num_val=0"]
TRAIN = ["train", "objective=dft", f"model={BASE}", *SMALL, "data.train_batch_size=8", "data.max_length=256",
         "output_dir=out", "trainer.total_training_steps=1"]  # fmt: skip
CHEAP = {
    "data make": (["data", "make", *SMALL, "output_dir=out"], 0),
    "data make refused": (["data", "make", "data=nowhere.jsonl", "output_dir=out"], 2),
    "data show": (["data", "show", *SMALL, f"model={BASE}"], 0),
    "tiny": (["tiny", "init", "output_dir=out"], 0),
    "sample refused": (["sample", "model=./nowhere", *SMALL, "output_dir=out"], 2),
    "reject refused": (["reject", "samples=nowhere", "output_dir=out"], 2),
}
COSTLY = {
    "train": (TRAIN, 0),
    "train refused": ([*TRAIN, "data.max_length=3"], 2),
    "train on two ranks": ([*TRAIN, "trainer.n_gpus_per_node=2"], 0),
    "sample": (["sample", f"model={BASE}", *SMALL, "max_tokens=16", "n=1", "engine.dtype=float32", "output_dir=out"],
               0),
    "evaluate": (["evaluate", f"model={BASE}", "benchmark=arithmetic", "limit=4", "n=1", "max_tokens=16",
                  "output_dir=out", "engine.dtype=float32"], 0),
    "evaluate refused": (["evaluate", f"model={BASE}", "benchmark=arithmetic", "limit=0", "output_dir=out"], 2),
    "score": (["score", f"model={BASE}", *SMALL, "data.max_length=256", "output_dir=out"], 0),
    "rl refused": (["rl", "algorithm=grpo", f"model={BASE}", "data=nowhere.jsonl", "output_dir=out"], 2),
}  # fmt: skip


def shared_memory(mark: float) -> set[str]:
    """Files of /dev/shm that are newer than ``mark`` and that no living process holds open."""
    new = {str(path) for path in Path("/dev/shm").glob("*") if path.is_file() and path.stat().st_mtime >= mark}
    held: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = maps.read_text()
        except OSError:
            continue
        held |= {name for name in new if name in text}
    return new - held


def leaves_nothing(argv: list[str], code: int, folder: Path, seconds: float) -> None:
    work, temporary = folder / "work", folder / "tmp"
    work.mkdir()
    temporary.mkdir()
    mark, start = str(folder), time.time()
    environment = {**os.environ, "TMPDIR": str(temporary), "VERL_DFT_LEFTOVERS": mark, "VERL_DFT_HARDWARE": "cpu"}
    command = [sys.executable, "-m", "verl_dft.cli", *argv]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=work, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            ended = process.wait(seconds)
        finally:
            for left in [*of_session(process.pid), *of_mark(mark)] if process.poll() is None else []:
                left.kill()
    said = (folder / "log").read_text(errors="replace")[-3000:]
    assert ended == code, said
    deadline = time.monotonic() + 5  # a process that is being ended by the kernel
    while (left := [*of_session(process.pid), *of_mark(mark)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    told = [(one.pid, one.cmdline(), one.net_connections("tcp")) for one in left]
    for one in left:
        one.kill()
    assert not told, told
    # torch's own cache, one folder for each user of the machine
    assert not [path for path in temporary.iterdir() if not path.name.startswith("torchinductor_")], "temporary files"
    assert [path.name for path in work.iterdir() if path.name != "out"] == [], "files beside the output folder"
    assert not [path for path in work.rglob("*") if path.suffix in (".tmp", ".part", ".old")], "half-written files"
    assert not shared_memory(start), "shared memory"


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEAP)
def test_of_a_cheap_command(name: str, tmp_path: Path) -> None:
    leaves_nothing(*CHEAP[name], tmp_path, 120)


@pytest.mark.integration
@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("name", COSTLY)
def test_of_a_command_with_engines(name: str, tmp_path: Path) -> None:
    leaves_nothing(*COSTLY[name], tmp_path, 420)
