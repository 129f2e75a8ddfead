"""SFT and DFT: hand-computed values, closed-form gradients, limits, errors."""

import math

import pytest
import torch
from objective_helpers import batch_of as rows_of
from objective_helpers import same

from verl_dft.errors import InputError
from verl_dft.objectives import TokenBatch, get_objective, list_objectives
from verl_dft.testing import make_batch, run

# Probabilities of four tokens; the first is a prompt token.
P = (0.9, 0.5, 0.25, 0.1)


def batch_of(probabilities: tuple[float, ...] = P) -> TokenBatch:
    logp = torch.tensor([math.log(p) for p in probabilities]).requires_grad_()
    mask = torch.tensor([False] + [True] * (len(probabilities) - 1))
    return TokenBatch(logp=logp, mask=mask, seq=torch.zeros(len(probabilities), dtype=torch.int64), num_seqs=1)


# Eq. 9 by hand: -p log p.  0.5*0.693147 = 0.346574; 0.25*1.386294 = 0.346574; 0.1*2.302585 = 0.230259
# floor 0.2: only the last weight changes, 0.2*2.302585 = 0.460517.  alpha 2: -p^2 log p.
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("sft", {}, [0.0, 0.693147, 1.386294, 2.302585]),
        ("dft", {}, [0.0, 0.346574, 0.346574, 0.230259]),
        ("dft", {"floor": 0.2}, [0.0, 0.346574, 0.346574, 0.460517]),
        ("dft", {"alpha": 2.0}, [0.0, 0.173287, 0.086643, 0.023026]),
    ],
    ids=["sft", "dft-eq9", "dft-floor", "dft-alpha2"],
)
def test_values_by_hand(name: str, options: dict[str, float], expected: list[float]) -> None:
    loss = get_objective(name, **options)(batch_of()).loss
    assert torch.allclose(loss, torch.tensor(expected), atol=1e-6)


# The weight carries no gradient: d(-sg(p) log p)/d log p = -p. Without the stop-gradient it would be -p (1 + log p).
@pytest.mark.parametrize(
    ("name", "options", "weight"),
    [
        ("sft", {}, [1.0, 1.0, 1.0]),
        ("dft", {}, [0.5, 0.25, 0.1]),
        ("dft", {"floor": 0.2}, [0.5, 0.25, 0.2]),
        ("dft", {"alpha": 2.0}, [0.25, 0.0625, 0.01]),
    ],
    ids=["sft", "dft", "dft-floor", "dft-alpha2"],
)
def test_gradient_is_minus_the_weight(name: str, options: dict[str, float], weight: list[float]) -> None:
    _, grad = run(get_objective(name, **options), batch_of())
    assert torch.allclose(grad, -torch.tensor([0.0, *weight]), atol=1e-6)


def test_gradient_test_sees_a_missing_stop_gradient() -> None:
    batch = batch_of()
    logp = batch.logp.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad((-logp.exp() * logp)[1:].sum(), logp)
    assert not torch.allclose(grad[1:], -torch.tensor(P[1:]), atol=1e-2)


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"floor": 1.0}], ids=str)
def test_limit_is_sft(options: dict[str, float]) -> None:
    batch = make_batch()
    for ours, sft in zip(run(get_objective("dft", **options), batch), run(get_objective("sft"), batch), strict=True):
        assert torch.equal(ours, sft)


def test_certain_tokens_train_like_sft_and_impossible_ones_not_at_all() -> None:
    loss, grad = run(get_objective("dft"), batch_of((0.5, 1.0, 1e-30)))
    assert grad[1] == -1 and abs(float(grad[2])) < 1e-29 and float(loss[2]) < 1e-27


def test_metrics_say_what_was_changed() -> None:
    batch = batch_of((0.9, 1.0, 0.25, 0.1))
    metrics = get_objective("dft", floor=0.2)(batch).metrics
    assert metrics["changed_frac"][1:].tolist() == [0, 1, 1]
    assert metrics["floored_frac"][1:].tolist() == [0, 0, 1]
    assert torch.allclose(metrics["token_weight"][1:], torch.tensor([1.0, 0.25, 0.2]))


