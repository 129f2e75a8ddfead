"""Log-probs and entropies from logits: against float64, under autocast, gradients, masks."""

import pytest
import torch

from verl_dft.training.logprob import token_logp


def case(n: int = 11, vocab: int = 37, dtype: torch.dtype = torch.float64, scale: float = 3.0):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(n, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype)
    labels = torch.randint(vocab, (n,), generator=generator)
    mask = torch.rand(n, generator=generator) < 0.6
    return logits, labels, mask


def reference(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = logits.double().log_softmax(-1)
    return log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_agrees_with_float64_on_the_same_logits(dtype: torch.dtype, chunk: int) -> None:
    logits, labels, mask = case(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, entropy = token_logp(logits, labels, mask, with_entropy=True, chunk=chunk)
    expected, expected_entropy = reference(logits, labels)
    assert logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (logp.double() - expected)[mask].abs().max() < 1e-5
    assert (entropy.double() - expected_entropy)[mask].abs().max() < 1e-5
    assert (logp[~mask] == 0).all() and (entropy[~mask] == 0).all()


def test_bf16_log_softmax_would_not_do() -> None:
    """What verl's CPU path does, for the same logits: the bound above is not met by accident."""
    logits, labels, mask = case(dtype=torch.bfloat16)
    naive = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert (naive.double() - reference(logits, labels)[0])[mask].abs().max() > 1e-3


@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradients(with_entropy: bool) -> None:
    logits, labels, mask = case(n=5, vocab=7)
    logits.requires_grad_()

    def value(x: torch.Tensor) -> torch.Tensor:
        logp, entropy = token_logp(x, labels, mask, with_entropy=with_entropy, chunk=2)
        return logp.sin() + (entropy.cos() if with_entropy else 0)

    assert torch.autograd.gradcheck(value, (logits,))


def test_rows_outside_the_mask_get_no_gradient_and_may_hold_anything() -> None:
    logits, labels, mask = case()
    logits[~mask] = float("inf")
    logits.requires_grad_()
    logp, _ = token_logp(logits, labels, mask)
    logp.sum().backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad[~mask] == 0).all() and (logits.grad[mask] != 0).any()


def test_nothing_to_compute() -> None:
    logits, labels, _ = case()
    logits.requires_grad_()
    logp, entropy = token_logp(logits, labels, torch.zeros(11, dtype=torch.bool))
    logp.sum().backward()
    assert (logp == 0).all() and (logits.grad == 0).all() and entropy is None
