"""The contract of every registered objective, and that the contract can fail."""

import dataclasses

import pytest
import torch

from verl_dft.objectives import TokenBatch, TokenLoss, get_objective, list_objectives, token_loss
from verl_dft.testing import check_objective, make_batch


@pytest.mark.parametrize("name", list_objectives())
def test_registered_objective(name: str) -> None:
    check_objective(get_objective(name))


@pytest.mark.parametrize(
    ("name", "options"),
    [("dft", {"alpha": 0.0}), ("dft", {"alpha": 2.0}), ("dft", {"floor": 0.1}), ("dft", {"floor": 1.0})],
    ids=str,
)
def test_options(name: str, options: dict[str, float]) -> None:
    check_objective(get_objective(name, **options))


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
        return result


def test_contract_accepts_the_unbroken_one() -> None:
    check_objective(Broken("none"))


@pytest.mark.parametrize(
    "fault", ["product_mask", "unmasked", "batch_mean", "attached_metric", "no_nll", "hidden_need", "impure"]
)
def test_contract_refuses(fault: str) -> None:
    with pytest.raises(AssertionError):
        check_objective(Broken(fault))


def test_sequence_mean_and_back() -> None:
    batch = make_batch(num_seqs=2, length=5)
    x = torch.arange(10.0)
    means = batch.sequence_mean(x)
    for b in range(2):
        assert means[b] == x[(batch.seq == b) & batch.mask].mean()
    assert torch.equal(batch.to_tokens(means)[:5], means[0].expand(5))
    assert torch.equal(make_batch(all_masked=True).sequence_mean(torch.ones(21)), torch.zeros(3))
