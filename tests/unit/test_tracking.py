"""metrics.jsonl over a resume, and which checkpoints count."""

import json
import shutil
import tempfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from verl_dft.errors import InputError
from verl_dft.training import checkpoint
from verl_dft.training.checkpoint import MarkedCheckpoints, OrchestrationMode, without_lock_files
from verl_dft.training.metrics import MetricsFile, read_metrics
from verl_dft.training.packing import faster_packed
from verl_dft.training.resume import MARKER, checkpoint_path, completed_steps, resume_point
from verl_dft.training.tracking import RunTracker


def test_a_resumed_run_writes_its_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (1, 2, 3):
        first.log({"train/loss": step / 10}, step)
    first.file.write('{"step": 4, "train/l')  # killed while writing
    first.file.close()
    second = MetricsFile(path, 2)
    second.log({"train/loss": 0.33}, 3)
    second.file.close()
    assert [(line["step"], line["train/loss"]) for line in read_metrics(path)] == [(1, 0.1), (2, 0.2), (3, 0.33)]


class Engine:
    """Writes a few letters where verl's engine writes shards, in a folder made as verl's does."""

    def __init__(self, ranks: int = 2, seconds: float = 0) -> None:
        self.loaded: list[str] = []
        self.ranks, self.seconds = ranks, seconds

    def save_checkpoint(self, local_path: str, **_: Any) -> None:
        time.sleep(self.seconds)
        folder = checkpoint.fsdp_checkpoint_manager.local_mkdir_safe(local_path)
        for rank in range(self.ranks):
            with zipfile.ZipFile(Path(folder, f"model_world_size_2_rank_{rank}.pt"), "w") as archive:
                archive.writestr("data/0", "weights")

    def load_checkpoint(self, path: str) -> None:
        self.loaded.append(path)


def handler(folder: Path, keep: int | None = 2, **kwargs: Any) -> MarkedCheckpoints:
    options = {"world_size": 2, "facts": {"seed": 1}, "mode": OrchestrationMode.RAY, "engine": Engine(), **kwargs}
    return MarkedCheckpoints(train_dataloader=None, default_local_dir=str(folder), max_ckpt_to_keep=keep, **options)


def test_old_checkpoints_go_after_the_new_one_is_whole(tmp_path: Path) -> None:
    one = handler(tmp_path)
    for step in (2, 4, 6):
        one.save_checkpoint(step)
    assert completed_steps(tmp_path) == [4, 6] and not checkpoint_path(tmp_path, 2).exists()
    handler(tmp_path, keep=None).save_checkpoint(8)
    assert completed_steps(tmp_path) == [4, 6, 8]


def test_a_folder_without_marker_does_not_count_and_is_overwritten(tmp_path: Path) -> None:
    one = handler(tmp_path)
    one.save_checkpoint(2)
    half = checkpoint_path(tmp_path, 4)
    half.mkdir()
    (half / "stale.pt").write_text("half")
    assert one.load_checkpoint() == 2 and one.engine.loaded == [str(checkpoint_path(tmp_path, 2))]
    one.save_checkpoint(4)
    assert completed_steps(tmp_path) == [2, 4] and not (half / "stale.pt").exists()
    assert json.loads((half / MARKER).read_text()) == {"step": 4, "world_size": 2, "seed": 1}


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    handler(tmp_path).save_checkpoint(2)
    with pytest.raises(InputError, match=r"saved by 2 rank\(s\), this run has 4"):
        handler(tmp_path, world_size=4).load_checkpoint()
    assert handler(tmp_path, resume_mode="disable").load_checkpoint() == 0
    assert handler(tmp_path / "empty").load_checkpoint() == 0


