"""The command line as users run it: torchrun with two ranks and Ray with two workers train the same."""

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import STEADY, assert_same_weights, losses

pytestmark = pytest.mark.integration
KEYS = ("train/loss", "train/nll", "train/token_weight", "train/grad_norm", "train/num_tokens", "val/nll")


def options(model: Path, rows: Path, out: Path, cache: Path, *extra: str) -> list[str]:
    return [
        "train",
        "objective=dft",
        f"model={model}",
        f"data={rows}",
        f"data.val_files={rows}",
        f"data.cache_dir={cache}",
        "data.max_length=256",
        "data.train_batch_size=8",
        "trainer.n_gpus_per_node=2",
        "trainer.total_training_steps=7",  # into a second epoch of 5 steps
        "trainer.test_freq=4",
        "optim.lr=1e-2",
        STEADY,
        f"output_dir={out}",
        *extra,
    ]


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


@pytest.fixture(scope="module")
def torchrun(
    run_cli: Callable, small_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A run under torchrun, reporting to every tracker, started from another directory; its folder and output."""
    out = tmp_path_factory.mktemp("torchrun") / "run"
    extra = ("trainer.logger=[console,tensorboard,wandb]",)
    done = run_cli(options(small_model, uneven_rows, out, cache_dir, *extra), timeout=180, cwd=out.parent)
    assert done.rc == 0, done.stderr[-4000:]
    return out, done.stdout + done.stderr


def test_ray_trains_the_same(
    torchrun: tuple[Path, str], run_cli: Callable, small_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path
) -> None:
    shm = shared_memory()
    before = {p.pid for p in psutil.process_iter()}
    done = run_cli(
        options(small_model, uneven_rows, tmp_path / "run", cache_dir, "launcher=ray", "trainer.logger=[]"), timeout=240
    )
    assert done.rc == 0, done.stderr[-4000:]
    for key in KEYS:
        np.testing.assert_allclose(losses(tmp_path / "run", key), losses(torchrun[0], key), rtol=1e-5, err_msg=key)
    assert_same_weights(tmp_path / "run" / "model", torchrun[0] / "model", atol=1e-5)
    mine = [p for p in psutil.process_iter(["pid", "name", "username"]) if p.pid not in before]
    assert not [p for p in mine if "ray" in p.info["name"]], "Ray processes were left behind"
    assert shared_memory() - shm == set()


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
