"""GFT's Eqs. 6, 17 and 22 are not the gradient of its loss; which one is, numerically.

The paper defines the loss -A C(pi) log pi (Eqs. 16 and 21), with C = sg(pi) below tau and 1 from tau on, and prints as
its gradient A (C / pi) grad log pi (Eqs. 17 and 22, and 6 in the main text). Differentiating the loss by hand gives
-A C grad log pi, or -A (C / pi) grad pi: the printed form writes grad log pi where grad pi belongs, which is one factor
1 / pi too many, and drops the sign. We implement the loss, as the authors' code does.
"""

import pytest
import torch
from parity_dense import Case, make_case, ours
from torch import Tensor
from torch.nn.functional import one_hot, softmax

TAU = 0.7


def scores(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Token probabilities [B, T], their sg'd coefficients C [B, T], and grad log pi by its closed form [B, T, V]."""
    full = softmax(case.logits, -1)
    p = full.gather(-1, case.label[..., None]).squeeze(-1)
    return p, torch.where(p < TAU, p, 1.0), one_hot(case.label, full.shape[-1]) - full


def finite_differences(case: Case, coefficient: Tensor, at: tuple[int, int]) -> Tensor:
    """[V] derivative of -A C log pi at one token, C held as the stop-gradient says."""
    b, t = at
    step, rows = 1e-5, []
    for v in range(case.logits.shape[-1]):
        values = []
        for sign in (1, -1):
            x = case.logits[b, t].clone()
            x[v] += sign * step
            values.append(-case.advantage[b] * coefficient[b, t] * torch.log_softmax(x, -1)[case.label[b, t]])
        rows.append((values[0] - values[1]) / (2 * step))
    return torch.stack(rows)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_gradient_is_of_the_loss_and_not_the_printed_one(seed: int) -> None:
    case = make_case(seed)
    _, grad = ours(case, "gft", {"tau": TAU})
    p, c, score = scores(case)
    a, trained = case.advantage[:, None, None], case.mask[..., None]
    of_the_loss = torch.where(trained, -a * c[..., None] * score, 0.0)
    of_the_loss_by_grad_pi = torch.where(trained, -a * (c / p)[..., None] * (p[..., None] * score), 0.0)
    printed = torch.where(trained, a * (c / p)[..., None] * score, 0.0)
    torch.testing.assert_close(grad, of_the_loss)
    torch.testing.assert_close(grad, of_the_loss_by_grad_pi)
    assert not torch.allclose(grad, printed) and not torch.allclose(grad, -printed)


def test_finite_differences_agree() -> None:
    case = make_case(0)
    _, grad = ours(case, "gft", {"tau": TAU})
    p, c, _ = scores(case)
    tried = [(b, t) for b in range(4) for t in range(9) if case.mask[b, t]]
    assert any(p[at] < TAU for at in tried) and any(p[at] >= TAU for at in tried)
    for at in tried:
        torch.testing.assert_close(grad[at], finite_differences(case, c, at), rtol=1e-5, atol=1e-8)


def test_where_the_printed_one_differs() -> None:
    """By the factor -1 / pi: the smaller the probability, the more, which undoes the rectification."""
    case = make_case(0)
    p, c, _ = scores(case)
    low = (p < TAU) & case.mask
    printed_scale, loss_scale = (c / p)[low], c[low]
    torch.testing.assert_close(printed_scale, torch.ones_like(printed_scale))  # as large as SFT's: nothing rectified
    torch.testing.assert_close(loss_scale, p[low])