def test_where_a_run_starts_from(tmp_path: Path) -> None:
    other, own = tmp_path / "other", tmp_path / "own"
    for step in (4, 6):
        handler(other).save_checkpoint(step)
    start = checkpoint_path(other, 6)

    def found(given: Path | None = start, mode: str = "auto", world_size: int = 2) -> Path | None:
        point = resume_point(own, mode=mode, given=given, world_size=world_size)
        assert point is None or point.step == int(point.path.name.rpartition("_")[2])
        return point and point.path

    with pytest.raises(InputError, match=r"resume_from_path=.*other is not a whole checkpoint"):
        found(other)
    with pytest.raises(InputError, match=r"resume_from_path=.*nowhere does not exist"):
        found(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"saved by 2 rank\(s\), this run has 1"):
        found(world_size=1)
    assert (found(), found(None), found(mode="disable")) == (start, None, None)
    handler(own).save_checkpoint(5)  # under resume_mode=disable: no continuation of step 6
    assert found() == start
    handler(own).save_checkpoint(8)
    assert found() == found(mode="resume_path") == checkpoint_path(own, 8)
    shutil.rmtree(start)  # the other run went on and forgot it
    assert found() == checkpoint_path(own, 8)
    assert handler(own, resume_from_path=str(start)).load_checkpoint() == 8


def test_no_lock_files_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with without_lock_files():
        Engine().save_checkpoint(str(tmp_path / "ours"))
    assert (tmp_path / "ours").is_dir() and list((tmp_path / "temporary").iterdir()) == []
    Engine().save_checkpoint(str(tmp_path / "verls"))
    assert [path.suffix for path in (tmp_path / "temporary").iterdir()] == [".lock"], "verl has mended it: simplify"


def test_a_checkpoint_of_which_other_disks_hold_parts_gets_no_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PATIENCE_S", 0.3)
    with pytest.raises(InputError, match=r"lacks model_world_size_2_rank_1\.pt \(1 of 2 .* all nodes share"):
        handler(tmp_path, engine=Engine(ranks=1)).save_checkpoint(2)
    assert completed_steps(tmp_path) == []


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What a tracker reads of a trainer."""
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    return SimpleNamespace(
        run_name="dft",
        config=SimpleNamespace(output_dir=str(tmp_path)),
        resume_global_step=0,
        total_training_steps=3,
        ckpt_handler=handler(tmp_path / "checkpoints", engine=Engine(seconds=0.5)),
    )


TRACKING = {"project_name": "p", "experiment_name": "e", "default_backend": []}


def test_saving_is_no_part_of_the_next_steps_time(trainer: SimpleNamespace, tmp_path: Path) -> None:
    tracker = RunTracker(trainer, **TRACKING)
    tracker.log({"train/loss": 1.0, "train/global_tokens": 10}, 1)
    trainer.ckpt_handler.save_checkpoint(1)
    time.sleep(0.05)
    tracker.log({"train/loss": 1.0, "train/global_tokens": 10}, 2)
    tracker.finish()
    step = read_metrics(tmp_path / "metrics.jsonl")[1]
    assert 0.05 <= step["perf/step_s"] < 0.5
    assert step["perf/tokens_per_s"] == pytest.approx(10 / step["perf/step_s"])


def test_a_backend_that_fails_does_not_lose_the_file(trainer: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nowhere is not supported"):
        RunTracker(trainer, **{**TRACKING, "default_backend": ["nowhere"]})
    assert (tmp_path / "metrics.jsonl").is_file()


class Shape:
    """Sizes of a model."""

    def __init__(self, hidden: int, layers: int, intermediate: int, vocab: int) -> None:
        self.hidden_size, self.num_hidden_layers = hidden, layers
        self.intermediate_size, self.vocab_size = intermediate, vocab


def test_packing_is_chosen_where_linear_layers_dominate() -> None:
    """The two cases that were measured: SmolLM2 on 8 uneven rows (packed faster), a tiny model on 32 short ones."""
    smollm2, tiny = Shape(576, 30, 1536, 49152), Shape(128, 2, 384, 512)
    assert faster_packed([60, 110, 150, 180, 200, 240, 270, 300], 8, smollm2)
    assert not faster_packed([86 + i % 18 for i in range(32)], 32, tiny)
    assert not faster_packed([100] * 32, 8, tiny), "equal lengths need no padding"
