"""Killed and continued runs equal uninterrupted ones: losses, steps, weights, final checkpoint."""

import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import Finished, ForkServer, assert_same_weights, losses

from verl_dft.training.checkpoint import completed_steps

pytestmark = pytest.mark.integration
EPOCHS, STEPS_PER_EPOCH, SAVE_FREQ = 3, 5, 2  # 40 rows in batches of 8
TOTAL = EPOCHS * STEPS_PER_EPOCH


def argv(model: Path, rows: Path, out: Path, cache: Path, *options: str) -> list[str]:
    return [
        "objective=dft",
        f"model={model}",
        f"data={rows}",
        f"data.val_files={rows}",
        f"data.cache_dir={cache}",
        "data.max_length=256",
        "data.train_batch_size=8",
        f"trainer.total_epochs={EPOCHS}",
        f"trainer.save_freq={SAVE_FREQ}",
        f"trainer.test_freq={STEPS_PER_EPOCH}",
        "trainer.max_ckpt_to_keep=2",
        "trainer.logger=[]",
        "optim.lr=1e-2",
        f"output_dir={out}",
        *options,
    ]


@pytest.fixture(scope="module", params=[1, 2], ids=["1-rank", "2-ranks"])
def whole(
    request: pytest.FixtureRequest,
    ranks: ForkServer,
    small_model: Path,
    uneven_rows: Path,
    cache_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[int, Path]:
    """An uninterrupted run and its number of ranks."""
    out = tmp_path_factory.mktemp("whole") / "run"
    ranks.ok(argv(small_model, uneven_rows, out, cache_dir), world=request.param)
    assert len(losses(out)) == TOTAL and completed_steps(out / "checkpoints") == [TOTAL - 1, TOTAL]
    return request.param, out


# worker.step:n dies right after the n-th update; the checkpoint failpoints die in the n-th save
@pytest.mark.parametrize(
    ("failpoint", "whole_steps"),
    [
        ("worker.step:8", [4, 6]),  # mid-epoch, two steps after a save (the second died before step 8's)
        ("checkpoint.after_marker:5", [8, 10]),  # exactly at the end of epoch 2, saved
        ("checkpoint.before_marker:3", [2, 4]),  # during the save of step 6
    ],
    ids=["mid-epoch", "epoch-end", "during-save"],
)
def test_killed_and_resumed(
    whole: tuple[int, Path],
    failpoint: str,
    whole_steps: list[int],
    ranks: ForkServer,
    small_model: Path,
    uneven_rows: Path,
    cache_dir: Path,
    tmp_path: Path,
) -> None:
    world, reference = whole
    out = tmp_path / "run"
    command = argv(small_model, uneven_rows, out, cache_dir)
    killed = ranks.run(command, world=world, env={"VERL_DFT_FAILPOINT": failpoint})
    assert -signal.SIGKILL in killed.codes
    assert completed_steps(out / "checkpoints") == whole_steps
    log = ranks.ok(command, world=world)
    assert f"resuming after step {whole_steps[-1]}" in log

    assert [line["step"] for line in metrics(out) if "train/loss" in line] == list(range(1, TOTAL + 1))
    for key in ("train/loss", "train/grad_norm", "train/lr", "train/num_tokens", "val/nll", "val/objective"):
        assert losses(out, key) == losses(reference, key), key
    assert_same_weights(out / "model", reference / "model", atol=0)
    assert completed_steps(out / "checkpoints") == completed_steps(reference / "checkpoints")
    assert_same_checkpoint(out / "checkpoints", reference / "checkpoints", world)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_checkpoint(a: Path, b: Path, world: int) -> None:
    for kind in ("model", "optim"):
        for rank in range(world):
            name = f"global_step_{TOTAL}/{kind}_world_size_{world}_rank_{rank}.pt"
            first, second = (flat(torch.load(folder / name, weights_only=False)) for folder in (a, b))
            assert first.keys() == second.keys()
            for key, value in first.items():
                assert torch.equal(value, second[key]), f"{name}: {key}"


def flat(node: object, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(node, dict):
        return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}.{key}").items()}
    if isinstance(node, torch.Tensor):
        return {prefix: node.to_local() if hasattr(node, "to_local") else node}
    return {}


def test_a_finished_run_does_nothing_and_keeps_its_export(
    whole: tuple[int, Path], ranks: ForkServer, small_model: Path, uneven_rows: Path, cache_dir: Path
) -> None:
    world, out = whole
    before = losses(out)
    log = ranks.ok(argv(small_model, uneven_rows, out, cache_dir), world=world)
    assert f"all {TOTAL} steps are done already" in log and losses(out) == before
    assert (out / "model" / "model.safetensors").is_file()


def test_another_number_of_ranks_is_refused(
    ranks: ForkServer, small_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = argv(small_model, uneven_rows, out, cache_dir, "trainer.total_training_steps=2")
    ranks.ok(command, world=1)
    refused: Finished = ranks.run(command, world=2)
    assert set(refused.codes) <= {2, -signal.SIGTERM} and 2 in refused.codes
    assert "trainer.n_gpus_per_node" in refused.log


def test_validation_covers_every_row_once(whole: tuple[int, Path], uneven_rows: Path) -> None:
    """40 rows in batches of 8; the count of tokens must be that of all rows, whatever the ranks."""
    _, out = whole
    report = json.loads((out / "data" / "report.json").read_text())
    counted = losses(out, "val/num_tokens")
    assert counted and set(counted) == {report["val"]["num_trained_tokens"]}
