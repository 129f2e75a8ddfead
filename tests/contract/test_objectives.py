"""The contract of every registered objective, and that the contract can fail."""

import dataclasses
from typing import Any

import pytest
import torch
from variants import VARIANTS

from verl_dft.objectives import TokenBatch, TokenLoss, get_objective, list_objectives, token_loss
from verl_dft.testing import check_gradient, check_objective, make_batch

BUILT_IN = [name for name in list_objectives() if type(get_objective(name)).__module__.startswith("verl_dft.")]


@pytest.mark.parametrize("name", list_objectives())
def test_registered_objective(name: str) -> None:
    check_objective(get_objective(name))


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_options(name: str, options: dict[str, Any]) -> None:
    check_objective(get_objective(name, **options))


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_variants_cover_every_option(name: str) -> None:
    tried: dict[str, set[str]] = {}
    for variant, options in VARIANTS:
        for key, value in options.items() if variant == name else ():
            tried.setdefault(key, set()).add(repr(value))
    options = {f.name: f.default for f in dataclasses.fields(get_objective(name))}
    assert set(tried) == set(options)
    for key, default in options.items():
        if isinstance(default, bool):
            assert tried[key] == {"True", "False"}, key
        else:
            assert tried[key] - {repr(default)}, f"{name}: no value of {key} other than its default is tried"


class Broken:
    """SFT with one fault."""

    requires = frozenset()

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.calls = 0

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        self.calls += 1
        result = token_loss(batch, -batch.logp, torch.ones_like(batch.logp), torch.zeros_like(batch.mask))
        match self.fault:
            case "product_mask":
                return dataclasses.replace(result, loss=-batch.logp * batch.mask)
            case "unmasked":
                return dataclasses.replace(result, loss=-batch.logp)
            case "batch_mean":
                return dataclasses.replace(result, loss=result.loss / batch.mask.sum().clamp(min=1))
            case "attached_metric":
                return TokenLoss(result.loss, {**result.metrics, "nll": -batch.logp})
            case "no_nll":
                return TokenLoss(result.loss, {k: v for k, v in result.metrics.items() if k != "nll"})
            case "hidden_need":
                assert batch.ref_logp is not None
                return result
            case "impure":
                return dataclasses.replace(result, loss=result.loss * self.calls)
            case "no_stop_gradient":
                p = torch.where(batch.mask, batch.logp, 0.0).exp()
                return token_loss(batch, -batch.logp, p, batch.mask)
            case "wrong_weight":
                return TokenLoss(2 * result.loss, result.metrics)
            case "nan_metric":
                return TokenLoss(result.loss, {**result.metrics, "noise": torch.full_like(result.loss, torch.nan)})
            case "wide_metric":
                return TokenLoss(result.loss, {**result.metrics, "noise": torch.ones(2)})
            case "leaky_metric":
                return TokenLoss(result.loss, {**result.metrics, "noise": batch.logp.detach().sum()})
            case "batch_weight":
                weight = torch.where(batch.mask, batch.logp.detach().exp(), 0.0).mean().expand_as(batch.logp)
                return token_loss(batch, -batch.logp, weight, batch.mask)
            case "double":
                return dataclasses.replace(result, loss=result.loss.double())
            case "neighbour":  # the first token of a sequence reads the sequence before it
                weight = torch.where(batch.mask, batch.logp.detach().exp(), 0.0).roll(3)
                return token_loss(batch, -batch.logp, weight, batch.mask)
        return result


def test_contract_accepts_the_unbroken_one() -> None:
    check_objective(Broken("none"))


FAULTS = (
    "product_mask unmasked batch_mean attached_metric no_nll hidden_need impure no_stop_gradient wrong_weight "
    "nan_metric wide_metric leaky_metric batch_weight double neighbour"
).split()


@pytest.mark.parametrize("fault", FAULTS)
def test_contract_refuses(fault: str) -> None:
    with pytest.raises(AssertionError):
        check_objective(Broken(fault))


def test_contract_refuses_a_field_required_for_nothing() -> None:
    broken = Broken("none")
    broken.requires = frozenset({"ref_logp"})
    with pytest.raises(AssertionError, match="'ref_logp' is required, at a cost"):
        check_objective(broken)


def test_metrics_of_token_loss_keep_their_shape() -> None:
    batch = make_batch()
    scalar, flags = torch.tensor(2.0, requires_grad=True), torch.ones_like(batch.mask)
    metrics = token_loss(batch, -batch.logp, torch.ones_like(batch.logp), flags, scalar=scalar, flags=flags).metrics
    assert metrics["scalar"].ndim == 0 and metrics["scalar"] == 2 and not metrics["scalar"].requires_grad
    assert torch.equal(metrics["flags"], batch.mask.float()) and torch.equal(
        metrics["changed_frac"], batch.mask.float()
    )


def test_closed_form() -> None:
    check_gradient(get_objective("dft"), lambda batch: batch.logp.exp())
    with pytest.raises(AssertionError, match="closed form"):
        check_gradient(get_objective("dft"), lambda batch: torch.ones_like(batch.logp))
    check_objective(Broken("wrong_weight"), reports_weight=False)  # a gradient of another form is a way out


def test_the_batch_has_every_case() -> None:
    """What the contract runs on: prompts, unknown behaviour, every origin, exempt and other tokens, both signs."""
    batch = make_batch(num_seqs=4)
    trained = batch.mask
    assert not trained.all() and batch.origin[trained].unique().numel() == 4
    for flags in (batch.behavior_logp.isnan(), batch.exempt, batch.advantage > 0, batch.ref_logp > batch.logp):
        assert flags[trained].any() and not flags[trained].all()


def test_sequence_mean_and_back() -> None:
    batch = make_batch(num_seqs=2, length=5)
    x = torch.arange(10.0)
    means = batch.sequence_mean(x)
    for b in range(2):
        assert means[b] == x[(batch.seq == b) & batch.mask].mean()
        assert batch.sequence_sum(x)[b] == x[(batch.seq == b) & batch.mask].sum()
    assert torch.equal(batch.to_tokens(means)[:5], means[0].expand(5))
    assert torch.equal(make_batch(all_masked=True).sequence_mean(torch.ones(21)), torch.zeros(3))
    one = torch.arange(10) == 3  # other tokens than the trained ones
    assert batch.sequence_mean(x, over=one).tolist() == [3, 0] == batch.sequence_sum(x, over=one).tolist()
    x[~batch.mask] = torch.nan
    assert torch.equal(batch.trained(x), x.nan_to_num(0.0))
