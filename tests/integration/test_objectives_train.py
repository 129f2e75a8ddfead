"""Every objective through the command line, one after the other in one process: it trains, and does what it says."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import ForkServer, assert_same_weights, losses, weights

from verl_dft.objectives import list_objectives

pytestmark = pytest.mark.integration
STEPS = 20
RUNS: dict[str, tuple[str, ...]] = {
    **{name: (f"objective={name}",) for name in list_objectives()},
    "psft": ("objective=psft", "data.mini_batch_size=4"),
    "is_sft": ("objective=is_sft", "objective.behavior=all"),
    "dft-exempt": ("objective=dft", "objective.exempt_tokens=[end_of_turn]"),
    "iw_sft-ema": ("objective=iw_sft", "objective.policy=ema"),
    "asft-k3": ("objective=asft", "objective.kl=k3"),
    "gft-no_gal-no_dcr": ("objective=gft", "objective.no_gal=true", "objective.no_dcr=true"),
}

LOWER_NLL = ("sft", "iw_sft", "iw_sft-ema", "psft", "focal", "eaft", "gft-no_gal-no_dcr")
"""What SFT lowers."""
RAISE_P = ("dft", "asft", "asft-k3")
"""What DFT raises: the mean probability, which is its mean weight; the likelihood of rare tokens may fall."""


@pytest.fixture(scope="module")
def rows(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows of the tiny world with every column: three origins, advantages of both signs, behaviour log-probs."""
    from transformers import AutoTokenizer

    from verl_dft.data.arithmetic import make_problems
    from verl_dft.data.prepare import rows_of
    from verl_dft.data.records import write_rows

    rng = np.random.default_rng(3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    made = rows_of(make_problems(24, seed=1), prompt="raw")
    for index, row in enumerate(made):
        row.origin = ("expert", "self", "guided")[index % 3]
        row.response_ids = tokenizer(row.messages.pop()["content"], add_special_tokens=False)["input_ids"]
        row.advantage = float(rng.normal())
        if row.origin != "expert":
            row.behavior_logp = (-rng.exponential(0.3, len(row.response_ids))).tolist()
    path = tmp_path_factory.mktemp("rows") / "every_column.parquet"
    write_rows(path, made)
    return path


@pytest.fixture(scope="module")
def trained(
    ranks: ForkServer, tiny_base: Path, rows: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder with a run per name of ``RUNS``."""
    folder = tmp_path_factory.mktemp("objectives")
    common = [f"model={tiny_base}", f"data={rows}", f"data.val_files={rows}", f"data.cache_dir={cache_dir}",
              "data.max_length=256", "data.train_batch_size=8", "data.micro_batch_size_per_gpu=4",
              f"trainer.total_training_steps={STEPS}", "trainer.test_freq=10", "trainer.logger=[]", "optim.lr=1e-3",
              "optim.clip_grad=1e9"]  # fmt: skip
    lines = [json.dumps(["train", *options, *common, f"output_dir={folder / name}"]) for name, options in RUNS.items()]
    ranks.ok(lines, call="probes:in_turn", timeout=300)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_trains_twenty_steps(trained: Path, tiny_base: Path, name: str) -> None:
    out = trained / name
    for key in ("train/loss", "train/nll", "train/token_weight", "train/changed_frac", "train/grad_norm"):
        values = losses(out, key)
        assert len(values) == STEPS and all(map(math.isfinite, values)), key
    assert min(losses(out, "train/grad_norm")) > 1e-4
    assert len(losses(out, "val/nll")) == len(losses(out, "val/objective")) == 2
    before, after = weights(tiny_base), weights(out / "model")
    assert max(np.abs(before[key] - after[key]).max() for key in before) > 1e-3
    # the first and the sixth epoch, of the same rows; the others move neither figure by themselves
    key, sign = {**dict.fromkeys(LOWER_NLL, ("nll", -1)), **dict.fromkeys(RAISE_P, ("token_weight", 1))}.get(
        name, ("num_tokens", 0)
    )
    values = losses(out, f"train/{key}")
    assert sign * (sum(values[15:18]) - sum(values[:3])) >= 0 and (sign == 0 or values[15:18] != values[:3])


def test_methods_differ_and_limits_do_not(trained: Path) -> None:
    nll = {name: tuple(losses(trained / name, "train/nll")) for name in RUNS}
    same = [("sft", "gft-no_gal-no_dcr")]
    for one, other in same:
        assert nll[one] == nll[other]
        assert_same_weights(trained / one / "model", trained / other / "model", atol=0)
    others = [name for name in RUNS if name != "gft-no_gal-no_dcr"]
    assert len({nll[name] for name in others}) == len(others), "two methods trained the same"
    first = [nll[name][0] for name in RUNS]
    np.testing.assert_allclose(first, first[0], rtol=1e-6, err_msg="all start from one model and batch")


def test_what_the_trainer_provided_is_reported(trained: Path) -> None:
    assert losses(trained / "psft", "train/num_updates") == [2] * STEPS
    assert max(losses(trained / "psft", "train/clipped_frac")) > 0
    assert 0 < max(losses(trained / "gft", "train/rectified_frac")) <= 1
    shares = [losses(trained / "is_sft", f"train/{name}_frac") for name in ("expert", "teacher", "self", "guided")]
    np.testing.assert_allclose(np.sum(shares, axis=0), 1, atol=1e-6)
    assert min(losses(trained / "is_sft", "train/stored_frac")) > 0
    assert losses(trained / "iw_sft", "train/token_weight")[0] == pytest.approx(1, abs=1e-4), "theta is the reference"
    assert losses(trained / "asft", "train/ref_kl")[0] == pytest.approx(0, abs=1e-5)
    assert losses(trained / "asft", "train/ref_kl")[-1] > 0
    assert min(losses(trained / "dft-exempt", "train/exempt_frac")) > 0


@pytest.mark.nightly
@pytest.mark.slow
def test_ranks_and_micro_batches_do_not_matter(
    ranks: ForkServer, tiny_base: Path, rows: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """1 rank with micro-batches of 4 rows, and 2 ranks with micro-batches of 1 (packed): one trajectory each."""
    layouts = {1: ("data.micro_batch_size_per_gpu=4",),
               2: ("data.micro_batch_size_per_gpu=1", "model.use_remove_padding=true")}  # fmt: skip
    for world, options in layouts.items():
        for name in RUNS:
            argv = ["train", *RUNS[name], *steady(tiny_base, rows, cache_dir, tmp_path / f"{name}-{world}"), *options]
            ranks.ok(argv, call="verl_dft.cli:main", world=world)
    for name in RUNS:
        one, two = tmp_path / f"{name}-1", tmp_path / f"{name}-2"
        for key in ("train/loss", "train/nll", "train/token_weight", "train/changed_frac", "train/grad_norm"):
            np.testing.assert_allclose(
                losses(two, key), losses(one, key), rtol=2e-4, atol=1e-6, err_msg=f"{name} {key}"
            )
        assert_same_weights(one / "model", two / "model", atol=5e-5)


def steady(model: Path, rows: Path, cache: Path, out: Path) -> list[str]:
    """Three steps of plain SGD, whose result does not hang on rounding as Adam's may."""
    return [f"model={model}", f"data={rows}", f"data.cache_dir={cache}", "data.max_length=256",
            "data.train_batch_size=8", "trainer.total_training_steps=3", "trainer.logger=[]", "optim.optimizer=SGD",
            "optim.lr=0.05", "optim.weight_decay=0", "optim.lr_warmup_steps_ratio=0", "trainer.save_freq=-1",
            f"output_dir={out}"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.nightly
def test_micro_batches_without_a_trained_token(
    ranks: ForkServer, tiny_base: Path, rows: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """They add nothing, and their backward pass works on 2 ranks, of which one may have more of them."""
    for world in (1, 2):
        for name in RUNS:
            argv = [*RUNS[name], *steady(tiny_base, rows, cache_dir, tmp_path / f"{name}-{world}")]
            ranks.ok([*argv, "data.micro_batch_size_per_gpu=1"], call="probes:masked_rows", world=world)
    for name in RUNS:
        (one,) = (json.loads((tmp_path / f"{name}-1" / "masked_0.json").read_text()),)
        two = [json.loads((tmp_path / f"{name}-2" / f"masked_{rank}.json").read_text()) for rank in range(2)]
        assert one["masked"] == two[0]["masked"] + two[1]["masked"] > 0
        for key in ("loss", "grad_norm", "train/nll", "train/num_tokens"):
            assert math.isfinite(one[key])
            np.testing.assert_allclose(two[0][key], one[key], rtol=2e-4, atol=1e-6, err_msg=f"{name} {key}")
