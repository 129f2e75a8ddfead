"""Contract tests for any objective: ``check_objective(MyObjective())`` raises AssertionError where one is broken.

from verl_dft.testing import check_objective

def test_my_objective():
    check_objective(MyObjective(tau=0.7))
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from verl_dft.objectives.batch import OPTIONAL_FIELDS, Objective, TokenBatch
from verl_dft.origins import ORIGINS

REPORTED = ("nll", "token_weight", "changed_frac")
"""Metrics that every objective reports."""

WILD = (-math.inf, math.nan, -1e30)
"""What masked tokens may hold in any float field."""


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


def fill_masked(batch: TokenBatch, value: float, names: Collection[str] = ("logp", *OPTIONAL_FIELDS)) -> TokenBatch:
    """The batch with ``value`` in the float fields ``names`` of every masked token (origin 0 and exempt inverted)."""
    fields = {}
    for name in names:
        field = getattr(batch, name).detach().clone()
        if field.is_floating_point():
            field[~batch.mask] = value
        else:
            field[~batch.mask] = ~field[~batch.mask] if field.dtype == torch.bool else 0
        fields[name] = field
    return dataclasses.replace(batch, **fields)


def check_objective(objective: Objective, reports_weight: bool = True) -> None:
    """Run every contract test on ``objective``.

    Args:
        objective: to be tested.
        reports_weight: its metric ``token_weight`` is what multiplies the gradient of the nll (which proves that a
            weight meant to be constant is one). False for an objective whose gradient has another form.
    """
    checks: tuple[Callable[[Objective], None], ...] = (
        check_output,
        check_declaration,
        check_masked_tokens_cannot_leak,
        check_empty_batch,
        check_untrained_sequence,
        check_split_invariance,
        check_precision,
        check_pure,
    )
    for check in checks:
        check(objective)
    if reports_weight:
        check_gradient(objective)


def check_declaration(objective: Objective) -> None:
    """``requires`` names fields of a TokenBatch, what is not named is not needed, and what is named is used."""
    assert isinstance(objective.requires, frozenset) and objective.requires <= set(OPTIONAL_FIELDS)
    absent = {name: None for name in OPTIONAL_FIELDS if name not in objective.requires}
    batch = dataclasses.replace(make_batch(num_seqs=4), **absent)
    before = _results(objective, batch)
    for name in objective.requires:
        value = getattr(batch, name)
        if value.dtype == torch.bool:
            others = [~value]
        else:
            others = [(value + 1) % len(ORIGINS)] if name == "origin" else [value - 0.3, value + 0.3]
        same = True
        for other in others:
            after = _results(objective, dataclasses.replace(batch, **{name: other}))
            same &= all(torch.equal(before[key].nan_to_num(7.0), after[key].nan_to_num(7.0)) for key in before)
        assert not same, f"{name!r} is required, at a cost, but changes neither the loss nor a metric"


def check_output(objective: Objective) -> None:
    """Loss of the right shape and dtype, finite, exactly 0 outside the mask; the reported metrics, detached."""
    for dtype in (torch.float32, torch.float64):
        batch = make_batch(dtype=dtype)
        result = objective(batch)
        assert result.loss.shape == batch.logp.shape and result.loss.dtype == dtype
        assert torch.isfinite(result.loss).all()
        assert (result.loss[~batch.mask] == 0).all(), "loss outside the mask must be exactly 0"
        for name in REPORTED:
            assert name in result.metrics, f"metric {name!r} is missing"
        for name, value in result.metrics.items():
            assert not value.requires_grad, f"metric {name!r} must be detached"
            assert value.ndim == 0 or value.shape == batch.logp.shape, f"metric {name!r} has shape {tuple(value.shape)}"
            shown = value[batch.mask] if value.ndim else value
            assert torch.isfinite(shown).all(), f"metric {name!r} is not finite"
        expected = -batch.logp.detach()[batch.mask]
        assert torch.allclose(result.metrics["nll"][batch.mask], expected), "metric 'nll' must be -logp"


def check_gradient(objective: Objective, expected: Callable[[TokenBatch], Tensor] | None = None) -> None:
    """The gradient is minus the weight: the metric ``token_weight``, and a closed form where one is given.

    A weight whose gradient should have been stopped, but was not, adds a term that the metric lacks.

    Args:
        objective: to be tested.
        expected: the batch -> [N] what multiplies the gradient of the nll, in closed form.
    """
    for seed in range(3):
        batch = make_batch(num_seqs=4, seed=seed, dtype=torch.float64)
        leaves = {name: getattr(batch, name).detach().clone().requires_grad_() for name in ("logp", "ref_kl")}
        logp = leaves["logp"]
        # the trainer's entropy carries gradient too, which a weight made of it must not pass on
        entropy = batch.entropy + 0.5 * (logp - logp.detach())
        result = objective(dataclasses.replace(batch, **leaves, entropy=entropy))
        (grad,) = torch.autograd.grad(result.loss.sum(), logp, allow_unused=True)
        grad = torch.zeros_like(logp) if grad is None else grad
        assert (grad[~batch.mask] == 0).all(), "gradient outside the mask must be exactly 0"
        weight = result.metrics["token_weight"]
        assert torch.allclose(grad[batch.mask], -weight[batch.mask], rtol=1e-9, atol=1e-12), (
            "the gradient with respect to logp is not minus the metric 'token_weight': is a stop-gradient missing?"
        )
        if expected is not None:
            closed = expected(batch)[batch.mask].to(grad.dtype)
            assert torch.allclose(-grad[batch.mask], closed, rtol=1e-9, atol=1e-12), "not the closed form"


def check_masked_tokens_cannot_leak(objective: Objective) -> None:
    """Values at masked tokens, however wild, change neither losses, gradient, nor metrics of trained tokens."""
    batch = make_batch(num_seqs=4)
    loss, grad = run(objective, batch)
    metrics = _results(objective, batch)
    together, apart = ("logp", *OPTIONAL_FIELDS), [(name,) for name in ("logp", *sorted(objective.requires))]
    for value, names in itertools.product(WILD, (together, *apart)):
        wild = fill_masked(batch, value, names)
        wild_loss, wild_grad = run(objective, wild)
        assert torch.equal(loss, wild_loss), f"losses depend on masked tokens (filled with {value})"
        assert torch.equal(grad, wild_grad), f"gradient depends on masked tokens (filled with {value})"
        for name, metric in _results(objective, wild).items():
            assert torch.equal(metrics[name], metric), f"metric {name!r} depends on masked tokens"


def check_empty_batch(objective: Objective) -> None:
    """A micro-batch without a trained token gives zero loss and a backward pass that works."""
    batch = make_batch(all_masked=True)
    for case in (batch, *(fill_masked(batch, value) for value in WILD)):
        loss, grad = run(objective, case)
        assert (loss == 0).all() and (grad == 0).all()


def check_untrained_sequence(objective: Objective) -> None:
    """A sequence without a trained token has no loss and leaves the others as they are."""
    batch = make_batch(num_seqs=4)
    loss, grad = run(objective, batch)
    keep = batch.seq != 1
    part_loss, part_grad = run(objective, fill_masked(dataclasses.replace(batch, mask=batch.mask & keep), math.nan))
    assert torch.equal(part_loss[keep], loss[keep]) and torch.equal(part_grad[keep], grad[keep])
    assert (part_loss[~keep] == 0).all() and (part_grad[~keep] == 0).all()


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


def _results(objective: Objective, batch: TokenBatch) -> dict[str, Tensor]:
    """Losses and metrics, those of masked tokens left out."""
    result = objective(batch)
    values = {"loss": result.loss.detach(), **result.metrics}
    return {name: value[batch.mask] if value.ndim else value for name, value in values.items()}


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
