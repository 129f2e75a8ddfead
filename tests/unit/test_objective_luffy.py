"""LUFFY: own rows clipped as PPO's, others' shaped, by hand."""

import math

import pytest
from objective_helpers import batch_of, same

from verl_dft.objectives import get_objective
from verl_dft.testing import run

# prompt, then ratios 1.25, 1.1, 0.5 in an own row; then a guided, an expert and a teacher token
P = (0.9, 0.5, 0.44, 0.2, 0.4, 0.1, 0.9)
OLD = (0.1, 0.4, 0.4, 0.4, 0.1, 0.9, 0.3)
ORIGIN = (2, 2, 2, 2, 3, 0, 1)


def batch(advantage: float):
    return batch_of(P, (4, 1, 1, 1), masked=(0,), old=OLD, origin=ORIGIN, advantage=[advantage] * 7)


@pytest.mark.parametrize(
    ("options", "advantage", "value", "weight"),
    [
        ({}, 1.0, [0, 1.2, 1.1, 0.5, 0.8, 0.5, 0.9], [0, 0, 1.1, 0.5, 0.16, 0.25, 0.09]),
        ({}, -2.0, [0, -2.5, -2.2, -1.6, -1.6, -1.0, -1.8], [0, -2.5, -2.2, 0, -0.32, -0.5, -0.18]),
        ({}, 0.0, [0] * 7, [0] * 7),
        ({"eps_low": 1.0, "eps_high": math.inf}, 1.0, [0, 1.25, 1.1, 0.5, 0.8, 0.5, 0.9],
         [0, 1.25, 1.1, 0.5, 0.16, 0.25, 0.09]),
        ({"eps_low": 1.0}, -1.0, [0, -1.25, -1.1, -0.5, -0.8, -0.5, -0.9], [0, -1.25, -1.1, -0.5, -0.16, -0.25, -0.09]),
        ({"eps_high": 0.05}, 1.0, [0, 1.05, 1.05, 0.5, 0.8, 0.5, 0.9], [0, 0, 0, 0.5, 0.16, 0.25, 0.09]),
        ({"gamma": 0.4}, 1.0, [0, 1.2, 1.1, 0.5, 0.5, 0.2, 9 / 13], [0, 0, 1.1, 0.5, 0.25, 0.16, 36 / 169]),
        ({"gamma": None}, 1.0, [0, 1.2, 1.1, 0.5, 0.4, 0.1, 0.9], [0, 0, 1.1, 0.5, 0.4, 0.1, 0.9]),
    ],
    ids=str,
)  # fmt: skip
def test_values_by_hand(options: dict, advantage: float, value: list[float], weight: list[float]) -> None:
    objective = get_objective("luffy", **options)
    loss, grad = run(objective, batch(advantage))
    assert same(loss, [-v for v in value]) and same(grad, [-w for w in weight])
    assert same(objective(batch(advantage)).metrics["token_weight"], weight)


def test_metrics() -> None:
    metrics = get_objective("luffy")(batch(1.0)).metrics
    assert metrics["others_frac"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert metrics["clipped_frac"].tolist() == [0, 1, 0, 0, 0, 0, 0]  # a demonstration is never clipped
    assert metrics["changed_frac"].tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert metrics["advantage"].tolist() == [0, 1, 1, 1, 1, 1, 1]
    at_rest = batch_of((0.3, 0.5), old=(0.3, 0.5), origin=(2, 2), advantage=(1.0, 1.0))
    assert get_objective("luffy")(at_rest).metrics["changed_frac"].sum() == 0


def test_shaping_prefers_rare_tokens() -> None:
    """The gradient of others' rows is largest at p = gamma, and that of no shaping at p = 1."""
    grid = [0.001, 0.02, 0.1, 0.4, 0.999]
    rows = batch_of(grid, old=grid, origin=[0] * 5, advantage=[1.0] * 5)
    weight = get_objective("luffy")(rows).metrics["token_weight"]
    assert weight.argmax() == 2 and weight[0] > 9 * grid[0]
    assert get_objective("luffy", gamma=None)(rows).metrics["token_weight"].argmax() == 4


def test_what_it_needs() -> None:
    objective = get_objective("luffy")
    assert objective.requires == {"advantage", "old_logp", "origin"}
    assert (objective.gamma, objective.eps_low, objective.eps_high) == (0.1, 0.2, 0.2)
