"""Our objectives as verl policy losses: the offline values, exact metrics, options, refusals.

Everything of verl here is the real thing: its registry, configs, ``ppo_loss``, ``agg_loss`` and metrics.
"""

import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.metric import Metric, reduce_metrics
from verl.utils.py_functional import append_to_dict
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from verl_dft.errors import InputError
from verl_dft.objectives import TokenBatch, TokenLoss, get_objective, list_objectives
from verl_dft.origins import ORIGINS
from verl_dft.training.bridge import loss_weight
from verl_dft.training.policy_loss import register_policy_losses
from verl_dft.training.policy_options import online_names

EXPECTED = {"sft", "dft", "gft", "is_sft", "iw_sft", "psft", "chord", "luffy", "chord_mix"}
CASES = [
    *((name, {}) for name in online_names()),
    ("dft", {"alpha": 0.5, "floor": 0.1}),
    ("dft", {"level": "sequence", "length_normalized": True}),
    ("gft", {"tau": 0.3, "level": "sequence", "length_normalized": True}),
    ("is_sft", {"behavior": "self", "clip": 1.1}),
    ("iw_sft", {"level": "token"}),
    ("psft", {"use_advantage": True, "eps_high": math.inf}),
]
IDS = [f"{name}-{'-'.join(options)}" if options else name for name, options in CASES]
LENGTHS = (4, 7, 0, 1, 5, 2)
"""Trained tokens of each row; one row has none (verl pads batches with such rows)."""


def actor(loss_mode: str, options: dict | None = None, **info: int) -> FSDPActorConfig:
    """verl's actor config; ``info`` is what ``ppo_loss`` would write into it."""
    policy_loss = PolicyLossConfig(loss_mode=loss_mode, objective=options or {})
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy_loss, clip_ratio=0.2
    )
    config.global_batch_info.update(info)
    return config


def padded(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """[6, 7] tensors as verl has them, with nonsense in the padding; the first token of row 1 is masked too."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = torch.arange(shape[1])[None] < torch.tensor(LENGTHS)[:, None]
    mask[1, 0] = False
    log_prob = -torch.rand(shape, generator=generator, dtype=torch.float64) * 2
    old = log_prob + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    advantages = torch.randn(shape, generator=generator, dtype=torch.float64)
    log_prob[~mask], old[~mask], advantages[~mask] = -math.inf, math.nan, 1e30
    tensors = {"old_log_prob": old, "log_prob": log_prob, "advantages": advantages}
    return {name: x.to(dtype) for name, x in tensors.items()} | {"response_mask": mask}


def offline(name: str, options: dict, data: dict[str, Tensor], reduction: str = "token_mean") -> tuple[Tensor, Tensor]:
    """Loss and gradient [6, 7] as offline: the trained tokens alone, end to end, reduced as the bridge does."""
    objective, mask = get_objective(name, **options), data["response_mask"]
    leaf = torch.where(mask, data["log_prob"], 0.0).requires_grad_()
    old, seq = data["old_log_prob"][mask], mask.nonzero()[:, 0]
    batch = TokenBatch(
        logp=leaf[mask],
        mask=torch.ones_like(seq, dtype=torch.bool),
        seq=seq,
        num_seqs=len(mask),
        advantage=data["advantages"][mask],
        old_logp=old,
        behavior_logp=old,
        ref_logp=old,
        origin=torch.full_like(seq, ORIGINS.index("self")),
    )
    weight = loss_weight(
        reduction, dp_size=1, batch_tokens=len(seq), batch_seqs=int(mask.any(1).sum()), tokens=len(seq), micros=1
    )
    loss = objective(batch).loss.sum() * weight
    loss.backward()
    return loss.detach(), leaf.grad


def online(name: str, options: dict, data: dict[str, Tensor], **kwargs: object) -> tuple[Tensor, Tensor, dict]:
    tokens = int(data["response_mask"].sum())
    config = actor(name, options, dp_size=1, batch_num_tokens=tokens, global_batch_size=5)
    leaf = data["log_prob"].clone().requires_grad_()
    loss, metrics = core_algos.get_policy_loss_fn(name)(**{**data, "log_prob": leaf}, config=config, **kwargs)
    loss.backward()
    return loss.detach(), leaf.grad, metrics


def test_the_designed_names_are_registered_and_verls_are_untouched() -> None:
    names = {n for n, f in core_algos.POLICY_LOSS_REGISTRY.items() if getattr(f, "verl_dft_objective", None)}
    assert names >= EXPECTED and not names & {"asft", "eaft"}
    for name in names:
        assert core_algos.POLICY_LOSS_REGISTRY[name].verl_dft_objective == name
    assert core_algos.POLICY_LOSS_REGISTRY["vanilla"].__module__ == "verl.trainer.ppo.core_algos"


def test_a_taken_name_is_refused() -> None:
    """verl's own decorator would replace the loss in silence."""
    before = dict(core_algos.POLICY_LOSS_REGISTRY)
    with pytest.raises(InputError, match="already registered by verl_dft.training.policy_loss"):
        register_policy_losses(core_algos)
    assert before == core_algos.POLICY_LOSS_REGISTRY


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_the_value_and_gradient_of_offline(name: str, options: dict) -> None:
    data = padded()
    expected, expected_gradient = offline(name, options, data)
    loss, gradient, _ = online(name, options, data)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-15)
    assert expected_gradient[data["response_mask"]].abs().sum() > 0


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_papers_reduction_is_verls_seq_mean_token_sum(name: str) -> None:
    """``sequence_sum`` offline; verl's own rows without a trained token do not count (5 of 6 remain)."""
    data = padded()
    expected, expected_gradient = offline(name, {}, data, "sequence_sum")
    loss, gradient, _ = online(name, {}, data, loss_agg_mode="seq-mean-token-sum")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_micro_batch_without_a_trained_token_has_a_working_backward(name: str) -> None:
    data = padded()
    data["response_mask"] = torch.zeros_like(data["response_mask"])
    leaf = data["log_prob"].clone().requires_grad_()
    config = actor(name, dp_size=2, batch_num_tokens=9, global_batch_size=4)
    loss, metrics = core_algos.get_policy_loss_fn(name)(**{**data, "log_prob": leaf}, config=config)
    loss.backward()
    assert float(loss.detach()) == 0 and torch.count_nonzero(leaf.grad) == 0
    assert all(metric.aggregate() == 0 for metric in metrics.values())


