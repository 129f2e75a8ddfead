"""IS-SFT: whose stored log-probs divide the weight, what is unknown, and the shares that are logged."""

import math

import pytest
import torch
from objective_helpers import batch_of, same

from verl_dft.objectives import get_objective
from verl_dft.origins import ORIGINS
from verl_dft.testing import run

# One response of two tokens from each origin; the second token of the self row has no stored value.
P = (0.5, 0.4, 0.5, 0.4, 0.5, 0.4, 0.5, 0.4)
BEHAVIOR = (0.25, 0.8, 0.25, 0.8, 0.25, math.nan, 0.25, 0.8)
ORIGIN = [
    ORIGINS.index(name) for name in ("expert", "expert", "teacher", "teacher", "self", "self", "guided", "guided")
]


def batch():
    return batch_of(P, lengths=(2, 2, 2, 2), behavior=BEHAVIOR, origin=ORIGIN)


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({}, [0.5, 0.4, 0.5, 0.4, 0.5, 0.4, 0.5, 0.4]),
        ({"behavior": "self"}, [0.5, 0.4, 0.5, 0.4, 2, 0.4, 0.5, 0.4]),
        ({"behavior": "all"}, [0.5, 0.4, 0.5, 0.4, 2, 0.4, 2, 0.5]),
        ({"behavior": "all", "clip": 1.5}, [0.5, 0.4, 0.5, 0.4, 1.5, 0.4, 1.5, 0.5]),
        ({"clip": 0.45}, [0.45, 0.4, 0.45, 0.4, 0.45, 0.4, 0.45, 0.4]),
    ],
    ids=str,
)
def test_weight_by_hand(options: dict, weight: list[float]) -> None:
    loss, grad = run(get_objective("is_sft", **options), batch())
    assert same(grad, [-w for w in weight])
    assert same(loss, [-w * math.log(p) for w, p in zip(weight, P, strict=True)])


def test_shares() -> None:
    metrics = get_objective("is_sft", behavior="all", clip=1.5)(batch()).metrics
    assert metrics["stored_frac"].tolist() == [0, 0, 0, 0, 1, 0, 1, 1]
    assert metrics["unknown_frac"].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    assert metrics["clipped_frac"].tolist() == [0, 0, 0, 0, 1, 0, 1, 0]
    for i, name in enumerate(ORIGINS):
        assert metrics[f"{name}_frac"].tolist() == [float(j // 2 == i) for j in range(8)]
    only_self = get_objective("is_sft", behavior="self")(batch()).metrics
    assert only_self["stored_frac"].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert only_self["unknown_frac"].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    assert only_self["clipped_frac"].sum() == 0
    assert set(get_objective("is_sft")(batch()).metrics) == {"nll", "token_weight", "changed_frac", "clipped_frac"}


def test_changed_is_what_differs_from_sft() -> None:
    just_sampled = batch_of((0.5, 0.4), behavior=(0.5, 0.2), origin=[2, 2])
    metrics = get_objective("is_sft", behavior="self")(just_sampled).metrics
    assert metrics["changed_frac"].tolist() == [0, 1] and torch.equal(
        metrics["token_weight"][0], torch.tensor(1.0).double()
    )


def test_the_columns_are_needed_only_where_they_are_read() -> None:
    assert get_objective("is_sft").requires == frozenset()
    for behavior in ("self", "all"):
        assert get_objective("is_sft", behavior=behavior).requires == {"behavior_logp", "origin"}
