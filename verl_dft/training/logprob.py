"""Log-probability and entropy of given tokens from logits: float32, chunked, only where a token is trained on.

verl's own path computes log-softmax in the logits' dtype on a CPU (bf16 there: probabilities off by several percent)
and loops over tokens in Python. Here only the rows that are trained on are upcast, one chunk at a time, and the
backward pass recomputes the softmax chunk by chunk, so that nothing of size [N, V] in float32 is ever kept.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 1024
"""Rows of logits upcast at a time: 1024 rows of a 150k vocabulary are 0.6 GB in float32."""


class _TokenLogp(torch.autograd.Function):
    """logits [N, V], labels [N], rows [M] -> log-probs [N] and entropies [N], 0 outside ``rows``."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, rows: Tensor, chunk: int, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logp = torch.zeros(logits.shape[0], dtype=dtype, device=logits.device)
        entropy = torch.zeros_like(logp)
        log_z = torch.zeros_like(logp)
        for part in rows.split(chunk):
            x = logits[part].to(dtype)
            log_z[part] = x.logsumexp(-1)
            logp[part] = x.gather(-1, labels[part, None]).squeeze(-1) - log_z[part]
            if with_entropy:
                p = torch.exp(x - log_z[part, None])
                entropy[part] = log_z[part] - (p * x).sum(-1)
        ctx.save_for_backward(logits, labels, rows, log_z, entropy)
        ctx.chunk, ctx.with_entropy = chunk, with_entropy
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, labels, rows, log_z, entropy = ctx.saved_tensors
        grad = torch.zeros_like(logits)
        for part in rows.split(ctx.chunk):
            log_p = logits[part].to(log_z.dtype) - log_z[part, None]
            p = log_p.exp()
            g = grad_logp[part, None]
            # d logp / d x = onehot - p;  d H / d x = -p * (log p + H)
            d = -p * g
            d.scatter_add_(-1, labels[part, None], g)
            if ctx.with_entropy:
                d -= grad_entropy[part, None] * p * (log_p + entropy[part, None])
            grad[part] = d.to(grad.dtype)
        return grad, None, None, None, None


def token_logp(
    logits: Tensor, labels: Tensor, mask: Tensor, *, with_entropy: bool = False, chunk: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of ``labels`` under ``logits`` where ``mask``.

    Args:
        logits: [N, V], any float dtype.
        labels: [N] int64, the token that each row of logits predicts.
        mask: [N] bool, rows to compute.
        with_entropy: also return the entropy of each row's distribution.
        chunk: rows upcast at a time.

    Returns:
        log-probs [N] and entropies [N] (or None), float32 (float64 for float64 logits), nats, 0 outside ``mask``.
    """
    rows = mask.nonzero().squeeze(-1)
    with torch.autocast(device_type=logits.device.type, enabled=False):
        logp, entropy = _TokenLogp.apply(logits, labels, rows, chunk, with_entropy)
    return logp, entropy if with_entropy else None
