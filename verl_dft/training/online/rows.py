"""Who wrote the rows of a step: told to the loss, and reported with rewards and the sampler's difference by writer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from verl.protocol import DataProto
from verl.utils.debug.metrics import calculate_debug_metrics

from verl_dft.origins import ORIGINS
from verl_dft.training.online.rewrite_loop import STAGES
from verl_dft.training.policy_rows import ORIGIN, SAMPLER_LOGP

SELF = ORIGINS.index("self")


def describe_rows(batch: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """Add the column ``origin`` to the stored rows of ``batch`` (verl's ``KVBatchMeta``).

    Returns:
        origins [rows] in the batch's order, and metrics of the rows that are not padding: ``rows/<origin>_frac``,
        ``rows/<origin>_reward`` (mean), under rewriting ``rewrite/<stage>_frac`` and what sampling took per problem.
    """
    fields = tq.kv_batch_get(
        keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields", "rm_scores"]
    )
    extras = [getattr(value, "data", value) for value in list(fields["extra_fields"])]
    origin = torch.tensor([extra.get(ORIGIN, SELF) for extra in extras])
    rewards = [float(scores.sum()) for scores in fields["rm_scores"].unbind()]
    column = TensorDict({ORIGIN: origin[:, None]}, batch_size=len(batch))
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=column)
    counted = [i for i, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
    return origin, _metrics([extras[i] for i in counted], origin[counted], torch.tensor(rewards)[counted])


def _metrics(extras: Sequence[Mapping[str, Any]], origin: torch.Tensor, rewards: torch.Tensor) -> dict[str, float]:
    found = {}
    for index, name in enumerate(ORIGINS):
        rows = origin == index
        found[f"rows/{name}_frac"] = rows.float().mean().item()
        if rows.any():
            found[f"rows/{name}_reward"] = rewards[rows].mean().item()
    rewritten = [extra for extra in extras if "stage" in extra]
    if rewritten:
        stages = torch.tensor([extra["stage"] for extra in rewritten])
        found |= {f"rewrite/{name}_frac": (stages == i).float().mean().item() for i, name in enumerate(STAGES)}
        for name in ("sampled", "sampled_tokens"):
            found[f"rewrite/{name}"] = sum(extra[name] for extra in rewritten) / len(rewritten)
        found["rewrite/no_verdict"] = sum(extra["no_verdict"] for extra in rewritten)  # samples of the step
    return found


def settle_sampler_logp(batch: Any, origin: torch.Tensor) -> dict[str, float]:
    """Give rows that the policy did not write its own log-probs for the sampler's, of which they have none.

    verl's corrections for the difference between sampler and trainer then leave them alone.

    Returns:
        that difference over the rows that the policy wrote: verl's metrics, of probabilities, and
        ``training/rollout_logp_diff_mean`` and ``_max``, of log-probs (nats).
    """
    names = ["old_log_probs", SAMPLER_LOGP, "response_mask", "responses"]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
    written = origin == SELF
    if not written.all():
        pairs = zip(written.tolist(), data["old_log_probs"].unbind(), data[SAMPLER_LOGP].unbind(), strict=True)
        rows = [(sampled if own else old).float() for own, old, sampled in pairs]
        settled = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        fields = TensorDict({SAMPLER_LOGP: settled}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
    if not written.any():
        return {}
    padded = data.to_padded_tensor()
    own = TensorDict({name: padded[name][written] for name in names}, batch_size=int(written.sum()))
    return calculate_debug_metrics(DataProto(batch=own)) | _difference(own)


def _difference(own: TensorDict) -> dict[str, float]:
    difference = (own["old_log_probs"] - own[SAMPLER_LOGP]).abs()[own["response_mask"].bool()]
    if not len(difference):  # padding alone
        return {}
    prefix = "training/rollout_logp_diff"
    return {f"{prefix}_mean": difference.mean().item(), f"{prefix}_max": difference.max().item()}
