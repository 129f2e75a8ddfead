"""The command line as users run it: torchrun with two ranks and Ray with two workers train the same."""

import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import STEADY, TrainArgv, assert_same_weights, losses

from verl_dft.end_processes import lives
from verl_dft.training.resume import completed_steps

pytestmark = [pytest.mark.integration, pytest.mark.alone]
KEYS = ("train/loss", "train/nll", "train/token_weight", "train/grad_norm", "train/num_tokens", "val/nll")


@pytest.fixture(scope="module")
def options(train_argv: TrainArgv, uneven_rows: Path) -> TrainArgv:
    def build(out: Path, *overrides: str) -> list[str]:
        common = (
            f"data.val_files={uneven_rows}",
            "trainer.n_gpus_per_node=2",
            "trainer.total_training_steps=7",  # into a second epoch of 5 steps
            "trainer.test_freq=4",
            STEADY,
        )
        return ["train", *train_argv(out, *common, *overrides)]

    return build


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


@pytest.fixture(scope="module")
def torchrun(run_cli: Callable, options: TrainArgv, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run under torchrun, reporting to every tracker, started from another directory; its folder and output."""
    out = tmp_path_factory.mktemp("torchrun") / "run"
    extra = ("trainer.logger=[console,tensorboard,wandb]",)
    (out.parent / "temporary").mkdir()
    env = {"TMPDIR": str(out.parent / "temporary")}
    done = run_cli(options(out, *extra), timeout=180, cwd=out.parent, env=env)
    assert done.rc == 0, done.stderr[-4000:]
    return out, done.stdout + done.stderr


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray keeps its sockets in the temporary folder, whose path must be short."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="vd") as folder:
        yield Path(folder)


@pytest.mark.slow
def test_ray_trains_the_same(
    torchrun: tuple[Path, str], run_cli: Callable, options: TrainArgv, tmp_path: Path, short_folder: Path
) -> None:
    shm = shared_memory()
    before = {p.pid for p in psutil.process_iter()}
    done = run_cli(options(tmp_path / "run", "launcher=ray"), timeout=240, env={"TMPDIR": str(short_folder)})
    assert done.rc == 0, done.stderr[-4000:]
    assert not list(short_folder.glob("*.lock")), "verl's lock files were left behind"
    for key in KEYS:
        np.testing.assert_allclose(losses(tmp_path / "run", key), losses(torchrun[0], key), rtol=1e-5, err_msg=key)
    assert_same_weights(tmp_path / "run" / "model", torchrun[0] / "model", atol=1e-5)
    mine = [p for p in psutil.process_iter(["name"]) if p.pid not in before and lives(p)]
    assert not [p for p in mine if "ray" in p.info["name"]], "Ray processes were left behind"
    assert shared_memory() - shm == set()


def test_nothing_stays_in_the_temporary_folder(torchrun: tuple[Path, str]) -> None:
    """Checkpoints were saved, of which verl leaves a lock file each, and torchrun the folder of its error files."""
    out, _ = torchrun
    assert completed_steps(out / "checkpoints") == [7]
    assert [path.name for path in (out.parent / "temporary").iterdir()] == []


def test_console_shows_plain_numbers_and_the_bar(torchrun: tuple[Path, str]) -> None:
    out, text = torchrun
    nll = losses(out, "train/nll")
    assert f"train/nll:{nll[0]}" in text and f"val/nll:{losses(out, 'val/nll')[-1]}" in text
    assert "7/7" in text and "tok/s" in text and "exported the model to" in text


def test_tensorboard_got_every_metric(torchrun: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = torchrun
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    for key in KEYS:
        shown = [event.value for event in events.Scalars(key)]
        np.testing.assert_allclose(shown, losses(out, key), rtol=1e-6, err_msg=key)


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of an offline W&B file: LevelDB's log format behind a 7-byte file header."""
    content, at, parts = path.read_bytes(), 7, []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no room for a record header: the block's end is padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def test_wandb_got_every_metric(torchrun: tuple[Path, str]) -> None:
    from wandb.proto import wandb_internal_pb2

    out, _ = torchrun
    (path,) = out.glob("wandb/offline-run-*/run-*.wandb")
    seen: dict[str, list[float]] = {}
    for content in wandb_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        for item in record.history.item:
            seen.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    for key in KEYS:
        np.testing.assert_allclose(seen[key], losses(out, key), rtol=1e-6, err_msg=key)
