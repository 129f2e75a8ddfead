"""KL(reference || policy) from logits: value and gradient against autograd on the dense formula."""

import pytest
import torch

from verl_dft.training.reference_kl import token_kl


def dense(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    q = reference.softmax(-1)
    return (q * (reference.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_value_and_gradient(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(10, 37, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    upstream = torch.randn(10, generator=generator, dtype=torch.float64)
    mask = torch.arange(10) % 3 != 0
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    value = token_kl(ours, reference, mask, chunk=chunk)
    expected = torch.where(mask, dense(theirs, reference), 0.0)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    (value * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: token_kl(x, reference, mask, chunk=chunk), logits.requires_grad_())


def test_the_reference_gets_no_gradient_and_equal_models_have_none() -> None:
    logits = torch.randn(4, 9, requires_grad=True)
    reference = logits.detach().clone().requires_grad_()
    value = token_kl(logits, reference, torch.ones(4, dtype=torch.bool))
    value.sum().backward()
    assert reference.grad is None and value.abs().max() < 1e-6 and logits.grad.abs().max() < 1e-6


def test_masked_rows_and_excluded_tokens_do_not_leak() -> None:
    logits, reference = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    reference[1, 2] = -torch.inf  # the reference rules a token out
    with torch.no_grad():
        logits[0] = torch.nan
    mask = torch.tensor([False, True, True])
    value = token_kl(logits, reference, mask)
    value.sum().backward()
    assert value[0] == 0 and torch.isfinite(value).all()
    assert torch.isfinite(logits.grad).all() and (logits.grad[0] == 0).all()
    kept = [0, 1, 3, 4]
    q = reference[1, kept].softmax(-1)
    expected = (q * (q.log() - logits.detach()[1].log_softmax(-1)[kept])).sum()
    torch.testing.assert_close(value[1].detach(), expected)


def test_bf16_logits_are_compared_in_float32() -> None:
    logits, reference = torch.randn(6, 512).bfloat16(), torch.randn(6, 512).bfloat16()
    value = token_kl(logits, reference, torch.ones(6, dtype=torch.bool))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), dense(logits.double(), reference.double()), rtol=1e-5, atol=1e-6)


def test_no_row_is_trained() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    value = token_kl(logits, torch.randn(3, 5), torch.zeros(3, dtype=torch.bool))
    value.sum().backward()
    assert (value == 0).all() and (logits.grad == 0).all()
