"""PSFT: what is clipped and what is not, by hand, and SFT at the first update."""

import dataclasses
import math

import pytest
import torch
from objective_helpers import batch_of, same

from verl_dft.objectives import get_objective
from verl_dft.objectives.psft import MAX_LOG_RATIO
from verl_dft.testing import run

# ratios 9 (prompt), 1.25, 1.5, 0.5, 0.9
P = (0.9, 0.5, 0.6, 0.1, 0.36)
OLD = (0.1, 0.4, 0.4, 0.2, 0.4)
RATIO = (9.0, 1.25, 1.5, 0.5, 0.9)


def batch(advantage: float = 1.0):
    return batch_of(P, masked=(0,), old=OLD, advantage=[advantage] * 5)


@pytest.mark.parametrize(
    ("options", "advantage", "value", "weight"),
    [
        ({}, 1.0, [0, 1.25, 1.28, 0.5, 0.9], [0, 1.25, 0, 0.5, 0.9]),
        ({"eps_high": 0.2}, 1.0, [0, 1.2, 1.2, 0.5, 0.9], [0, 0, 0, 0.5, 0.9]),
        ({"eps_high": math.inf}, 1.0, [0, 1.25, 1.5, 0.5, 0.9], [0, 1.25, 1.5, 0.5, 0.9]),
        ({}, -3.0, [0, 1.25, 1.28, 0.5, 0.9], [0, 1.25, 0, 0.5, 0.9]),  # advantages are not read
        ({"use_advantage": True}, 2.0, [0, 2.5, 2.56, 1, 1.8], [0, 2.5, 0, 1, 1.8]),
        # a negative advantage: rising is punished in full, falling only down to 1 - eps_low
        ({"use_advantage": True}, -1.0, [0, -1.25, -1.5, -0.8, -0.9], [0, -1.25, -1.5, 0, -0.9]),
        ({"use_advantage": True, "eps_low": 0.05}, -1.0, [0, -1.25, -1.5, -0.95, -0.95], [0, -1.25, -1.5, 0, 0]),
        ({"use_advantage": True}, 0.0, [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_values_by_hand(options: dict, advantage: float, value: list[float], weight: list[float]) -> None:
    objective = get_objective("psft", **options)
    loss, grad = run(objective, batch(advantage))
    assert same(loss, [-v for v in value]) and same(grad, [-w for w in weight])
    assert same(objective(batch(advantage)).metrics["token_weight"], weight)


def test_metrics() -> None:
    metrics = get_objective("psft")(batch()).metrics
    assert metrics["clipped_frac"].tolist() == [0, 0, 1, 0, 0]
    assert same(metrics["ratio"], [0, *RATIO[1:]])
    assert metrics["changed_frac"].tolist() == [0, 1, 1, 1, 1]
    first = get_objective("psft")(batch_of(P, old=P)).metrics
    assert first["clipped_frac"].sum() == 0 == first["changed_frac"].sum() and same(first["ratio"], [1] * 5)


# A negative advantage and eps_low=1 clip nothing, so that only the bound on the log-ratio acts.
@pytest.mark.parametrize(
    ("logp", "old", "ratio", "moves"),
    [
        (-0.5, -19.5, math.exp(19), True),
        (-0.5, -20.5, math.exp(MAX_LOG_RATIO), True),
        (-0.5, -20.75, math.exp(MAX_LOG_RATIO), False),
        (-0.5, -1e4, math.exp(MAX_LOG_RATIO), False),
        (-19.5, -0.5, math.exp(-19), True),
        (-20.75, -0.5, math.exp(-MAX_LOG_RATIO), False),
        (-1e4, -0.5, math.exp(-MAX_LOG_RATIO), False),
    ],
)
def test_far_from_the_old_policy_nothing_overflows(logp: float, old: float, ratio: float, moves: bool) -> None:
    far = dataclasses.replace(
        batch_of((0.5,), advantage=[-1.0]),
        logp=torch.tensor([logp], dtype=torch.float64, requires_grad=True),
        old_logp=torch.tensor([old], dtype=torch.float64),
    )
    objective = get_objective("psft", use_advantage=True, eps_low=1.0)
    loss, grad = run(objective, far)
    weight = objective(far).metrics["token_weight"]
    assert loss.item() == pytest.approx(ratio, rel=1e-9, abs=0)
    assert grad.item() == pytest.approx(ratio * moves, rel=1e-9, abs=0) and torch.equal(weight, -grad)
    assert MAX_LOG_RATIO == 20


def test_what_it_needs() -> None:
    assert get_objective("psft").requires == {"old_logp"}
    assert get_objective("psft", use_advantage=True).requires == {"old_logp", "advantage"}
    assert (get_objective("psft").eps_low, get_objective("psft").eps_high) == (0.2, 0.28)
