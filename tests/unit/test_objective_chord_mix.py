"""CHORD's two losses by hand: own rows clipped as PPO's, demonstrations as SFT."""

import math

import pytest
from objective_helpers import batch_of, same

from verl_dft.objectives import get_objective
from verl_dft.testing import run

# prompt, then ratios 1.25, 1.1, 0.5 in an own row; then a guided, an expert and a teacher token
P = (0.9, 0.5, 0.44, 0.2, 0.4, 0.1, 0.9)
OLD = (0.1, 0.4, 0.4, 0.4, 0.1, 0.9, 0.3)
ORIGIN = (2, 2, 2, 2, 3, 0, 1)
NLL = [-math.log(p) for p in P]


def batch(advantage: float):
    return batch_of(P, (4, 1, 1, 1), masked=(0,), old=OLD, origin=ORIGIN, advantage=[advantage] * 7)


PHI, PHI_LOSS = [0.24, 0.09, 0.09], [0.24 * NLL[4], 0.09 * NLL[5], 0.09 * NLL[6]]


@pytest.mark.parametrize(
    ("options", "advantage", "loss", "weight"),
    [
        ({}, 1.0, [0, -1.2, -1.1, -0.5, *PHI_LOSS], [0, 0, 1.1, 0.5, *PHI]),
        ({}, -2.0, [0, 2.5, 2.2, 1.6, *PHI_LOSS], [0, -2.5, -2.2, 0, *PHI]),
        ({"phi": False}, -2.0, [0, 2.5, 2.2, 1.6, *NLL[4:]], [0, -2.5, -2.2, 0, 1, 1, 1]),
        ({"eps_high": math.inf}, 1.0, [0, -1.25, -1.1, -0.5, *PHI_LOSS], [0, 1.25, 1.1, 0.5, *PHI]),
        ({"eps_low": 1.0}, -1.0, [0, 1.25, 1.1, 0.5, *PHI_LOSS], [0, -1.25, -1.1, -0.5, *PHI]),
        ({"eps_high": 0.05}, 1.0, [0, -1.05, -1.05, -0.5, *PHI_LOSS], [0, 0, 0, 0.5, *PHI]),
    ],
    ids=str,
)
def test_values_by_hand(options: dict, advantage: float, loss: list[float], weight: list[float]) -> None:
    objective = get_objective("chord_mix", **options)
    value, grad = run(objective, batch(advantage))
    assert same(value, loss) and same(grad, [-w for w in weight])
    assert same(objective(batch(advantage)).metrics["token_weight"], weight)


def test_metrics_and_what_it_needs() -> None:
    metrics = get_objective("chord_mix")(batch(1.0)).metrics
    assert metrics["others_frac"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert metrics["clipped_frac"].tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert metrics["changed_frac"].tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert get_objective("chord_mix", phi=False)(batch(1.0)).metrics["changed_frac"].tolist() == [0, 1, 1, 1, 0, 0, 0]
    objective = get_objective("chord_mix")
    assert objective.requires == {"advantage", "old_logp", "origin"}
    assert (objective.phi, objective.eps_low, objective.eps_high) == (True, 0.2, 0.2)
