"""Our objectives as verl policy losses: ``actor_rollout_ref.actor.policy_loss.loss_mode=gft``.

verl hands a policy loss padded tensors [B, T] over the response tokens of B sequences. They become the flat
:class:`TokenBatch` that an objective also gets offline, so that the same tensors give the same loss.

``old_log_prob`` fills ``old_logp``, ``behavior_logp`` and iw_sft's ``ref_logp``. In verl's default mode it is the
trainer's own log-prob under the weights at the start of the step, which are those that wrote the text (a synchronous
trainer syncs before it samples). With ``algorithm.rollout_correction.bypass_mode=true`` it is what vLLM reported while
sampling. It stays fixed over the mini-batches and epochs of the step. In ``verl-dft rl`` rows say who wrote them, and
``behavior_logp`` is the sampler's (:mod:`verl_dft.training.policy_rows`).
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from verl_dft.errors import InputError
from verl_dft.objectives import Objective, TokenBatch, TokenLoss
from verl_dft.origins import ORIGINS
from verl_dft.training.policy_options import online_names, online_objective
from verl_dft.training.policy_rows import Rows, current_rows

PolicyLoss = Callable[..., tuple[Tensor, dict[str, Any]]]


def full_precision(x: Tensor) -> Tensor:
    """Half-precision values as float32 (verl's log-probs are bf16 under autocast); others unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_batch(
    objective: Objective,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    rows: Rows | None = None,
) -> TokenBatch:
    """The padded micro-batch as an objective sees it: N = B * T, row by row; padding is outside ``mask``.

    Args:
        objective: gets the fields it requires and no others, as offline.
        old_log_prob, log_prob, advantages, response_mask: [B, T], as verl gives them to a policy loss.
        rows: who wrote the rows, in a run of ``verl-dft rl``; None: the policy wrote all, ``old_log_prob`` being its
            log-probs then.
    """
    num_seqs, length = log_prob.shape
    seq = torch.arange(num_seqs, device=log_prob.device).repeat_interleave(length)
    old = full_precision(old_log_prob).reshape(-1)
    fields = {
        "advantage": full_precision(advantages).reshape(-1),
        "origin": torch.full_like(seq, ORIGINS.index("self")),
        **dict.fromkeys(("old_logp", "behavior_logp", "ref_logp"), old),
    }
    if rows is not None:
        fields["origin"], fields["behavior_logp"] = rows.origin[seq], rows.behavior_logp.reshape(-1)
    return TokenBatch(
        logp=full_precision(log_prob).reshape(-1),
        mask=response_mask.reshape(-1).bool(),
        seq=seq,
        num_seqs=num_seqs,
        **{name: value for name, value in fields.items() if name in objective.requires},
    )


def token_metrics(batch: TokenBatch, result: TokenLoss, info: dict[str, Any]) -> dict[str, Any]:
    """``actor/<name>``: exact means over the trained tokens of the mini-batch, and their number ``actor/tokens``.

    Each micro-batch reports its share of the mean, numerator times ranks over the mini-batch's tokens; verl adds the
    shares of a rank's micro-batches and averages over ranks. Where an engine does not say how many tokens the
    mini-batch has, the means of the micro-batches are averaged, as verl's own losses do.
    """
    from verl.utils.metric import AggregationType, Metric

    tokens = batch.mask.sum().to(batch.logp.dtype)
    zero = torch.zeros((), dtype=batch.logp.dtype, device=batch.logp.device)
    columns = {name: value.to(batch.logp.dtype) for name, value in result.metrics.items()}
    sums = [torch.where(batch.mask, x, zero).sum() if x.ndim else x * tokens for x in columns.values()]
    values = dict(zip([*columns, "tokens"], torch.stack([*sums, tokens]).tolist(), strict=True))  # one device sync
    count, ranks = values.pop("tokens"), info.get("dp_size") or 1
    if total := info.get("batch_num_tokens"):
        shares = {f"actor/{name}": Metric(AggregationType.SUM, value * ranks / total) for name, value in values.items()}
        return {**shares, "actor/tokens": Metric(AggregationType.SUM, count * ranks)}
    return {f"actor/{name}": Metric(AggregationType.MEAN, value / max(count, 1)) for name, value in values.items()}


def policy_loss(name: str) -> PolicyLoss:
    """The objective ``name`` with verl's policy-loss signature; its options come with the config."""

    def compute(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss (scalar, with grad) and metrics. All tensors [B, T]; ``config`` is verl's ActorConfig."""
        from verl.trainer.ppo.core_algos import agg_loss

        assert config is not None, "verl passes its actor config to every policy loss"
        objective = online_objective(name, config.policy_loss.get("objective"))
        batch = token_batch(objective, old_log_prob, log_prob, advantages, response_mask, current_rows())
        result = objective(batch)
        losses = torch.where(batch.mask, result.loss, 0.0).view_as(log_prob)
        if rollout_is_weights is not None:  # verl's correction of the sampler's mismatch, as its vanilla loss has it
            losses = losses * torch.where(response_mask.bool(), full_precision(rollout_is_weights), 0.0)
        info = config.global_batch_info
        loss = agg_loss(loss_mat=losses, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **info)
        return loss, token_metrics(batch, result, info)

    compute.verl_dft_objective = name  # type: ignore[attr-defined]
    return compute


def register_policy_losses(core_algos: ModuleType) -> list[str]:
    """Register every online objective with ``verl.trainer.ppo.core_algos``; returns their names.

    Raises:
        InputError: a name is taken (verl would replace the other loss without a word).
    """
    names = online_names()
    for name in names:
        taken = core_algos.POLICY_LOSS_REGISTRY.get(name)
        if taken is not None:
            raise InputError(
                f"verl policy loss {name!r} is already registered by {taken.__module__}.{taken.__qualname__}; "
                "leave that package out (VERL_USE_EXTERNAL_PLUGINS=verl_dft), or rename the objective if it is yours"
            )
        core_algos.register_policy_loss(name)(policy_loss(name))
    _keep_metrics()
    return names


def _keep_metrics() -> None:
    """Let a policy loss say how its metrics are aggregated: one that is a ``Metric`` already is kept.

    ``ppo_loss`` (workers/utils/losses.py) wraps every metric of a policy loss as a mean over micro-batches, which is
    not a mean over tokens, and rejects a ``Metric`` that is a sum.
    """
    from verl.utils.metric import Metric

    original = Metric.from_dict.__func__

    def from_dict(cls: type, data: dict[str, Any], aggregation: Any) -> dict[str, Any]:
        plain = {key: value for key, value in data.items() if not isinstance(value, Metric)}
        wrapped = original(cls, plain, aggregation)
        return {key: wrapped.get(key, value) for key, value in data.items()}

    Metric.from_dict = classmethod(from_dict)
