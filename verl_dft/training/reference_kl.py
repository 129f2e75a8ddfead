"""KL(reference || policy) of each trained token's next-token distribution, from both models' logits.

Float32 and chunked like ``logprob``: nothing of size [N, V] in float32 is kept; the backward pass recomputes.
"""

from typing import Any

import torch
from torch import Tensor

from verl_dft.training.logprob import CHUNK_TOKENS, chunk_rows


class _TokenKL(torch.autograd.Function):
    """logits [N, V], reference [N, V], rows [M] -> KL [N], 0 outside ``rows``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor, rows: Tensor, chunk: int) -> Tensor:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        kl = torch.zeros(logits.shape[0], dtype=dtype, device=logits.device)
        for part in rows.split(chunk):
            log_p = logits[part].to(dtype).log_softmax(-1)
            log_q = reference[part].to(dtype).log_softmax(-1)
            # a token that the reference rules out (-inf) adds 0
            kl[part] = _products(log_q.exp(), log_q - log_p)
        ctx.save_for_backward(logits, reference, rows)
        ctx.chunk, ctx.dtype = chunk, dtype
        return kl

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Tensor, None, None, None]:
        logits, reference, rows = ctx.saved_tensors
        grad = torch.zeros_like(logits)
        for part in rows.split(ctx.chunk):
            # d KL(q || p) / d x = p - q
            p = logits[part].to(ctx.dtype).softmax(-1)
            p -= reference[part].to(ctx.dtype).softmax(-1)
            grad[part] = (p * grad_kl[part, None]).to(grad.dtype)
        return grad, None, None, None


def _products(q: Tensor, log_ratio: Tensor) -> Tensor:
    """sum of q * log_ratio over the last dimension, where q = 0 adds 0."""
    return torch.where(q > 0, q * log_ratio, 0.0).sum(-1)


def token_kl(logits: Tensor, reference: Tensor, mask: Tensor, *, chunk: int = CHUNK_TOKENS) -> Tensor:
    """KL(reference || policy) over the whole vocabulary where ``mask``; the gradient flows into ``logits`` only.

    Args:
        logits: [N, V] of the policy, any float dtype.
        reference: [N, V] of the reference at the same positions.
        mask: [N] bool, rows to compute.
        chunk: rows upcast at a time.

    Returns:
        [N] float32 (float64 for float64 logits), nats, 0 outside ``mask``.
    """
    rows = mask.nonzero().squeeze(-1)
    device = logits.device.type
    with torch.autocast(device_type=device, enabled=False):
        return _TokenKL.apply(logits, reference.detach(), rows, chunk_rows(logits.shape[-1], chunk, device))