def test_sft_changes_nothing() -> None:
    metrics = get_objective("sft")(batch_of()).metrics
    assert metrics["changed_frac"].sum() == 0 and metrics["token_weight"].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dft", {"alpha": -1}, "objective.alpha must be >= 0"),
        ("dft", {"alpha": math.nan}, "objective.alpha must be >= 0"),
        ("dft", {"floor": 1.5}, "objective.floor must be in [0, 1] (a probability"),
        ("dft", {"alfa": 1}, "no option 'alfa'; valid: alpha, floor, level"),
        ("dtf", {}, f"unknown objective 'dtf'; valid: {', '.join(list_objectives())}. Did you mean 'dft'?"),
    ],
    ids=["alpha", "alpha-nan", "floor", "option", "name"],
)
def test_errors_name_the_key_and_the_way_out(name: str, options: dict[str, float], words: str) -> None:
    with pytest.raises(InputError) as error:
        get_objective(name, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_names() -> None:
    names = {"asft", "chord", "dft", "eaft", "focal", "gft", "is_sft", "iw_sft", "psft", "sft"}
    assert names <= set(list_objectives())


# Two responses: 0.5 * 0.25 and 0.1 * 0.8 * 0.9; the first token is a prompt token.
ROWS = (0.9, 0.5, 0.25, 0.1, 0.8, 0.9)


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({}, [0, 0.125, 0.125, 0.072, 0.072, 0.072]),
        ({"alpha": 2.0}, [0, 0.015625, 0.015625, 0.005184, 0.005184, 0.005184]),
        ({"floor": 0.1}, [0, 0.125, 0.125, 0.1, 0.1, 0.1]),
        ({"length_normalized": True}, [0, *[0.125**0.5] * 2, *[0.072 ** (1 / 3)] * 3]),
    ],
    ids=str,
)
def test_sequence_level_by_hand(options: dict[str, float], weight: list[float]) -> None:
    loss, grad = run(get_objective("dft", level="sequence", **options), rows_of(ROWS, lengths=(3, 3), masked=(0,)))
    assert same(grad, [-w for w in weight])
    assert same(loss, [-w * math.log(p) for w, p in zip(weight, ROWS, strict=True)])


def test_a_long_response_underflows_only_where_it_must() -> None:
    """1000 tokens of p = 0.5 have a probability of 1e-301; its hundredth power is 1e-3, in float32 too."""
    n = 1000
    logp = torch.full((n,), math.log(0.5)).requires_grad_()
    long = TokenBatch(logp=logp, mask=torch.ones(n).bool(), seq=torch.zeros(n, dtype=torch.int64), num_seqs=1)
    assert get_objective("dft", level="sequence")(long).loss.sum() == 0
    weight = get_objective("dft", level="sequence", alpha=0.01)(long).metrics["token_weight"]
    assert same(weight, [0.5**10] * n, 1e-4)


@pytest.mark.parametrize(
    ("options", "weight", "floored"),
    [
        ({}, [0, 0.5, 1, 0.1, 0.8, 1], [0] * 6),
        ({"floor": 0.3}, [0, 0.5, 1, 0.3, 0.8, 1], [0, 0, 0, 1, 0, 0]),
        ({"level": "sequence"}, [0, 0.5, 1, 0.08, 0.08, 1], [0] * 6),
        ({"level": "sequence", "floor": 0.3}, [0, 0.5, 1, 0.3, 0.3, 1], [0, 0, 0, 1, 1, 0]),
        ({"level": "sequence", "length_normalized": True}, [0, 0.5, 1, 0.08**0.5, 0.08**0.5, 1], [0] * 6),
    ],
    ids=str,
)
def test_exempt_tokens_keep_weight_1(options: dict[str, float], weight: list[float], floored: list[float]) -> None:
    """The last token of each response is exempt: weight 1, and no part of its response's probability."""
    p = (0.9, 0.5, 1e-9, 0.1, 0.8, 1e-9)
    batch = rows_of(p, lengths=(3, 3), masked=(0,), exempt=[True, False, True, False, False, True])
    objective = get_objective("dft", exempt_tokens=["end_of_turn"], **options)
    assert objective.requires == {"exempt"} and get_objective("dft").requires == frozenset()
    _, grad = run(objective, batch)
    assert same(grad, [-w for w in weight])
    metrics = objective(batch).metrics
    assert metrics["exempt_frac"].tolist() == [0, 0, 1, 0, 0, 1]
    assert metrics["floored_frac"].tolist() == floored
    assert metrics["changed_frac"].tolist() == [0, 1, 0, 1, 1, 0]


def test_a_token_at_the_floor_is_not_below_it() -> None:
    assert get_objective("dft", floor=0.25)(rows_of((0.25, 0.24))).metrics["floored_frac"].tolist() == [0, 1]


def test_without_exempt_tokens_a_new_token_is_not_learned() -> None:
    batch = rows_of((0.5, 1e-9), exempt=[False, True])
    assert abs(float(run(get_objective("dft"), batch)[1][1])) < 1e-8
    assert get_objective("dft")(batch).metrics["exempt_frac"].sum() == 0
    assert run(get_objective("dft", exempt_tokens=[7]), batch)[1][1] == -1