def test_advantages_are_per_token() -> None:
    data = padded()
    mask = data["response_mask"]
    loss, gradient, metrics = online("gft", {"no_dcr": True}, data)
    nll, advantage = -data["log_prob"][mask], data["advantages"][mask]
    torch.testing.assert_close(loss, (advantage * nll).mean())
    torch.testing.assert_close(gradient[mask], -advantage / len(advantage))
    assert math.isclose(metrics["actor/advantage"].aggregate(), float(advantage.mean()))


def test_rollout_weights_multiply_the_token_losses() -> None:
    data = padded()
    mask = data["response_mask"]
    weights = torch.rand(mask.shape, dtype=torch.float64)
    weights[~mask] = math.nan
    loss, gradient, metrics = online("dft", {}, data, rollout_is_weights=weights)
    logp = data["log_prob"][mask]
    torch.testing.assert_close(loss, (-weights[mask] * logp.exp() * logp).mean())
    torch.testing.assert_close(gradient[mask], -weights[mask] * logp.exp() / len(logp))
    assert torch.count_nonzero(gradient[~mask]) == 0
    assert math.isclose(metrics["actor/token_weight"].aggregate(), float(logp.exp().mean()))  # the objective's own


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_bf16_log_probs_are_computed_with_in_float32(name: str) -> None:
    data = padded(dtype=torch.bfloat16)
    loss, gradient, _ = online(name, {}, data)
    upcast = {key: x.float() if x.is_floating_point() else x for key, x in data.items()}
    expected, expected_gradient, _ = online(name, {}, upcast)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert gradient.dtype == torch.bfloat16 and torch.equal(gradient, expected_gradient.bfloat16())


def rows(seed: int = 1) -> list[dict[str, Tensor]]:
    """Rows as verl's engine has them: log-probs over prompt and response, the rest over the response."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in (3, 8, 1, 5, 2, 6):
        mask = torch.ones(length, dtype=torch.int64)
        mask[: length // 3] = 0  # an answer of a tool, say
        made.append(
            {
                "log_probs": -torch.rand(2 + length, generator=generator, dtype=torch.float64),
                "prompts": torch.ones(2, dtype=torch.int64),
                "responses": torch.ones(length, dtype=torch.int64),
                "response_mask": mask,
                "old_log_probs": -torch.rand(length, generator=generator, dtype=torch.float64),
                "advantages": torch.randn(length, generator=generator, dtype=torch.float64),
            }
        )
    return made


def jagged(batch: list[dict[str, Tensor]], key: str) -> Tensor:
    return torch.nested.as_nested_tensor([row[key] for row in batch], layout=torch.jagged)


def trained(row: dict[str, Tensor], key: str) -> Tensor:
    """The values of the trained tokens; verl's log-prob of a token is at the position before it."""
    values = row["log_probs"][1:-1] if key == "log_probs" else row[key]
    return values[row["response_mask"].bool()]


