"""Log-probability and entropy of given tokens from logits: float32, chunked, only where a token is trained on.

verl's own path computes log-softmax in the logits' dtype on a CPU (bf16 there: probabilities off by several percent)
and loops over tokens in Python. Here only the rows that are trained on are upcast, one chunk at a time, and the
backward pass recomputes the softmax chunk by chunk, so that nothing of size [N, V] in float32 is ever kept.
"""

from typing import Any

import torch
from torch import Tensor

HEADS = ("auto", "logits", "chunked")
"""How log-probs are computed: ``logits`` from the full logits (here), ``chunked`` without them (``linear_head``) or an
error, ``auto`` without them wherever the model and the objective allow it, and never slower for it."""

CHUNK_TOKENS = 1024
"""Rows of logits upcast at a time, at most."""

CHUNK_ELEMENTS = {"cpu": 2**22, "default": 2**26}
"""Values upcast at a time, at most, by device: 16 MB in float32 on a CPU, where larger buffers cost page faults in
every pass; 256 MB elsewhere, where small ones would cost launches."""


def chunk_rows(vocab: int, limit: int = CHUNK_TOKENS, device: str = "cpu") -> int:
    """Rows of ``vocab`` logits to upcast at a time: at most ``limit``, fewer where the vocabulary is large."""
    return max(1, min(limit, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["default"]) // vocab))


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
            x = logits[part].to(dtype)  # indexing copied: what follows may work in place
            top = x.amax(-1, keepdim=True)
            x -= top  # log-probs and entropy are computed from what is left: no error from a common offset
            label = x.gather(-1, labels[part, None]).squeeze(-1)
            if with_entropy:
                e = x.exp()
                total = e.sum(-1)
                # a token that is ruled out (-inf) adds 0
                entropy[part] = total.log() - (e * x.clamp_(min=torch.finfo(dtype).min)).sum(-1) / total
            else:
                total = x.exp_().sum(-1)
            log_total = total.log()
            logp[part] = label - log_total
            log_z[part] = top.squeeze(-1) + log_total
        ctx.save_for_backward(logits, labels, rows, log_z, entropy)
        ctx.chunk, ctx.with_entropy = chunk, with_entropy
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, labels, rows, log_z, entropy = ctx.saved_tensors
        grad = torch.zeros_like(logits)
        for part in rows.split(ctx.chunk):
            x = logits[part].to(log_z.dtype)
            x -= log_z[part, None]
            d = grad_of_logits(x, grad_logp[part], grad_entropy[part] if ctx.with_entropy else None, entropy[part])
            d.scatter_add_(-1, labels[part, None], grad_logp[part, None])
            grad[part] = d.to(grad.dtype)
        return grad, None, None, None, None


def grad_of_logits(log_p: Tensor, grad_logp: Tensor, grad_entropy: Tensor | None, entropy: Tensor) -> Tensor:
    """Gradient in the logits [M, C] of columns with log-probs ``log_p`` (overwritten), but for the label's own term.

    d logp / d x = onehot - p, of which the caller adds the onehot;  d H / d x = -p * (log p + H).
    """
    if grad_entropy is None:
        return log_p.exp_().mul_(-grad_logp[:, None])
    p = log_p.exp()
    slope = log_p.clamp_(min=torch.finfo(log_p.dtype).min).add_(entropy[:, None]).mul_(grad_entropy[:, None])
    return slope.add_(grad_logp[:, None]).mul_(p).neg_()


def token_logp(
    logits: Tensor, labels: Tensor, mask: Tensor, *, with_entropy: bool = False, chunk: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of ``labels`` under ``logits`` where ``mask``.

    Args:
        logits: [N, V], any float dtype.
        labels: [N] int64, the token that each row of logits predicts.
        mask: [N] bool, rows to compute.
        with_entropy: also return the entropy of each row's distribution.
        chunk: rows upcast at a time, at most (see :func:`chunk_rows`).

    Returns:
        log-probs [N] and entropies [N] (or None), float32 (float64 for float64 logits), nats, 0 outside ``mask``.

    Against float64 on the same logits (of scale 1 to 30, vocabularies of 512 and 152,064): log-probs are off by at most
    5e-7 * (1 + |logp|), entropies by at most 2e-6, whatever offset a row's logits have in common. The rounding of the
    logits themselves is not undone: it moves a log-prob by at most 2 u max|logit|, with u = 2^-24 for float32 logits
    and u = 2^-8 for bf16 ones, which at a logit of 20 is 0.16, or 17% of a probability.
    """
    rows = mask.nonzero().squeeze(-1)
    device = logits.device.type
    with torch.autocast(device_type=device, enabled=False):
        logp, entropy = _TokenLogp.apply(
            logits, labels, rows, chunk_rows(logits.shape[-1], chunk, device), with_entropy
        )
    return logp, entropy if with_entropy else None
