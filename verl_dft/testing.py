"""Contract tests for any objective: ``check_objective(MyObjective())`` raises AssertionError where one is broken.

from verl_dft.testing import check_objective

def test_my_objective():
    check_objective(MyObjective(tau=0.7))
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from verl_dft.objectives.batch import OPTIONAL_FIELDS, Objective, TokenBatch
from verl_dft.origins import ORIGINS

REPORTED = ("nll", "token_weight", "changed_frac")
"""Metrics that every objective reports."""


def make_batch(
    num_seqs: int = 3, length: int = 7, seed: int = 0, dtype: torch.dtype = torch.float32, all_masked: bool = False
) -> TokenBatch:
    """A batch of random sequences with prompts of different lengths and every optional field.

    Args:
        num_seqs: B.
        length: tokens of each sequence (N = B * length).
        seed: of the random values.
        dtype: of the float fields.
        all_masked: no token is trained on.
    """
    generator = torch.Generator().manual_seed(seed)
    n = num_seqs * length

    def noise(scale: float = 1.0) -> Tensor:
        return scale * torch.rand(n, generator=generator, dtype=torch.float64)

    seq = torch.arange(num_seqs).repeat_interleave(length)
    position = torch.arange(n) % length
    mask = (position >= 1 + seq % 3) & (position < length - 1)
    logp = -noise(3.0) - 0.01
    behavior = (logp + noise(0.4) - 0.2).clamp(max=0)
    behavior[1::5] = math.nan  # unknown for some tokens, as for expert text
    advantage = (torch.rand(num_seqs, generator=generator, dtype=torch.float64) * 2 - 1)[seq]
    fields = {
        "advantage": advantage,
        "ref_logp": (logp + noise(0.4) - 0.2).clamp(max=0),
        "old_logp": (logp + noise(0.4) - 0.2).clamp(max=0),
        "behavior_logp": behavior,
        "entropy": noise(2.0),
        "ref_kl": noise(0.5),
        "ema_logp": (logp + noise(0.4) - 0.2).clamp(max=0),
    }
    return TokenBatch(
        logp=logp.to(dtype).requires_grad_(),
        mask=torch.zeros_like(mask) if all_masked else mask,
        seq=seq,
        num_seqs=num_seqs,
        origin=seq % len(ORIGINS),
        exempt=position % 4 == 2,
        **{name: value.to(dtype) for name, value in fields.items()},
    )


def run(objective: Objective, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Token losses [N] (detached) and the gradient of their sum with respect to ``logp`` [N]."""
    logp = batch.logp.detach().clone().requires_grad_()
    loss = objective(dataclasses.replace(batch, logp=logp)).loss
    (grad,) = torch.autograd.grad(loss.sum(), logp, allow_unused=True)
    return loss.detach(), torch.zeros_like(logp) if grad is None else grad


def check_objective(objective: Objective) -> None:
    """Run every contract test on ``objective``."""
    checks: tuple[Callable[[Objective], None], ...] = (
        check_declaration,
        check_output,
        check_masked_tokens_cannot_leak,
        check_empty_batch,
        check_split_invariance,
        check_precision,
        check_pure,
    )
    for check in checks:
        check(objective)


def check_declaration(objective: Objective) -> None:
    """``requires`` names fields of a TokenBatch, and what is not named is not needed."""
    assert isinstance(objective.requires, frozenset) and objective.requires <= set(OPTIONAL_FIELDS)
    others = {name: None for name in OPTIONAL_FIELDS if name not in objective.requires}
    objective(dataclasses.replace(make_batch(), **others))


def check_output(objective: Objective) -> None:
    """Loss of the right shape, finite, exactly 0 outside the mask; the reported metrics, detached."""
    batch = make_batch()
    result = objective(batch)
    assert result.loss.shape == batch.logp.shape and result.loss.dtype == batch.logp.dtype
    assert torch.isfinite(result.loss).all()
    assert (result.loss[~batch.mask] == 0).all(), "loss outside the mask must be exactly 0"
    for name in REPORTED:
        assert name in result.metrics, f"metric {name!r} is missing"
    for name, value in result.metrics.items():
        assert not value.requires_grad, f"metric {name!r} must be detached"
        assert value.ndim == 0 or value.shape == batch.logp.shape, f"metric {name!r} has shape {tuple(value.shape)}"
    expected = -batch.logp.detach()[batch.mask]
    assert torch.allclose(result.metrics["nll"][batch.mask], expected), "metric 'nll' must be -logp"


def check_masked_tokens_cannot_leak(objective: Objective) -> None:
    """Values at masked tokens, however wild, change neither the losses nor the gradient."""
    batch = make_batch()
    loss, grad = run(objective, batch)
    for wild in (-math.inf, math.nan, -1e30):
        fields = {}
        for name in ("logp", *OPTIONAL_FIELDS):
            value = getattr(batch, name).detach().clone()
            if value.is_floating_point():
                value[~batch.mask] = wild
            fields[name] = value
        wild_loss, wild_grad = run(objective, dataclasses.replace(batch, **fields))
        assert torch.equal(loss, wild_loss), f"losses depend on masked tokens (filled with {wild})"
        assert torch.equal(grad, wild_grad), f"gradient depends on masked tokens (filled with {wild})"


def check_empty_batch(objective: Objective) -> None:
    """A micro-batch without a trained token gives zero loss and a backward pass that works."""
    loss, grad = run(objective, make_batch(all_masked=True))
    assert (loss == 0).all() and (grad == 0).all()


def check_split_invariance(objective: Objective) -> None:
    """Sequences get the same losses and gradients in one micro-batch as in several."""
    batch = make_batch(num_seqs=4)
    whole_loss, whole_grad = run(objective, batch)
    for first in (0, 2):
        keep = (batch.seq >= first) & (batch.seq < first + 2)
        values = {name: getattr(batch, name)[keep] for name in ("logp", "mask", *OPTIONAL_FIELDS)}
        part = TokenBatch(seq=batch.seq[keep] - first, num_seqs=2, **values)
        loss, grad = run(objective, part)
        assert torch.allclose(loss, whole_loss[keep], atol=1e-6), "losses depend on the micro-batch split"
        assert torch.allclose(grad, whole_grad[keep], atol=1e-6), "gradients depend on the micro-batch split"


def check_precision(objective: Objective) -> None:
    """float32 agrees with float64 to 1e-5."""
    loss32, grad32 = run(objective, make_batch())
    loss64, grad64 = run(objective, make_batch(dtype=torch.float64))
    assert torch.allclose(loss32.double(), loss64, atol=1e-5) and torch.allclose(grad32.double(), grad64, atol=1e-5)


def check_pure(objective: Objective) -> None:
    """Calling it changes none of its inputs, and calling it again gives the same."""
    batch = make_batch()
    before = {name: getattr(batch, name).detach().clone() for name in ("logp", "mask", "seq", *OPTIONAL_FIELDS)}
    first, _ = run(objective, batch)
    second, _ = run(objective, batch)
    assert torch.equal(first, second)
    for name, value in before.items():
        assert torch.equal(getattr(batch, name).detach().nan_to_num(7.0), value.nan_to_num(7.0)), f"{name} was changed"
