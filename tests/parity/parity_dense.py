"""Formulas re-derived on dense tensors: logits [B, T, V] in float64, padding and all, without our objectives' code.

``CASE`` is one padded batch with the quantities that the methods read; ``ours`` runs an objective on the same data,
flat and unpadded, and brings its losses and its gradient with respect to the logits back to the dense shape.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from verl_dft.objectives import TokenBatch, get_objective

B, T, V = 4, 9, 20
LENGTHS = (9, 7, 8, 6)
PROMPTS = (3, 2, 1, 4)
ORIGIN = (0, 1, 2, 3)
"""Of each sequence: expert, teacher, self, guided."""


@dataclass(frozen=True)
class Case:
    """A padded batch. ``mask`` [B, T] bool, ``label`` [B, T] int64, the rest float64."""

    logits: Tensor
    ref_logits: Tensor
    old_logits: Tensor
    label: Tensor
    mask: Tensor
    real: Tensor
    advantage: Tensor
    behavior: Tensor

    def logp(self, logits: Tensor) -> Tensor:
        """[B, T] log-probability of the labels."""
        return log_softmax(logits, -1).gather(-1, self.label[..., None]).squeeze(-1)


def make_case(seed: int = 0, spread: float = 2.0) -> Case:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logits = spread * normal(B, T, V)
    label = torch.randint(V, (B, T), generator=g)
    # some tokens the model is nearly sure of, as in text
    logits.scatter_add_(-1, label[..., None], 6 * torch.rand(B, T, 1, generator=g, dtype=torch.float64))
    position = torch.arange(T)
    real = position < torch.tensor(LENGTHS)[:, None]
    mask = real & (position >= torch.tensor(PROMPTS)[:, None])
    behavior = log_softmax(logits + 0.3 * normal(B, T, V), -1).gather(-1, label[..., None]).squeeze(-1)
    behavior[:, 5] = torch.nan
    return Case(
        logits=logits,
        ref_logits=logits + 0.5 * normal(B, T, V),
        old_logits=logits + 0.3 * normal(B, T, V),
        label=label,
        mask=mask,
        real=real,
        advantage=normal(B),
        behavior=behavior,
    )


def ours(case: Case, name: str, options: dict[str, Any], **fields: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [B, T] and the gradient of their sum [B, T, V] of the objective ``name``."""
    logits = case.logits.clone().requires_grad_()
    log_p = log_softmax(logits, -1)
    ref = log_softmax(case.ref_logits, -1)
    dense = {
        "logp": case.logp(logits),
        "mask": case.mask,
        "seq": torch.arange(B)[:, None].expand(B, T),
        "advantage": case.advantage[:, None].expand(B, T),
        "ref_logp": case.logp(case.ref_logits),
        "old_logp": case.logp(case.old_logits),
        "ema_logp": case.logp(case.old_logits),
        "behavior_logp": case.behavior,
        "origin": torch.tensor(ORIGIN)[:, None].expand(B, T),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "ref_kl": torch.nn.functional.kl_div(log_p, ref, reduction="none", log_target=True).sum(-1),
        **fields,
    }
    objective = get_objective(name, **options)
    batch = TokenBatch(num_seqs=B, **{key: value[case.real] for key, value in dense.items()})
    flat = objective(batch).loss
    loss = torch.zeros(B, T, dtype=flat.dtype).masked_scatter(case.real, flat)
    (grad,) = torch.autograd.grad(flat.sum(), logits)
    return loss.detach(), grad


def assert_same(
    case: Case, name: str, options: dict[str, Any], formula: Callable[[Case, Tensor], Tensor], **fields: Tensor
) -> None:
    """The objective equals ``formula(case, logits) -> [B, T]`` in value and gradient, to 1e-6 relative (1e-14 abs)."""
    logits = case.logits.clone().requires_grad_()
    expected = torch.where(case.mask, formula(case, logits), 0.0)
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    loss, grad = ours(case, name, options, **fields)
    assert expected_grad.abs().max() > 1e-4, "a formula without a gradient shows nothing"
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-14)
