"""What an objective reads of a row besides verl's arguments of a policy loss: its writer, and the sampler's log-probs.

verl hands a policy loss five tensors. :func:`online_loss` is verl's own ``ppo_loss`` for a run of ours; while it runs,
:func:`current_rows` has the two columns of its micro-batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from verl_dft.origins import ORIGINS

ORIGIN = "origin"
"""Key of an agent loop's ``extra_fields``, and column of the batch: [B, 1] int64, an index into ``ORIGINS``."""
SAMPLER_LOGP = "rollout_log_probs"
"""verl's column of what the sampler reported; absent with ``rollout.calculate_log_probs=false``."""


class Rows(NamedTuple):
    """Of the micro-batch in the loss: B rows of T response tokens, padded on the right."""

    origin: Tensor
    """[B] int64."""
    behavior_logp: Tensor
    """[B, T] float32, nats; NaN where the text was not sampled under the row's prompt, or the sampler told none."""


_ROWS: ContextVar[Rows | None] = ContextVar("verl_dft_rows", default=None)


def current_rows() -> Rows | None:
    """The rows of the loss that is being computed; None in verl's own command, where all rows are the policy's."""
    return _ROWS.get()


def online_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
    """verl's ``ppo_loss`` (same arguments and result) with :func:`current_rows` set."""
    from verl.workers.utils.losses import ppo_loss

    with _set(_rows(data)):
        return ppo_loss(config=config, model_output=model_output, data=data, dp_group=dp_group)


@contextmanager
def _set(rows: Rows | None) -> Iterator[None]:
    token = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(token)


def _rows(data: Any) -> Rows | None:
    if ORIGIN not in data.keys():
        return None
    names = [name for name in ("response_mask", SAMPLER_LOGP) if name in data.keys()]
    fields = data.select(ORIGIN, *names).to_padded_tensor()
    origin = fields[ORIGIN].reshape(len(fields[ORIGIN]), -1)[:, 0]
    if SAMPLER_LOGP not in names:
        return Rows(origin, torch.full(fields["response_mask"].shape, float("nan"), device=origin.device))
    sampled = (origin == ORIGINS.index("self"))[:, None]
    return Rows(origin, fields[SAMPLER_LOGP].float().masked_fill(~sampled, float("nan")))
