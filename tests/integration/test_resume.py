"""Killed and continued runs equal uninterrupted ones: losses, steps, weights, final checkpoint."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import Finished, ForkServer, TrainArgv, assert_same_weights, losses, turn_a_bit

from verl_dft.training.resume import checkpoint_path, completed_steps

pytestmark = pytest.mark.integration
EPOCHS, STEPS_PER_EPOCH, SAVE_FREQ = 3, 5, 2  # 40 rows in batches of 8
TOTAL = EPOCHS * STEPS_PER_EPOCH


@pytest.fixture(scope="session")
def argv(train_argv: TrainArgv, uneven_rows: Path) -> TrainArgv:
    """Three epochs with validation, a checkpoint every second step."""

    def build(out: Path, *overrides: str) -> list[str]:
        return train_argv(
            out,
            f"data.val_files={uneven_rows}",
            f"trainer.total_epochs={EPOCHS}",
            f"trainer.save_freq={SAVE_FREQ}",
            f"trainer.test_freq={STEPS_PER_EPOCH}",
            "trainer.max_ckpt_to_keep=2",
            *overrides,
        )

    return build


@pytest.fixture(scope="module", params=[1, 2], ids=["1-rank", "2-ranks"])
def whole(
    request: pytest.FixtureRequest, ranks: ForkServer, argv: TrainArgv, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """An uninterrupted run and its number of ranks."""
    out = tmp_path_factory.mktemp("whole") / "run"
    ranks.ok(argv(out), world=request.param)
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
    argv: TrainArgv,
    tmp_path: Path,
) -> None:
    world, reference = whole
    out = tmp_path / "run"
    command = argv(out)
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
    whole: tuple[int, Path], ranks: ForkServer, argv: TrainArgv
) -> None:
    world, out = whole
    before = losses(out)
    log = ranks.ok(argv(out), world=world)
    assert f"all {TOTAL} steps are done already" in log and losses(out) == before
    assert (out / "model" / "model.safetensors").is_file()


def test_another_number_of_ranks_is_refused(ranks: ForkServer, argv: TrainArgv, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = argv(out, "trainer.total_training_steps=2")
    ranks.ok(command, world=1)
    refused: Finished = ranks.run(command, world=2)
    assert set(refused.codes) <= {2, -signal.SIGTERM} and 2 in refused.codes
    assert "trainer.n_gpus_per_node" in refused.log


def test_lora_killed_and_resumed(ranks: ForkServer, argv: TrainArgv, tmp_path: Path) -> None:
    command = [argv(tmp_path / name, "model.lora_rank=4", "trainer.total_training_steps=6") for name in ("a", "b")]
    ranks.ok(command[0])
    killed = ranks.run(command[1], env={"VERL_DFT_FAILPOINT": "worker.step:4"})
    assert -signal.SIGKILL in killed.codes and completed_steps(tmp_path / "b" / "checkpoints") == [2]
    assert "resuming after step 2" in ranks.ok(command[1])
    for key in ("train/loss", "train/grad_norm", "val/nll"):
        assert losses(tmp_path / "b", key) == losses(tmp_path / "a", key), key
    assert_same_weights(tmp_path / "b" / "model", tmp_path / "a" / "model", atol=0)


def test_a_start_from_another_run_is_made_once(
    whole: tuple[int, Path], ranks: ForkServer, argv: TrainArgv, tmp_path: Path
) -> None:
    """The same command run again goes on from its own checkpoints."""
    world, reference = whole
    start = checkpoint_path(reference / "checkpoints", TOTAL - 1)
    command = argv(tmp_path / "run", f"trainer.resume_from_path={start}", "trainer.resume_mode=resume_path")
    log = ranks.ok(command, world=world)
    assert f"resuming after step {TOTAL - 1} from {start}" in log
    assert losses(tmp_path / "run") == losses(reference)[-1:]
    assert "steps are done already" in ranks.ok(command, world=world)


def test_a_turned_bit_in_a_checkpoint_is_refused(
    whole: tuple[int, Path], ranks: ForkServer, argv: TrainArgv, tmp_path: Path
) -> None:
    """Torch would load it as another weight. Each rank reads its own files; all are told."""
    world, reference = whole
    start = tmp_path / "from" / "global_step_2"
    shutil.copytree(checkpoint_path(reference / "checkpoints", TOTAL), start)
    file = start / f"model_world_size_{world}_rank_{world - 1}.pt"
    turn_a_bit(file)
    refused = ranks.run(
        argv(tmp_path / "run", f"trainer.resume_from_path={start}", "trainer.resume_mode=resume_path"), world=world
    )
    assert set(refused.codes) <= {2, -signal.SIGTERM} and 2 in refused.codes
    assert f"{file} is damaged; delete {start}" in refused.log and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_validation_covers_every_row_once(whole: tuple[int, Path]) -> None:
    """40 rows in batches of 8; the count of tokens must be that of all rows, whatever the ranks."""
    _, out = whole
    report = json.loads((out / "data" / "report.json").read_text())
    counted = losses(out, "val/num_tokens")
    assert counted and set(counted) == {report["val"]["num_trained_tokens"]}
