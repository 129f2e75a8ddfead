"""What the trainer provides to an objective, against a training loop in plain torch."""

import shutil
from collections.abc import Callable
from pathlib import Path

import dense
import numpy as np
import pytest
import torch
from conftest import ForkServer, assert_same_weights, losses, weights
from needs import Pull, Ratio

pytestmark = pytest.mark.integration
LR, BATCH = 0.05, 8


def command(model: Path, rows: Path, out: Path, cache: Path, objective: str, *options: str) -> list[str]:
    """Overrides of ``verl-dft train`` for plain SGD with a fixed step size."""
    return [
        f"objective._target_={objective}",
        f"model={model}",
        f"data={rows}",
        f"data.cache_dir={cache}",
        "data.max_length=256",
        f"data.train_batch_size={BATCH}",
        "trainer.logger=[]",
        "optim.optimizer=SGD",
        f"optim.lr={LR}",
        "optim.weight_decay=0",
        "optim.clip_grad=1e9",
        "optim.lr_scheduler_type=constant",
        "optim.lr_warmup_steps_ratio=0",
        "optim.zero_indexed_step=false",
        f"output_dir={out}",
        *options,
    ]


def run(
    ranks: ForkServer, model: Path, rows: Path, out: Path, cache: Path, objective: str, *options: str, world: int = 1
) -> Path:
    ranks.ok(command(model, rows, out, cache, objective, *options), world=world)
    return out


def check(out: Path, expected: dense.Run, updates: int = 1) -> None:
    """Loss and norm by step: means over the step's updates."""
    for key, values in (("train/loss", expected.losses), ("train/grad_norm", expected.norms)):
        means = np.array(values).reshape(-1, updates).mean(1)
        np.testing.assert_allclose(losses(out, key), means, rtol=2e-4, err_msg=key)


def check_weights(out: Path, model: torch.nn.Module) -> None:
    state = model.state_dict()
    for name, value in weights(out / "model").items():
        np.testing.assert_allclose(value, state[name].numpy(), atol=2e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("world", [1, 2])
def test_old_logp_and_updates(
    ranks: ForkServer, small_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path, world: int
) -> None:
    """Several updates per step against the policy at the step's start."""
    options = ("data.mini_batch_size=2", "trainer.total_training_steps=2", "data.micro_batch_size_per_gpu=1")
    out = run(ranks, small_model, uneven_rows, tmp_path / "run", cache_dir, "needs.Ratio", *options, world=world)
    rows, model = dense.load_rows(uneven_rows, small_model, cache_dir), dense.load_model(small_model)
    expected = dense.train(model, rows, dense.batches(rows, BATCH, 2, updates=4), Ratio(), LR)
    assert losses(out, "train/num_updates") == [4, 4] and losses(out, "train/updates") == [4, 8]
    assert not np.allclose(expected.losses[1], -1, atol=1e-3), "the second update must differ from the first"
    check(out, expected, updates=4)
    check_weights(out, model)


@pytest.mark.parametrize(("world", "reshard"), [(1, True), (2, True), (2, False)])
def test_moving_average(
    ranks: ForkServer, small_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path, world: int, reshard: bool
) -> None:
    options = ("objective.averaged=true", "objective.ema_decay=0.5", "trainer.total_training_steps=3",
               f"engine.reshard_after_forward={reshard}")  # fmt: skip
    out = run(ranks, small_model, uneven_rows, tmp_path / "run", cache_dir, "needs.Ratio", *options, world=world)
    rows, model = dense.load_rows(uneven_rows, small_model, cache_dir), dense.load_model(small_model)
    expected = dense.train(model, rows, dense.batches(rows, BATCH, 3), Ratio(averaged=True), LR, ema_decay=0.5)
    assert not np.allclose(expected.losses[2], -1, atol=1e-3)
    check(out, expected)
    check_weights(out, model)


def test_moving_average_survives_a_kill(
    ranks: ForkServer, small_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path
) -> None:
    options = ("objective.averaged=true", "trainer.total_training_steps=4", "trainer.save_freq=2")
    whole = run(ranks, small_model, uneven_rows, tmp_path / "whole", cache_dir, "needs.Ratio", *options)
    killed = command(small_model, uneven_rows, tmp_path / "killed", cache_dir, "needs.Ratio", *options)
    finished = ranks.run(killed, env={"VERL_DFT_FAILPOINT": "worker.step:3"})
    assert finished.codes != [0] and len(losses(tmp_path / "killed")) < 4
    ranks.ok(killed)
    assert losses(tmp_path / "killed") == losses(whole)
    assert_same_weights(tmp_path / "killed" / "model", whole / "model", atol=0)


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (1, ()),
        (2, ("model.enable_gradient_checkpointing=true",)),
        (2, ("model.use_remove_padding=true", "data.micro_batch_size_per_gpu=2")),
    ],
    ids=["1-rank", "2-ranks-checkpointing", "2-ranks-packed"],
)
def test_reference_kl(
    ranks: ForkServer, small_model: Path, cache_dir: Path, uneven_rows: Path, tmp_path: Path, other_model: Path,
    world: int, options: tuple[str, ...],
) -> None:  # fmt: skip
    """Value and gradient of the full-vocabulary KL, with another model as the reference."""
    out = run(
        ranks, small_model, uneven_rows, tmp_path / "run", cache_dir, "needs.Pull", f"reference.path={other_model}",
        "trainer.total_training_steps=2", *options, world=world,
    )  # fmt: skip
    rows, model = dense.load_rows(uneven_rows, small_model, cache_dir), dense.load_model(small_model)
    reference = dense.load_model(other_model)

    def beside(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"ref_kl": dense.kl(reference, model, row)}

    expected = dense.train(model, rows, dense.batches(rows, BATCH, 2), Pull(), LR, beside=beside)
    assert expected.losses[0] > 0.05
    check(out, expected)
    check_weights(out, model)


