"""metrics.jsonl over a resume, and which checkpoints count."""

import json
from pathlib import Path
from typing import Any

import pytest

from verl_dft.errors import InputError
from verl_dft.training.checkpoint import MARKER, MarkedCheckpoints, OrchestrationMode, checkpoint_path, completed_steps
from verl_dft.training.packing import faster_packed
from verl_dft.training.tracking import MetricsFile, read_metrics


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
    """Writes one file where verl's engine writes shards."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def save_checkpoint(self, local_path: str, **_: Any) -> None:
        Path(local_path).mkdir(parents=True)
        Path(local_path, "model.pt").write_text("weights")

    def load_checkpoint(self, path: str) -> None:
        self.loaded.append(path)


def handler(folder: Path, keep: int | None = 2, **kwargs: Any) -> MarkedCheckpoints:
    options = {"world_size": 2, "facts": {"seed": 1}, "mode": OrchestrationMode.RAY, **kwargs}
    return MarkedCheckpoints(
        engine=Engine(), train_dataloader=None, default_local_dir=str(folder), max_ckpt_to_keep=keep, **options
    )


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
    with pytest.raises(InputError, match="not a whole checkpoint"):
        handler(tmp_path, resume_from_path=str(tmp_path / "elsewhere")).load_checkpoint()
    assert handler(tmp_path, resume_mode="disable").load_checkpoint() == 0
    assert handler(tmp_path / "empty").load_checkpoint() == 0


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
