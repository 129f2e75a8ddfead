"""What ASFT's k3 variant estimates, by exact expectations over a small vocabulary.

For tokens drawn from theta, the mean of exp(d) - 1 - d with d = log ref - log theta is KL(theta || ref), and the mean
of its gradient, (1 - ref / theta) grad log theta, is the gradient of KL(ref || theta): the full variant's term.
"""

import torch
from torch.nn.functional import log_softmax

from verl_dft.objectives import TokenBatch, get_objective

V = 7


def test_k3_over_every_token() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(V, generator=g, dtype=torch.float64).requires_grad_()
    ref = log_softmax(torch.randn(V, generator=g, dtype=torch.float64), -1)
    theta = log_softmax(logits, -1)
    every = torch.ones(V, dtype=torch.bool)
    batch = TokenBatch(logp=theta, mask=every, seq=torch.zeros(V, dtype=torch.int64), num_seqs=1, ref_logp=ref)
    penalty = (
        get_objective("asft", kl="k3", kl_weight=1.0)(batch).loss
        - get_objective("asft", kl="k3", kl_weight=0)(batch).loss
    )
    p = theta.exp().detach()
    reverse = (theta.exp() * (theta - ref)).sum()
    forward = (ref.exp() * (ref - theta)).sum()
    mean = (p * penalty).sum()
    torch.testing.assert_close(mean, reverse)
    (of_the_mean,) = torch.autograd.grad(mean, logits, retain_graph=True)
    (of_forward,) = torch.autograd.grad(forward, logits, retain_graph=True)
    (of_reverse,) = torch.autograd.grad(reverse, logits)
    torch.testing.assert_close(of_the_mean, of_forward)
    assert not torch.allclose(of_the_mean, of_reverse)


def test_k3_is_bounded_where_training_raises_a_token() -> None:
    """theta far above ref: at most lambda pushes it down; theta far below: pulled up by ref / theta - 1."""
    logp = torch.tensor([-0.1, -8.0], dtype=torch.float64)
    batch = TokenBatch(
        logp=logp.requires_grad_(),
        mask=torch.ones(2, dtype=torch.bool),
        seq=torch.zeros(2, dtype=torch.int64),
        num_seqs=1,
        ref_logp=torch.tensor([-30.0, -5.0], dtype=torch.float64),
    )
    weight = get_objective("asft", kl="k3", kl_weight=1.0)(batch).metrics["token_weight"] - logp.detach().exp()
    torch.testing.assert_close(weight, torch.tensor([-1.0, 2.718281828459045**3 - 1], dtype=torch.float64))