@pytest.mark.parametrize(
    "split",
    [[[[0, 1, 2, 3, 4, 5]]], [[[0], [1, 2, 3], [4, 5]]], [[[0, 1], [2]], [[3], [4, 5]]]],
    ids=["one", "3-micro-batches", "2-ranks-of-2"],
)
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_metrics_are_token_means_over_micro_batches_and_ranks(name: str, split: list[list[list[int]]]) -> None:
    """Through verl's ``ppo_loss`` and the aggregation of its worker and trainer; a mean of means would differ."""
    every = rows()
    tokens = sum(int(row["response_mask"].sum()) for row in every)
    ranks, total = [], 0.0
    for micros in split:
        collected: dict = {}
        for micro in micros:
            batch = [every[i] for i in micro]
            fields = {key: jagged(batch, key) for key in batch[0] if key != "log_probs"}
            facts = {"dp_size": len(split), "batch_num_tokens": tokens, "global_batch_size": len(every)}
            data = TensorDict(fields, batch_size=len(batch))
            for key, value in facts.items():
                data.set_non_tensor(key, value)
            loss, metrics = ppo_loss(actor(name), {"log_probs": jagged(batch, "log_probs")}, data)
            append_to_dict(collected, metrics)
            total += float(loss) / len(split)
        ranks.append(collected)
    merged = {key: [Metric.aggregate_dp([rank[key] for rank in ranks])] for key in ranks[0]}
    shown = reduce_metrics(merged)

    logp = torch.cat([trained(row, "log_probs") for row in every])
    old = torch.cat([trained(row, "old_log_probs") for row in every])
    advantage = torch.cat([trained(row, "advantages") for row in every])
    assert math.isclose(shown["actor/nll"], float(-logp.mean()), rel_tol=1e-9)
    assert shown["actor/tokens"] == tokens == len(logp)
    assert math.isclose(shown["actor/pg_loss"], total, rel_tol=1e-9)
    assert 0 <= shown["actor/changed_frac"] <= 1
    p, ratio = logp.exp(), (logp - old).exp()
    exact = {
        "sft": {"token_weight": torch.ones_like(p), "changed_frac": torch.zeros_like(p)},
        "dft": {"token_weight": p, "changed_frac": torch.ones_like(p)},
        "is_sft": {"token_weight": p},
        "chord": {"token_weight": p * (1 - p)},
        "gft": {"advantage": advantage, "rectified_frac": (p < 0.7).double()},
        "psft": {"ratio": ratio, "clipped_frac": (ratio > 1.28).double()},
        "luffy": {"advantage": advantage, "others_frac": torch.zeros_like(p)},  # verl's own command names no writers
        "chord_mix": {"others_frac": torch.zeros_like(p)},
        "iw_sft": {},
    }
    for key, values in exact[name].items():
        assert math.isclose(shown[f"actor/{key}"], float(values.mean()), rel_tol=1e-9), key
    if len(split[0]) > 1:
        nlls = [float(-torch.cat([trained(every[i], "log_probs") for i in m]).mean()) for r in split for m in r]
        assert not math.isclose(shown["actor/nll"], float(np.mean(nlls)), rel_tol=1e-3)


