"""ASFT: hand-computed values, the KL's own gradient, k3 and where it is held."""

import dataclasses
import math

import pytest
import torch
from objective_helpers import batch_of, same

from verl_dft.objectives import get_objective
from verl_dft.objectives.asft import MAX_LOG_RATIO
from verl_dft.testing import run

P = (0.9, 0.5, 0.2)
KL = (5.0, 0.3, 0.7)
REF = (0.1, 0.25, 0.8)
# k3 = ref/p - 1 - log(ref/p): 0.5 - 1 + 0.693147 = 0.193147; 4 - 1 - 1.386294 = 1.613706
K3 = (0.0, 0.193147181, 1.613705639)


def batch():
    return batch_of(P, masked=(0,), ref_kl=KL, ref=REF)


@pytest.mark.parametrize(
    ("options", "loss", "weight"),
    [
        ({}, [0, 0.5 * math.log(2) + 0.05 * 0.3, 0.2 * math.log(5) + 0.05 * 0.7], [0, 0.5, 0.2]),
        ({"kl_weight": 2.0}, [0, 0.5 * math.log(2) + 0.6, 0.2 * math.log(5) + 1.4], [0, 0.5, 0.2]),
        ({"weight": "sft"}, [0, math.log(2) + 0.015, math.log(5) + 0.035], [0, 1, 1]),
        (
            {"kl": "k3", "kl_weight": 0.1},
            [0, 0.5 * math.log(2) + 0.1 * K3[1], 0.2 * math.log(5) + 0.1 * K3[2]],
            [0, 0.5 + 0.1 * (0.5 - 1), 0.2 + 0.1 * (4 - 1)],
        ),
    ],
    ids=str,
)
def test_values_by_hand(options: dict, loss: list[float], weight: list[float]) -> None:
    objective = get_objective("asft", **options)
    value, grad = run(objective, batch())
    assert same(value, loss) and same(grad, [-w for w in weight])
    assert same(objective(batch()).metrics["token_weight"], weight)


def test_the_kl_carries_its_gradient() -> None:
    kl = torch.tensor(KL, dtype=torch.float64, requires_grad=True)
    loss = get_objective("asft", kl_weight=0.25)(dataclasses.replace(batch(), ref_kl=kl)).loss
    assert same(torch.autograd.grad(loss.sum(), kl)[0], [0, 0.25, 0.25])


def test_metrics() -> None:
    full, k3 = (get_objective("asft", kl=kl)(batch()).metrics for kl in ("full", "k3"))
    assert same(full["ref_kl"], [0, 0.3, 0.7]) and same(k3["ref_kl"], K3)
    assert full["changed_frac"].tolist() == [0, 1, 1] == k3["changed_frac"].tolist()
    assert get_objective("asft", weight="sft")(batch()).metrics["changed_frac"].tolist() == [0, 0, 0]
    at_ref = batch_of((0.5, 0.2), ref=(0.5, 0.1))
    assert get_objective("asft", kl="k3", weight="sft")(at_ref).metrics["changed_frac"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("log_p", "k3", "weight"),
    [
        (-19.5, math.exp(19.5) - 20.5, math.exp(19.5)),
        (-20.0, math.exp(20) - 21, math.exp(20)),
        (-20.5, math.exp(20) - 21, 1),  # held: SFT's weight alone
        (-90.0, math.exp(20) - 21, 1),
        (-1e4, math.exp(20) - 21, 1),
    ],
)
def test_k3_is_held_where_its_exponential_would_overflow(log_p: float, k3: float, weight: float) -> None:
    logp = torch.tensor([log_p], dtype=torch.float64, requires_grad=True)
    far = dataclasses.replace(batch_of((0.5,), ref=(1.0,)), logp=logp)
    objective = get_objective("asft", kl="k3", kl_weight=1.0, weight="sft")
    loss, grad = run(objective, far)
    assert loss.item() == pytest.approx(k3 - log_p, rel=1e-9) and grad.item() == pytest.approx(-weight, rel=1e-9)
    assert torch.equal(objective(far).metrics["token_weight"], -grad)
    assert MAX_LOG_RATIO == 20


def test_what_it_needs_depends_on_the_kl() -> None:
    assert get_objective("asft").requires == {"ref_kl"}
    assert get_objective("asft", kl="k3").requires == {"ref_logp"}
    assert get_objective("asft").kl_weight == 0.05
