"""SFT and DFT: hand-computed values, closed-form gradients, limits, errors."""

import math

import pytest
import torch

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


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dft", {"alpha": -1}, "objective.alpha must be >= 0"),
        ("dft", {"alpha": math.nan}, "objective.alpha must be >= 0"),
        ("dft", {"floor": 1.5}, "objective.floor must be a probability"),
        ("dft", {"alfa": 1}, "no option 'alfa'; valid: alpha, floor"),
        ("dtf", {}, "unknown objective 'dtf'; valid: dft, sft. Did you mean 'dft'?"),
    ],
    ids=["alpha", "alpha-nan", "floor", "option", "name"],
)
def test_errors_name_the_key_and_the_way_out(name: str, options: dict[str, float], words: str) -> None:
    with pytest.raises(InputError) as error:
        get_objective(name, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_names() -> None:
    assert {"sft", "dft"} <= set(list_objectives())
