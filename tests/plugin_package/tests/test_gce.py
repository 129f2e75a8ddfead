import pytest
import torch

from verl_dft.errors import InputError
from verl_dft.objectives import get_objective, list_objectives
from verl_dft.testing import check_gradient, check_objective, make_batch, run


def test_it_is_registered() -> None:
    assert "gce" in list_objectives()
    assert get_objective("gce", q=0.5).q == 0.5


@pytest.mark.parametrize("q", [0.3, 0.7, 1.0])
def test_contract(q: float) -> None:
    check_objective(get_objective("gce", q=q))
    check_gradient(get_objective("gce", q=q), expected=lambda batch: batch.logp.exp() ** q)


def test_values() -> None:
    batch = make_batch(dtype=torch.float64)
    loss, _ = run(get_objective("gce", q=0.5), batch)
    by_hand = (1 - batch.logp.detach().exp() ** 0.5) / 0.5
    assert torch.allclose(loss[batch.mask], by_hand[batch.mask])


def test_limits() -> None:
    batch = make_batch(dtype=torch.float64)
    almost, sft = (run(objective, batch) for objective in (get_objective("gce", q=1e-9), get_objective("sft")))
    assert torch.allclose(almost[0], sft[0], atol=1e-7) and torch.allclose(almost[1], sft[1], atol=1e-7)
    for q in (0.3, 1.0):
        _, gradient = run(get_objective("gce", q=q), batch)
        assert torch.allclose(gradient, run(get_objective("dft", alpha=q), batch)[1])


@pytest.mark.parametrize("q", [0.0, 1.5, -1.0])
def test_a_wrong_option_is_refused(q: float) -> None:
    with pytest.raises(InputError, match="objective.q must be in"):
        get_objective("gce", q=q)
