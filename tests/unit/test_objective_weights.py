"""CHORD's phi, focal and EAFT: one-line weights, by hand."""

import dataclasses
import math

import pytest
import torch
from objective_helpers import batch_of, same

from verl_dft.objectives import get_objective
from verl_dft.testing import run

P = (0.9, 0.5, 0.2, 0.9)
NLL = [-math.log(p) for p in P]


def batch(**others):
    return batch_of(P, masked=(0,), entropy=(9.0, 3.0, 1.5, 0.0), **others)


@pytest.mark.parametrize(
    ("name", "options", "loss", "weight"),
    [
        ("chord", {}, [0, 0.25 * NLL[1], 0.16 * NLL[2], 0.09 * NLL[3]], [0, 0.25, 0.16, 0.09]),
        # above the cutoff: phi times the nll at the cutoff, and no gradient
        ("chord", {"cutoff": 0.6}, [0, 0.25 * NLL[1], 0.16 * NLL[2], -0.09 * math.log(0.6)], [0, 0.25, 0.16, 0]),
        (
            "focal",
            {"stop_gradient": True},
            [0, 0.25 * NLL[1], 0.64 * NLL[2], 0.01 * NLL[3]],
            [0, 0.25, 0.64, 0.01],
        ),
        # (1-p)^2 - 2 p (1-p) log p
        (
            "focal",
            {},
            [0, 0.25 * NLL[1], 0.64 * NLL[2], 0.01 * NLL[3]],
            [0, 0.25 + 0.5 * NLL[1], 0.64 + 0.32 * NLL[2], 0.01 + 0.18 * NLL[3]],
        ),
        # 1-p - p log p
        (
            "focal",
            {"gamma": 1.0},
            [0, 0.5 * NLL[1], 0.8 * NLL[2], 0.1 * NLL[3]],
            [0, 0.5 + 0.5 * NLL[1], 0.8 + 0.2 * NLL[2], 0.1 + 0.9 * NLL[3]],
        ),
        ("eaft", {}, [0, NLL[1], 0.5 * NLL[2], 0], [0, 1, 0.5, 0]),
        ("eaft", {"alpha": 2.0}, [0, NLL[1], 0.25 * NLL[2], 0], [0, 1, 0.25, 0]),
        ("eaft", {"scale": 1.5}, [0, 2 * NLL[1], NLL[2], 0], [0, 2, 1, 0]),
    ],
    ids=str,
)
def test_values_by_hand(name: str, options: dict, loss: list[float], weight: list[float]) -> None:
    objective = get_objective(name, **options)
    value, grad = run(objective, batch())
    assert same(value, loss) and same(grad, [-w for w in weight])
    assert same(objective(batch()).metrics["token_weight"], weight)


def test_the_cutoff_itself_is_trained_on() -> None:
    assert same(get_objective("chord", cutoff=0.6)(batch_of((0.6, 0.61))).metrics["token_weight"], [0.24, 0])


def test_metrics() -> None:
    chord = get_objective("chord", cutoff=0.6)(batch()).metrics
    assert chord["cutoff_frac"].tolist() == [0, 0, 0, 1] and chord["changed_frac"].tolist() == [0, 1, 1, 1]
    assert get_objective("chord")(batch()).metrics["cutoff_frac"].sum() == 0
    eaft = get_objective("eaft")(batch()).metrics
    assert same(eaft["entropy"], [0, 3, 1.5, 0]) and eaft["changed_frac"].tolist() == [0, 0, 1, 1]
    assert get_objective("focal")(batch()).metrics["changed_frac"].tolist() == [0, 1, 1, 1]
    assert get_objective("focal", gamma=0.0)(batch()).metrics["changed_frac"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("stop_gradient", [False, True])
def test_focal_at_certainty(gamma: float, stop_gradient: bool, dtype: torch.dtype) -> None:
    """p = 1 exactly: the power's slope is infinite there for gamma < 1, and must not become NaN."""
    certain = dataclasses.replace(batch_of((1.0,)), logp=torch.zeros(1, dtype=dtype, requires_grad=True))
    loss, grad = run(get_objective("focal", gamma=gamma, stop_gradient=stop_gradient), certain)
    weight = get_objective("focal", gamma=gamma, stop_gradient=stop_gradient)(certain).metrics["token_weight"]
    assert loss.item() == 0 and torch.isfinite(grad).all() and torch.equal(weight, -grad)
    if gamma in (0.0, 0.5, 1.0, 2.0):
        assert same(grad, [-1 if gamma == 0 else 0])


def test_entropy_just_below_zero_is_zero() -> None:
    rounded = batch_of((0.99,), entropy=(-1e-7,))
    for alpha in (0.5, 1.0):
        assert get_objective("eaft", alpha=alpha)(rounded).loss.item() == 0
