"""CHORD's mix: a share mu of a step's loss belongs to the demonstrations, by a schedule (arXiv 2508.11408).

Token losses are multiplied through verl's own column for importance weights (``rollout_is_weights``), which every
policy loss applies. With several updates a step, shares are made of the step's tokens and not of a mini-batch's.
"""

import math
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from verl_dft.training.online.rows import SELF
from verl_dft.training.policy_rows import ORIGIN


def mu_of(step: int, mix: DictConfig) -> float:
    """mu in a step, counted from 1: up in a line to ``peak``, down in a cosine to ``valley``, then constant."""
    done = step - 1
    if done < mix.warmup_steps:
        return mix.peak * done / mix.warmup_steps
    done -= mix.warmup_steps
    left = 0.5 * (1 + math.cos(math.pi * done / mix.decay_steps)) if done < mix.decay_steps else 0.0
    return mix.valley + (mix.peak - mix.valley) * left


def row_weights(own: Tensor, tokens: Tensor, mu: float) -> Tensor:
    """[rows] float32 by which token losses are multiplied.

    The mean over all tokens is then (1 - mu) times that over own rows' tokens plus mu times that over the others'.

    Args:
        own: [rows] bool, the policy's own.
        tokens: [rows] int64, trained tokens.
    """
    weights = torch.zeros(len(tokens))
    for rows, share in ((own, 1 - mu), (~own, mu)):
        if count := int(tokens[rows].sum()):
            weights[rows] = share * int(tokens.sum()) / count
    return weights


def mix_rows(batch: Any, config: DictConfig, step: int) -> tuple[Any, dict[str, float]]:
    """Weigh the stored rows of ``batch`` (verl's ``KVBatchMeta``), and standardise own rewards among own rows only.

    Returns:
        the batch with its new columns, and metrics: ``mix/mu``, and the weight of a token of either kind.
    """
    names = [ORIGIN, "uid", "response_mask", "rm_scores"]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
    uid = np.array([getattr(value, "data", value) for value in list(data["uid"])], dtype=object)
    lengths = [len(row) for row in data["response_mask"].unbind()]
    padded = data.select("response_mask", "rm_scores").to_padded_tensor()
    mask, own = padded["response_mask"], torch.tensor([int(row[0]) for row in data[ORIGIN].unbind()]) == SELF
    advantages = torch.zeros(mask.shape)
    if own.any():
        advantages[own], _ = compute_grpo_outcome_advantage(
            padded["rm_scores"][own].float(),
            mask[own].float(),
            uid[own.numpy()],
            norm_adv_by_std_in_grpo=config.algorithm.norm_adv_by_std_in_grpo,
        )
    mu = mu_of(step, config.mix)
    weights = row_weights(own, mask.sum(-1), mu)
    columns = {"advantages": advantages, "rollout_is_weights": weights[:, None].expand(mask.shape)}
    fields = {name: _ragged(column, lengths) for name, column in columns.items()}
    batch = tq.kv_batch_put(
        keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(lengths))
    )
    found = {"mix/mu": mu}
    for name, rows in (("own", own), ("others", ~own)):
        if rows.any():
            found[f"mix/{name}_weight"] = weights[rows][0].item()
    return batch, found


def _ragged(column: Tensor, lengths: list[int]) -> Tensor:
    rows = [row[:length].clone() for row, length in zip(column, lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
