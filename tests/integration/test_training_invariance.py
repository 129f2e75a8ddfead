"""The same training however it is split: ranks, micro-batches, packing, clipping, reductions."""

from pathlib import Path

import numpy as np
import pytest
from conftest import STEADY, ForkServer, assert_same_weights, losses, weights

pytestmark = pytest.mark.integration
STEPS, BATCH = 4, 8


def run(ranks: ForkServer, model: Path, rows: Path, out: Path, cache: Path, world: int, *options: str) -> Path:
    argv = [
        "objective=dft",
        f"model={model}",
        f"data={rows}",
        f"data.cache_dir={cache}",
        "data.max_length=256",
        f"data.train_batch_size={BATCH}",
        f"trainer.total_training_steps={STEPS}",
        "trainer.logger=[]",
        "optim.lr=1e-2",
        STEADY,
        "optim.lr_warmup_steps_ratio=0",
        f"output_dir={out}",
        *options,
    ]
    ranks.ok(argv, world=world)
    return out


@pytest.mark.parametrize("clip", [1e9, 0.01], ids=["no-clip", "clip"])
def test_ranks_micro_batches_and_packing(
    ranks: ForkServer, small_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path, clip: float
) -> None:
    """1 and 2 ranks x 1, 2, 4 micro-batches a rank x padded, packed: one trajectory."""
    runs = {}
    for world in (1, 2):
        for micros in (1, 2, 4):
            for packed in (False, True):
                name = f"{world}-{micros}-{packed}"
                options = (
                    f"data.micro_batch_size_per_gpu={BATCH // world // micros}",
                    f"model.use_remove_padding={packed}",
                    f"optim.clip_grad={clip}",
                )
                out = tmp_path / name
                runs[name] = run(ranks, small_model, uneven_rows, out, cache_dir, world, *options)
    first = runs["1-1-False"]
    norms = losses(first, "train/grad_norm")
    assert all(norm > 0.01 for norm in norms), "clipping at 0.01 must clip every step"
    assert len(set(losses(first))) == STEPS
    for name, out in runs.items():
        for metric in ("train/loss", "train/nll", "train/token_weight", "train/grad_norm", "train/num_tokens"):
            np.testing.assert_allclose(
                losses(out, metric), losses(first, metric), rtol=2e-5, err_msg=f"{name} {metric}"
            )
        assert_same_weights(out / "model", first / "model", atol=2e-5)


def test_dynamic_batches_give_the_same(
    ranks: ForkServer, small_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path
) -> None:
    fixed = run(ranks, small_model, uneven_rows, tmp_path / "fixed", cache_dir, 1)
    options = ("data.use_dynamic_bsz=true", "data.max_token_len_per_gpu=256")
    dynamic = run(ranks, small_model, uneven_rows, tmp_path / "dynamic", cache_dir, 2, *options)
    np.testing.assert_allclose(losses(dynamic), losses(fixed), rtol=2e-5)
    assert_same_weights(dynamic / "model", fixed / "model", atol=2e-5)


def test_seeds(ranks: ForkServer, small_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path) -> None:
    one = run(ranks, small_model, uneven_rows, tmp_path / "one", cache_dir, 1)
    again = run(ranks, small_model, uneven_rows, tmp_path / "again", cache_dir, 1, "data.num_workers=1")
    other = run(ranks, small_model, uneven_rows, tmp_path / "other", cache_dir, 1, "trainer.seed=2")
    assert losses(one) == losses(again)
    assert losses(one, "train/num_tokens") != losses(other, "train/num_tokens")


def test_sft_learns(ranks: ForkServer, small_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path) -> None:
    """A sanity check that the weights move the right way."""
    out = run(ranks, small_model, uneven_rows, tmp_path / "sft", cache_dir, 1, "objective=sft")
    assert losses(out)[-1] < losses(out)[0] - 0.2
    before, after = weights(small_model), weights(out / "model")
    assert max(np.abs(before[name] - after[name]).max() for name in before) > 1e-3