@pytest.mark.parametrize("world", [1, 2])
def test_reference_kl_under_lora(
    ranks: ForkServer, small_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path, world: int
) -> None:
    """The reference is the model without its adapters: KL 0 at the start, and what the merged export says later."""
    lora = ("model.lora_rank=4", "model.target_modules=all-linear", "model.enable_gradient_checkpointing=true")
    every = ("data.train_batch_size=40", "optim.lr=5", "objective.fields=[ref_kl]")
    two = run(
        ranks, small_model, uneven_rows, tmp_path / "two", cache_dir, "needs.Recorder", *lora, *every,
        "trainer.total_training_steps=2", world=world,
    )  # fmt: skip
    three = run(
        ranks, small_model, uneven_rows, tmp_path / "three", cache_dir, "needs.Recorder", *lora, *every,
        "trainer.total_training_steps=3", world=world,
    )  # fmt: skip
    rows = dense.load_rows(uneven_rows, small_model, cache_dir)
    base, tuned = dense.load_model(small_model), dense.load_model(two / "model")
    with torch.no_grad():
        pairs = [(dense.kl(base, tuned, rows[i]), dense.targets(rows[i])[1]) for i in range(len(rows))]
    expected = sum(float(value[mask].sum()) for value, mask in pairs) / sum(int(mask.sum()) for _, mask in pairs)
    seen = losses(three, "train/mean_ref_kl")
    assert abs(seen[0]) < 1e-6 and expected > 1e-3
    np.testing.assert_allclose(seen[2], expected, rtol=1e-3)


