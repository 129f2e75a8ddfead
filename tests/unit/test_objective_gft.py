"""GFT: rectification by hand at and around tau, both levels, the ablations."""

import math

import pytest
import torch
from objective_helpers import batch_of, same

from verl_dft.objectives import get_objective
from verl_dft.testing import run

# Two responses with advantages 2 and -1; products of the trained tokens 0.5 * 0.8 = 0.4 and 0.2 * 0.9 = 0.18.
P = (0.9, 0.5, 0.8, 0.2, 0.9)
A = (2.0, 2.0, 2.0, -1.0, -1.0)


def batch():
    return batch_of(P, lengths=(3, 2), masked=(0,), advantage=A)


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({}, [0, 1.0, 2, -0.2, -1]),
        ({"tau": 0.3}, [0, 2, 2, -0.2, -1]),
        ({"tau": 0.85}, [0, 1.0, 1.6, -0.2, -1]),
        ({"tau": 0.0}, [0, 2, 2, -1, -1]),
        ({"tau": 1.5}, [0, 1.0, 1.6, -0.2, -0.9]),
        ({"no_dcr": True}, [0, 2, 2, -1, -1]),
        ({"no_gal": True}, [0, 0.5, 1, 0.2, 1]),
        ({"no_gal": True, "no_dcr": True}, [0, 1, 1, 1, 1]),
        ({"level": "sequence"}, [0, 0.8, 0.8, -0.18, -0.18]),
        ({"level": "sequence", "tau": 0.3}, [0, 2, 2, -0.18, -0.18]),
        (
            {"level": "sequence", "length_normalized": True, "tau": 0.5},  # geometric means 0.632 and 0.424
            [0, 2, 2, -math.sqrt(0.18), -math.sqrt(0.18)],
        ),
    ],
    ids=str,
)
def test_weight_by_hand(options: dict, weight: list[float]) -> None:
    loss, grad = run(get_objective("gft", **options), batch())
    assert same(grad, [-w for w in weight])
    assert same(loss, [-w * math.log(p) for w, p in zip(weight, P, strict=True)])


def test_at_tau_the_paper_keeps_the_weight_and_the_code_does_not() -> None:
    at = batch_of((0.5, 0.25), advantage=[1.0, 1.0])
    tau = float(at.logp.detach().exp()[0])
    for strict, weight in ((False, [1, 0.25]), (True, [tau, 0.25])):
        metrics = get_objective("gft", tau=tau, strict=strict)(at).metrics
        assert same(metrics["token_weight"], weight)
        assert metrics["rectified_frac"].tolist() == [strict, 1]


def test_metrics() -> None:
    metrics = get_objective("gft")(batch()).metrics
    assert metrics["rectified_frac"].tolist() == [0, 1, 0, 1, 0]
    assert metrics["advantage"].tolist() == [0, *A[1:]]
    assert metrics["zero_advantage_frac"].sum() == 0
    none = batch_of((0.9, 0.5), advantage=[0.0, 1.0])
    metrics = get_objective("gft", no_dcr=True)(none).metrics
    assert metrics["zero_advantage_frac"].tolist() == [1, 0] and metrics["rectified_frac"].sum() == 0
    assert metrics["changed_frac"].tolist() == [1, 0]


def test_a_group_that_agrees_teaches_nothing() -> None:
    _, grad = run(get_objective("gft"), batch_of((0.9, 0.5), advantage=[0.0, 0.0]))
    assert torch.equal(grad, torch.zeros_like(grad))


def test_what_it_needs() -> None:
    assert get_objective("gft").requires == {"advantage"} and get_objective("gft").tau == 0.7
    assert get_objective("gft", no_gal=True).requires == frozenset()
