"""iw-SFT: hand-computed weights, clamps, whose ratio it is, and that a row's weight is the row's alone."""

import math

import pytest
from objective_helpers import batch_of, same

from verl_dft.objectives import get_objective
from verl_dft.testing import run

# Two responses of 2 trained tokens; the first token of the first is a prompt token.
# Row 0: ratios 0.5/0.25 = 2 and 0.8/0.1 = 8, geometric mean 4. Row 1: 0.1/0.2 = 0.5 and 0.4/0.2 = 2, mean 1.
P = (0.9, 0.5, 0.8, 0.1, 0.4)
REF = (0.1, 0.25, 0.1, 0.2, 0.2)


def batch(**others):
    return batch_of(P, lengths=(3, 2), masked=(0,), ref=REF, **others)


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({}, [0, 4, 4, 1, 1]),
        ({"temperature": 2.0}, [0, 16, 16, 1, 1]),
        ({"temperature": 3.0}, [0, 16, 16, 1, 1]),  # 64, clamped
        ({"temperature": 3.0, "clamp_max": 100.0}, [0, 64, 64, 1, 1]),
        ({"temperature": 3.0, "clamp_max": math.inf}, [0, 64, 64, 1, 1]),
        ({"clamp_min": 2.0}, [0, 4, 4, 2, 2]),
        ({"level": "token"}, [0, 1.8, 1.8, 0.5, 1.8]),
        ({"level": "token", "clamp_max": 100.0}, [0, 2, 8, 0.5, 2]),
        ({"level": "token", "clamp_max": 100.0, "clamp_min": 0.6}, [0, 2, 8, 0.6, 2]),
        ({"level": "token", "clamp_max": 100.0, "temperature": 2.0}, [0, 4, 64, 0.25, 4]),
    ],
    ids=str,
)
def test_weight_by_hand(options: dict, weight: list[float]) -> None:
    objective = get_objective("iw_sft", **options)
    loss, grad = run(objective, batch())
    assert same(grad, [-w for w in weight])
    assert same(loss, [-w * math.log(p) for w, p in zip(weight, P, strict=True)])


def test_token_level_lower_clamp_is_the_authors() -> None:
    low = batch_of((0.01,), ref=(0.5,))
    assert same(get_objective("iw_sft", level="token")(low).metrics["token_weight"], [0.2])
    assert same(get_objective("iw_sft")(low).metrics["token_weight"], [0.02])  # none at the sequence level


def test_the_averaged_policy_is_the_numerator_when_asked() -> None:
    ema = batch(ema=(0.5, 0.75, 0.3, 0.1, 0.1))  # ratios 3 and 3; 0.5 and 0.5
    result = get_objective("iw_sft", policy="ema")(ema)
    assert same(result.metrics["token_weight"], [0, 3, 3, 0.5, 0.5])
    assert same(run(get_objective("iw_sft"), ema)[1], [0, -4, -4, -1, -1])


def test_metrics() -> None:
    metrics = get_objective("iw_sft", level="token")(batch()).metrics
    assert metrics["clipped_frac"].tolist() == [0, 1, 1, 0, 1]
    assert metrics["changed_frac"].tolist() == [0, 1, 1, 1, 1]
    assert same(metrics["log_ratio"], [0, math.log(2), math.log(8), math.log(0.5), math.log(2)])
    assert get_objective("iw_sft")(batch()).metrics["clipped_frac"].tolist() == [0] * 5
    rest = get_objective("iw_sft")(batch_of(P, ref=P))
    assert rest.metrics["changed_frac"].tolist() == [0] * 5


def test_requires_follows_the_policy() -> None:
    assert get_objective("iw_sft").requires == {"ref_logp"}
    assert get_objective("iw_sft", policy="ema").requires == {"ref_logp", "ema_logp"}
    assert get_objective("iw_sft").ema_decay == 0.9  # read by the trainer