@pytest.mark.parametrize("world", [1, 2])
def test_reference_logp_is_scored_once(
    ranks: ForkServer, small_model: Path, other_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path,
    world: int,
) -> None:  # fmt: skip
    rows = dense.load_rows(uneven_rows, small_model, cache_dir)
    options = ("objective.fields=[ref_logp]", "trainer.total_training_steps=2", "data.train_batch_size=16",
               "trainer.save_freq=1")  # fmt: skip
    for reference, path in ((small_model, ()), (other_model, (f"reference.path={other_model}",))):
        out = tmp_path / reference.parent.name / reference.name
        run(ranks, small_model, uneven_rows, out, cache_dir, "needs.Recorder", *options, *path, world=world)
        values = np.load(out / "data" / "ref_logp-train.npy")
        model = dense.load_model(reference)
        for index in range(len(rows)):
            with torch.no_grad():
                expected = torch.where(dense.targets(rows[index])[1], dense.logp(model, rows[index]), 0.0)
            np.testing.assert_allclose(values[rows.flat(index)][1:], expected.numpy(), atol=2e-5)
        means = losses(out, "train/mean_ref_logp")
        for step, (batch,) in enumerate(dense.batches(rows, 16, 2)):
            trained = [values[rows.flat(i)][1:][dense.targets(rows[i])[1].numpy()] for i in batch]
            np.testing.assert_allclose(means[step], np.concatenate(trained).mean(), rtol=1e-4)
    if world == 1:  # the same run anew takes the file where it is whole, and scores again where it is not
        file = out / "data" / "ref_logp-train.npy"
        whole, written = file.read_bytes(), file.stat().st_mtime_ns
        for content in (whole, whole[:200] + bytes([whole[200] ^ 4]) + whole[201:]):
            if content != whole:
                assert file.stat().st_mtime_ns == written
                file.write_bytes(content)
            shutil.rmtree(out / "checkpoints")
            run(ranks, small_model, uneven_rows, out, cache_dir, "needs.Recorder", *options, *path, world=world)
            assert file.read_bytes() == whole


def test_exempt_tokens_and_origins(
    ranks: ForkServer, small_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path
) -> None:
    out = run(
        ranks, small_model, uneven_rows, tmp_path / "run", cache_dir, "needs.Recorder",
        "objective.fields=[exempt,origin]", "trainer.total_training_steps=1", "data.train_batch_size=40",
    )  # fmt: skip
    rows = dense.load_rows(uneven_rows, small_model, cache_dir)
    tokens = sum(int(dense.targets(rows[i])[1].sum()) for i in range(40))
    assert losses(out, "train/mean_exempt") == [pytest.approx(40 / tokens)]  # one end token a row
    assert losses(out, "train/mean_origin") == [0]