class Careless:
    """Someone's objective: nonsense outside the mask, and a metric that is one number."""

    requires = frozenset()

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        self.seen = batch
        nonsense = torch.where(batch.mask, -batch.logp, torch.nan)
        return TokenLoss(nonsense, {"nll": nonsense.detach(), "answer": torch.tensor(2.0)})


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_nonsense_outside_the_mask_and_metrics_of_one_number(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    objective, data = Careless(), padded()
    monkeypatch.setattr("verl_dft.training.policy_loss.online_objective", lambda name, options: objective)
    loss, gradient, metrics = online("sft", {}, data, loss_agg_mode=mode)
    assert math.isfinite(loss) and gradient[data["response_mask"]].isfinite().all()
    nll = -data["log_prob"][data["response_mask"]].mean()
    assert math.isclose(metrics["actor/nll"].aggregate(), float(nll))
    assert metrics["actor/answer"].aggregate() == pytest.approx(2.0)
    fields = ("advantage", "old_logp", "behavior_logp", "ref_logp", "origin")
    assert all(getattr(objective.seen, field) is None for field in fields)  # it asked for none


def test_without_a_token_count_metrics_are_verls_mean_of_means() -> None:
    data = padded()
    _, metrics = core_algos.get_policy_loss_fn("dft")(**data, config=actor("dft"))
    nll = -data["log_prob"][data["response_mask"]].mean()
    assert math.isclose(metrics["actor/nll"].aggregate(), float(nll)) and "actor/tokens" not in metrics
    assert metrics["actor/nll"].aggregation.value == "mean"


def test_verls_own_metrics_are_wrapped_as_before() -> None:
    data = padded(dtype=torch.float32)
    clean = {k: torch.where(data["response_mask"], x, 0) if k != "response_mask" else x for k, x in data.items()}
    _, metrics = core_algos.get_policy_loss_fn("vanilla")(**clean, config=actor("vanilla"))
    wrapped = Metric.from_dict(metrics, "mean")
    assert list(wrapped) == list(metrics)
    assert all(m.aggregation.value == "mean" and m.values == [metrics[k]] for k, m in wrapped.items())


def test_options_travel_with_the_config_and_its_pickle() -> None:
    data = padded()
    config = pickle.loads(pickle.dumps(actor("gft", {"tau": 0.0}, dp_size=1, batch_num_tokens=18)))
    loss, _ = core_algos.get_policy_loss_fn("gft")(**data, config=config)
    expected, _ = offline("gft", {"tau": 0.0}, data)
    default, _ = offline("gft", {}, data)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert not math.isclose(float(loss), float(default), rel_tol=1e-3)


def compose(*overrides: str) -> object:
    """verl's actor config from its own YAML and a command line, as its driver and workers build it."""
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        fixed = ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1", "actor_rollout_ref.model.path=none")
        composed = compose("ppo_trainer", overrides=[*fixed, *overrides])
    return omega_conf_to_dataclass(composed.actor_rollout_ref.actor)


KEY = "actor_rollout_ref.actor.policy_loss"


def test_options_on_verls_command_line() -> None:
    config = compose(f"{KEY}.loss_mode=psft", f"+{KEY}.objective.eps_high=inf", f"+{KEY}.objective.use_advantage=true")
    assert config.policy_loss.get("objective") == {"eps_high": math.inf, "use_advantage": True}
    assert compose().policy_loss.get("objective") == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([f"{KEY}.loss_mode=gft", f"+{KEY}.objective.tua=1"], ["no option 'tua'", "valid: tau", "loss_mode=gft"]),
        ([f"{KEY}.loss_mode=gft", f"+{KEY}.objective.tau=-1"], ["tau must be >= 0"]),
        ([f"{KEY}.loss_mode=asft"], ["cannot run in verl's online trainer", "logits", "ref_kl", "objective=asft"]),
        ([f"{KEY}.loss_mode=asft", f"+{KEY}.objective.kl=k3"], ["frozen reference model", "ref_logp"]),
        ([f"{KEY}.loss_mode=eaft"], ["entropy of the policy"]),
        ([f"{KEY}.loss_mode=iw_sft", f"+{KEY}.objective.policy=ema"], ["averaged policy", "ema_logp"]),
        ([f"{KEY}.loss_mode=dft", f"+{KEY}.objective.exempt_tokens=[2]"], ["token ids", "exempt"]),
        ([f"+{KEY}.objective.tau=1"], ["loss_mode=vanilla is none", "remove"]),
    ],
    ids=["unknown", "value", "asft", "asft-k3", "eaft", "ema", "exempt", "vanilla"],
)
def test_what_cannot_run_online_is_refused_with_the_config(overrides: list[str], said: list[str]) -> None:
    with pytest.raises(Exception, match="InputError") as error:  # hydra's wrapper around it
        compose(*overrides)
    assert all(part in str(error.value) for part in said), str(error.value)


def test_every_objective_is_registered_or_refused_for_a_reason() -> None:
    for name in sorted(set(list_objectives()) - set(online_names())):
        with pytest.raises(InputError, match="cannot run in verl's online trainer: it needs .*, and verl hands"):
            PolicyLossConfig(loss_mode=name)
    for name in online_names():
        assert PolicyLossConfig(loss_mode=name).loss_mode == name


@pytest.mark.integration
def test_registration_waits_for_verls_module() -> None:
    """Importing verl's losses at plugin load would cost every process of Ray seconds."""
    code = (
        "import sys, verl, verl_dft.plugin as p; lazy = 'verl.trainer.ppo.core_algos' not in sys.modules\n"
        "assert lazy and 'policy_losses' not in p.STATUS and 'verl.workers.config' not in sys.modules\n"
        "import verl.trainer.ppo.core_algos; print(p.STATUS['policy_losses'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) >= EXPECTED
