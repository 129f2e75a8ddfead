"""The same training however it is split: ranks, micro-batches, packing, clipping, reductions."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import STEADY, ForkServer, TrainArgv, assert_same_weights, losses, weights

pytestmark = pytest.mark.integration
STEPS, BATCH = 4, 8


@pytest.fixture
def run(ranks: ForkServer, train_argv: TrainArgv, tmp_path: Path) -> Callable[..., Path]:
    """``run(name, world, *overrides)``: train and return the run's folder."""

    def train(name: str, world: int, *overrides: str) -> Path:
        common = (f"trainer.total_training_steps={STEPS}", "optim.lr_warmup_steps_ratio=0", STEADY)
        ranks.ok(train_argv(tmp_path / name, *common, *overrides), world=world)
        return tmp_path / name

    return train


@pytest.mark.slow
@pytest.mark.parametrize("clip", [pytest.param(1e9, id="no-clip"), pytest.param(0.01, id="clip")])
def test_ranks_micro_batches_and_packing(run: Callable[..., Path], clip: float) -> None:
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
                runs[name] = run(name, world, *options)
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


def test_dynamic_batches_give_the_same(run: Callable[..., Path]) -> None:
    fixed = run("fixed", 1)
    options = ("data.use_dynamic_bsz=true", "data.max_token_len_per_gpu=256")
    dynamic = run("dynamic", 2, *options)
    np.testing.assert_allclose(losses(dynamic), losses(fixed), rtol=2e-5)
    assert_same_weights(dynamic / "model", fixed / "model", atol=2e-5)


def test_seeds(run: Callable[..., Path]) -> None:
    one = run("one", 1)
    again = run("again", 1, "data.num_workers=1")
    other = run("other", 1, "trainer.seed=2")
    assert losses(one) == losses(again)
    assert losses(one, "train/num_tokens") != losses(other, "train/num_tokens")


def test_lora_is_initialised_by_the_seed(run: Callable[..., Path]) -> None:
    """``engine.seed`` alone: ``trainer.seed``, which it follows unless given, would change the batches as well."""
    lora = ("model.lora_rank=4", "export.dtype=fp32")
    one = run("lora-1", 1, *lora)
    again = run("lora-2", 2, *lora)
    other = run("lora-3", 1, *lora, "engine.seed=2")
    np.testing.assert_allclose(losses(again), losses(one), rtol=2e-5)
    assert losses(other)[0] == losses(one)[0], "adapters start as zero"
    assert abs(losses(other)[-1] / losses(one)[-1] - 1) > 1e-3


def test_sft_learns(run: Callable[..., Path], small_model: Path) -> None:
    """A sanity check that the weights move the right way."""
    out = run("sft", 1, "objective=sft")
    assert losses(out)[-1] < losses(out)[0] - 0.2
    before, after = weights(small_model), weights(out / "model")
    assert max(np.abs(before[name] - after[name]).max() for name in before) > 1e-3