@pytest.mark.nightly
@pytest.mark.slow
def test_ray_provides_the_same(
    ranks: ForkServer, run_cli: Callable, small_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Everything at once, with two workers under Ray and two ranks under torchrun."""
    fields = "[ref_logp,old_logp,ema_logp,entropy,ref_kl,exempt,origin]"
    options = (f"objective.fields={fields}", "data.mini_batch_size=4", "trainer.total_training_steps=3")
    out = run(ranks, small_model, uneven_rows, tmp_path / "ranks", cache_dir, "needs.Recorder", *options, world=2)
    argv = command(small_model, uneven_rows, tmp_path / "ray", cache_dir, "needs.Recorder", *options)
    ray = ("launcher=ray", "trainer.n_gpus_per_node=2")
    done = run_cli(["train", *argv, *ray], timeout=240, env={"PYTHONPATH": str(Path(__file__).parent)})
    assert done.rc == 0, done.stderr[-4000:]
    names = [f"train/mean_{name}" for name in fields.strip("[]").split(",")]
    for name in ("train/loss", "train/grad_norm", "train/num_updates", *names):
        np.testing.assert_allclose(losses(tmp_path / "ray", name), losses(out, name), rtol=2e-4, atol=1e-6)
    assert_same_weights(tmp_path / "ray" / "model", out / "model", atol=2e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_the_gradient_of_the_reference_kl_under_lora(
    ranks: ForkServer, small_model: Path, other_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path,
    world: int,
) -> None:  # fmt: skip
    """A small step against the gradient lowers the loss by lr * norm^2, whatever the adapters were started with."""
    lr = 0.02
    out = run(
        ranks, small_model, uneven_rows, tmp_path / "run", cache_dir, "needs.Pull", f"reference.path={other_model}",
        "model.lora_rank=4", "model.enable_gradient_checkpointing=true", "data.train_batch_size=40",
        f"optim.lr={lr}", "trainer.total_training_steps=3", world=world,
    )  # fmt: skip
    values, norms = np.array(losses(out)), np.array(losses(out, "train/grad_norm"))
    rows, model, reference = (
        dense.load_rows(uneven_rows, small_model, cache_dir), dense.load_model(small_model),
        dense.load_model(other_model),
    )  # fmt: skip
    with torch.no_grad():
        pairs = [(dense.kl(reference, model, rows[i]), dense.targets(rows[i])[1]) for i in range(len(rows))]
    expected = sum(float(v[mask].sum()) for v, mask in pairs) / sum(int(mask.sum()) for _, mask in pairs)
    np.testing.assert_allclose(values[0], expected, rtol=1e-4)
    np.testing.assert_allclose(values[:2] - values[1:], lr * norms[:2] ** 2, rtol=0.05)
    assert values[0] - values[1] > 1e-4 * values[0]


def test_bad_references_are_found_before_the_model_loads(
    ranks: ForkServer, small_model: Path, other_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path
) -> None:
    def refused(name: str, objective: str, *options: str) -> str:
        argv = command(small_model, uneven_rows, tmp_path / name, cache_dir, objective, *options)
        finished = ranks.run([*argv, "trainer.total_training_steps=1"])
        assert finished.codes == [2] and "Loading weights" not in finished.log, finished.log[-2000:]
        return finished.log

    assert "reference.path=nowhere: no model" in refused("a", "needs.Pull", "reference.path=nowhere")
    assert "compares with no reference" in refused("b", "needs.Recorder", f"reference.path={other_model}")
    log = refused("c", "needs.Recorder", "objective.fields=[exempt]", "objective.exempt_tokens=[nothing_like_it]")
    assert "objective.exempt_tokens has 'nothing_like_it'" in log
    assert "log_prob_head=chunked cannot" in refused("d", "needs.Pull", "trainer.log_prob_head=chunked")
    assert "set engine.strategy=fsdp2" in refused("e", "needs.Recorder", "objective.fields=[ema_logp]",
                                                  "engine.strategy=fsdp", "trainer.device=cuda")  # fmt: skip
    # scores of one reference are not taken for another's
    scored = command(
        small_model, uneven_rows, tmp_path / "f", cache_dir, "needs.Recorder", "objective.fields=[ref_logp]"
    )
    assert ranks.run([*scored, "trainer.total_training_steps=1"], env={"VERL_DFT_FAILPOINT": "worker.step"}).codes != [
        0
    ]
    (tmp_path / "f" / "metrics.jsonl").unlink()
    assert "another configuration" in refused(
        "f", "needs.Recorder", "objective.fields=[ref_logp]", f"reference.path={other_model}"
    )


def test_a_reference_beside_a_chat_template_of_the_users(
    ranks: ForkServer, small_model: Path, other_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path
) -> None:
    turn = r"{{ m.content }}{% if m.role == \'assistant\' %}{{ eos_token }}{% endif %}"
    run(
        ranks, small_model, uneven_rows, tmp_path / "run", cache_dir, "needs.Pull", f"reference.path={other_model}",
        "trainer.total_training_steps=1", f"model.custom_chat_template='{{% for m in messages %}}{turn}{{% endfor %}}'",
    )  # fmt: skip
    assert losses(tmp_path / "run")[0] > 0.05


def test_scoring_with_verls_fused_kernels(
    ranks: ForkServer, small_model: Path, uneven_rows: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Their log-probs come under another name."""
    options = (
        "objective.fields=[ref_logp,old_logp,ema_logp]",
        "data.mini_batch_size=4",
        "trainer.total_training_steps=2",
    )
    fused = ("model.use_fused_kernels=true", "model.fused_kernel_options.impl_backend=torch")
    both = [
        run(ranks, small_model, uneven_rows, tmp_path / name, cache_dir, "needs.Recorder", *options, *extra)
        for name, extra in (("fused", fused), ("ours", ()))
    ]
    for key in ("train/loss", "train/mean_ref_logp", "train/mean_old_logp", "train/mean_ema_logp"):
        np.testing.assert_allclose(losses(both[0], key), losses(both[1], key), rtol=1e-3)
