"""Training without logits equals training with them, through the real trainer; what needs logits keeps them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, STEADY, ForkServer, TrainArgv, assert_same_weights, losses

pytestmark = pytest.mark.integration
METRICS = ("train/loss", "train/nll", "train/token_weight", "train/grad_norm", "val/nll")
LORA = ("model.lora_rank=4", "model.target_modules=all-linear", "optim.lr=0.1")
CHECKPOINTING = ("model.enable_gradient_checkpointing=true",)
CASES: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "1-tied-padded": (1, "small_model", ()),
    "2-tied-packed": (2, "small_model", ("model.use_remove_padding=true", *CHECKPOINTING)),
    "2-tied-padded": (2, "small_model", ("model.use_remove_padding=false", *CHECKPOINTING)),
    "2-untied-packed": (2, "untied_model", ("model.use_remove_padding=true",)),
    "2-untied-padded": (2, "untied_model", ("model.use_remove_padding=false", "data.micro_batch_size_per_gpu=2")),
    "2-lora-tied": (2, "small_model", (*LORA, *CHECKPOINTING)),
    "2-lora-untied": (2, "untied_model", (*LORA, "model.use_remove_padding=true")),
    "2-dynamic": (2, "small_model", ("data.use_dynamic_bsz=true", "data.max_token_len_per_gpu=256")),
}


@pytest.fixture
def run(ranks: ForkServer, train_argv: TrainArgv, uneven_rows: Path, tmp_path: Path) -> Callable[..., Path]:
    """``run(head, *overrides, world=…, model=…)``: train three steps, notes what verl takes for logits."""

    def train(head: str, *overrides: str, world: int = 1, model: Path, name: str = "") -> Path:
        out = tmp_path / f"{name}{head}"
        common = (f"trainer.log_prob_head={head}", f"data.val_files={uneven_rows}", "trainer.test_freq=3",
                  "trainer.total_training_steps=3", "optim.lr_warmup_steps_ratio=0", "optim.clip_grad=1e9",
                  "export.dtype=fp32", STEADY)  # fmt: skip
        argv = train_argv(out, *common, *overrides, model=model)
        ranks.ok([str(out) + ".json", *argv], world=world, call="head_probe:widths")
        return out

    return train


def widths(out: Path) -> set[int]:
    return set(json.loads(Path(str(out) + ".json").read_text()))


@pytest.mark.parametrize("case", CASES)
def test_same_training_without_logits(run: Callable[..., Path], request: pytest.FixtureRequest, case: str) -> None:
    world, model, options = CASES[case]
    folder = request.getfixturevalue(model)
    chunked = run("auto", *options, world=world, model=folder)
    logits = run("logits", *options, world=world, model=folder)
    assert widths(chunked) == {3} and widths(logits) == {512}
    for metric in METRICS:
        assert len(losses(logits, metric)) == (1 if metric.startswith("val") else 3)
        np.testing.assert_allclose(losses(chunked, metric), losses(logits, metric), rtol=2e-5, err_msg=metric)
    assert min(losses(logits, "train/grad_norm")) > 0.01
    assert len(set(losses(logits))) == 3, "the weights must move"
    assert_same_weights(chunked / "model", logits / "model", atol=2e-5)


def test_in_bf16(run: Callable[..., Path], small_model: Path) -> None:
    """Both paths round the same logits to bf16; what differs is the order of sums."""
    chunked = run("chunked", "precision=bf16", world=2, model=small_model)
    logits = run("logits", "precision=bf16", world=2, model=small_model)
    assert widths(chunked) == {3}
    for metric in METRICS[:4]:
        np.testing.assert_allclose(losses(chunked, metric)[0], losses(logits, metric)[0], rtol=5e-3, err_msg=metric)


@pytest.mark.parametrize("packed", [False, True])
def test_entropy_and_old_log_probs(run: Callable[..., Path], small_model: Path, packed: bool) -> None:
    """Entropy from the same pass; log-probs scored before a step's updates take the same path."""
    options = ("objective._target_=needs.Recorder", "objective.fields=[entropy,old_logp]", "data.mini_batch_size=4",
               f"model.use_remove_padding={packed}")  # fmt: skip
    chunked = run("chunked", *options, world=2, model=small_model)
    logits = run("logits", *options, world=2, model=small_model)
    assert widths(chunked) == {3}
    for metric in ("train/loss", "train/mean_entropy", "train/mean_old_logp"):
        np.testing.assert_allclose(losses(chunked, metric), losses(logits, metric), rtol=2e-5, err_msg=metric)


def test_what_needs_logits_gets_them(run: Callable[..., Path], small_model: Path, other_model: Path) -> None:
    options = ("objective._target_=needs.Pull", f"reference.path={other_model}")
    out = run("auto", *options, model=small_model)
    assert widths(out) == {512} and min(losses(out)) > 0


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that divides its logits by 4 after its output layer."""
    import torch
    from transformers import AutoTokenizer, GraniteConfig, GraniteForCausalLM

    from verl_dft.paths import recipes_dir

    tokenizer = AutoTokenizer.from_pretrained(recipes_dir() / "tiny" / "base")
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=512, num_hidden_layers=2, max_position_embeddings=256, logits_scaling=4.0, **SMALL,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "granite"
    model = GraniteForCausalLM(config).float()
    model.model.embed_tokens.weight.data *= 20
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_scales_its_logits_keeps_them(run: Callable[..., Path], granite: Path, tmp_path: Path) -> None:
    """It is recognised in the first micro-batch, which is then run again, on both ranks."""
    auto = run("auto", world=2, model=granite)
    logits = run("logits", world=2, model=granite)
    seen = json.loads(Path(str(auto) + ".json").read_text())
    assert seen[0] == 3 and set(seen[1:]) == {512}
    for metric in METRICS:
        np.testing.assert_allclose(losses(auto, metric), losses(logits, metric), rtol=1e-6, err_msg=metric)
    assert_same_weights(auto / "model", logits / "model", atol=1e-6)


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ("granite", (), "changes its logits after its output layer"),
        ("small_model", ("model.lora_rank=4", "model.target_modules=[lm_head]"), "output layer has adapters"),
    ],
)
def test_chunked_or_an_error(
    ranks: ForkServer, train_argv: TrainArgv, tmp_path: Path, request: pytest.FixtureRequest,
    model: str, options: tuple[str, ...], reason: str,
) -> None:  # fmt: skip
    folder = request.getfixturevalue(model)
    common = ("trainer.total_training_steps=1", *options)
    chunked = train_argv(tmp_path / "chunked", "trainer.log_prob_head=chunked", *common, model=folder)
    finished = ranks.run(chunked, world=2)
    assert 2 in finished.codes, finished.log[-3000:]
    assert "error: trainer.log_prob_head=chunked" in finished.log and reason in finished.log
    log = ranks.ok(train_argv(tmp_path / "auto", *common, model=folder), world=2)
    assert log.count(reason) == 1 and "full logits" in log, "one line, from the first rank"


def test_sequence_parallel_shards_have_their_own_targets(ranks: ForkServer, tmp_path: Path) -> None:
    """verl's slices need flash attention to train with; that each shard computes its own tokens is tested without."""
    ranks.ok([str(tmp_path)], world=2, call="head_probe:sequence_parallel_targets")
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0]["whole"] == found[1]["whole"] and len(found[0]["whole"]) == 7
    assert found[0]["shard"] + found[1]["shard"] == found[0]["whole"]
    assert found[0]["shard"] and found[1]["shard"]
