"""Log-probability and entropy of given tokens from hidden states and the output layer, without the logits.

The vocabulary is taken in slices. The forward pass keeps a running maximum, sum and (for the entropy) weighted sum of
each row, the online softmax of Milakov and Gimelshein (arXiv:1805.02867); the backward pass, which then knows each
row's normaliser, computes each slice's logits again and is done with it: one slice gives the complete gradient of its
part of the weight. So the largest tensor is a slice, whatever the batch and the vocabulary, and only rows that are
trained on are multiplied with the weight at all.

The first slices' logits are kept for the backward pass as long as they fit into ``KEEP_BYTES``: small batches and
vocabularies then cost no second multiplication.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from verl_dft.training.logprob import grad_of_logits

SLICE_ELEMENTS = {"cpu": 2**21, "default": 2**25}
"""Logits computed at a time, rows x columns, by device: 8 MB in float32 on a CPU, 128 MB elsewhere."""

KEEP_BYTES = 2**28
"""Logits that the forward pass may keep for the backward pass: 256 MB."""

KEEP_ALL = sys.maxsize
"""As ``keep_bytes``: nothing is computed twice."""


class _LinearLogp(torch.autograd.Function):
    """hidden [M, D], weight [V, D], bias [V] or None, labels [M] -> log-probs [M], entropies [M]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        with_entropy: bool,
        width: int,
        keep: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        top = hidden.new_full((len(hidden),), torch.finfo(dtype).min / 2, dtype=dtype)
        total, weighted, label = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
        kept: list[Tensor] = []
        for start in range(0, len(weight), width):
            x = _logits(hidden, weight, bias, start, width)
            index, inside = _position(labels, start, x.shape[1])
            label = torch.where(inside, x.gather(-1, index).squeeze(-1).to(dtype), label)
            higher = torch.maximum(top, x.amax(-1).to(dtype))
            keep -= x.nbytes
            if keep >= 0:
                kept.append(x)
            y = _minus(x, higher, in_place=keep < 0)
            e = y.exp() if with_entropy else y.exp_()
            scale = (top - higher).exp_()
            if with_entropy:
                weighted += (top - higher) * total  # sums of e * (x - top), moved to the new maximum
                # a token that is ruled out (-inf) adds 0
                weighted = weighted * scale + (e * y.clamp_(min=torch.finfo(dtype).min)).sum(-1)
            total = total * scale + e.sum(-1)
            top = higher
        log_total = total.log()
        entropy = log_total - weighted / total if with_entropy else torch.zeros_like(top)
        ctx.save_for_backward(hidden, weight, bias, labels, top + log_total, entropy, *kept)
        ctx.width, ctx.with_entropy = width, with_entropy
        return (label - top) - log_total, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, log_z, entropy, *kept = ctx.saved_tensors
        wanted_hidden, wanted_weight, wanted_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=log_z.dtype) if wanted_hidden else None
        grad_weight = torch.empty_like(weight) if wanted_weight else None
        grad_bias = torch.empty_like(bias) if wanted_bias else None
        for number, start in enumerate(range(0, len(weight), ctx.width)):
            recompute = number >= len(kept)
            x = _logits(hidden, weight, bias, start, ctx.width) if recompute else kept[number]
            log_p = _minus(x, log_z, in_place=recompute)
            d = grad_of_logits(log_p, grad_logp, grad_entropy if ctx.with_entropy else None, entropy)
            index, inside = _position(labels, start, d.shape[1])
            d.scatter_add_(-1, index, torch.where(inside, grad_logp, 0.0)[:, None])
            if grad_bias is not None:
                grad_bias[start : start + ctx.width] = d.sum(0)
            d = d.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden += d @ weight[start : start + ctx.width]
            if grad_weight is not None:
                torch.mm(d.t(), hidden, out=grad_weight[start : start + ctx.width])
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, start: int, width: int) -> Tensor:
    """[M, C]: columns ``start`` to ``start + width`` of what the output layer would return, in its dtype."""
    return F.linear(hidden, weight[start : start + width], None if bias is None else bias[start : start + width])


def _minus(x: Tensor, row: Tensor, *, in_place: bool) -> Tensor:
    """x [M, C] - row [M] in the dtype of ``row``; may overwrite ``x`` where nobody else needs it."""
    return x.sub_(row[:, None]) if in_place and x.dtype == row.dtype else x - row[:, None]


def _position(labels: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Column [M, 1] of each label within a slice (any column where it lies outside), and whether it lies inside [M]."""
    index = labels - start
    return index.clamp(0, width - 1)[:, None], (index >= 0) & (index < width)


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    with_entropy: bool = False,
    slice_elements: int | None = None,
    keep_bytes: int = KEEP_BYTES,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of ``labels`` under the logits ``hidden @ weight.T + bias``, which are never all there.

    The logits are computed in the dtype in which the layer itself would return them (autocast's where it is on) and
    the rest in float32 (float64 for float64 input).

    Args:
        hidden: [M, D], rows to compute; M may be 0.
        weight: [V, D].
        bias: [V] or None.
        labels: [M] int64.
        with_entropy: also return the entropy of each row's distribution.
        slice_elements: logits computed at a time (default: by device).
        keep_bytes: logits kept for the backward pass instead of computed again, at most.

    Returns:
        log-probs [M] and entropies [M] (or None), nats.

    Against float64 on the same hidden states and weight (logits of a standard deviation of 3, vocabularies of 512 and
    152,064): float32 log-probs are off by at most 2e-6 * (1 + |logp|), which is the product's own rounding, and its
    gradients by 1e-5 in norm; bf16 log-probs by at most 2^-7 max|logit|, as the layer's logits are, gradients by 1%.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elements = slice_elements or SLICE_ELEMENTS.get(device, SLICE_ELEMENTS["default"])
    width = min(len(weight), max(1, elements // max(1, len(hidden))))
    keep = keep_bytes if torch.is_grad_enabled() else 0
    with torch.autocast(device_type=device, enabled=False):
        logp, entropy = _LinearLogp.apply(hidden, weight, bias, labels, with_entropy, width, keep)
    return logp, entropy if with_entropy else None
