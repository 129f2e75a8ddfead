"""Log-probs and entropies from logits: against float64, under autocast, gradients, masks."""

import pytest
import torch

from verl_dft.training.logprob import CHUNK_ELEMENTS, CHUNK_TOKENS, chunk_rows, token_logp


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


@pytest.mark.parametrize("vocab", [512, 152_064])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stated_errors(vocab: int, dtype: torch.dtype) -> None:
    """The bounds in ``token_logp``'s docstring, for likely and unlikely labels and logits of any scale and offset."""
    n = 20 if vocab > 1000 else 500
    unit_roundoff = {torch.float32: 2**-24, torch.bfloat16: 2**-8}[dtype]
    for scale, offset in ((1, 0), (3, 100), (10, 0), (30, 100)):
        exact, labels, _ = case(n, vocab, scale=scale)
        exact += offset
        labels[n // 2 :] = exact[n // 2 :].argmax(-1)
        logits = exact.to(dtype)
        logp, entropy = token_logp(logits, labels, torch.ones(n, dtype=torch.bool), with_entropy=True)
        expected, expected_entropy = reference(logits, labels)
        assert ((logp.double() - expected).abs() / (1 + expected.abs())).max() < 5e-7
        assert (entropy.double() - expected_entropy).abs().max() < 2e-6
        rounded = (logp.double() - reference(exact, labels)[0]).abs()
        assert rounded.max() < 2 * unit_roundoff * exact.abs().max() + 5e-7 * (1 + expected.abs().max())


@pytest.mark.parametrize("vocab", [512, 152_064])
def test_stated_errors_of_gradients(vocab: int) -> None:
    logits, labels, _ = case(8, vocab, torch.float32)
    weights = torch.linspace(-1, 1, 8)
    grads = []
    for x in (logits.requires_grad_(), logits.detach().double().requires_grad_()):
        logp, entropy = token_logp(x, labels, torch.ones(8, dtype=torch.bool), with_entropy=True)
        ((logp * weights).sum() + (entropy * weights.flip(0)).sum()).backward()
        grads.append(x.grad.double())
    assert (grads[0] - grads[1]).abs().max() < 2e-6


def test_tokens_that_are_ruled_out() -> None:
    """Logits of -inf in a row that is trained on."""
    logits, labels, _ = case(6, 9)
    logits[:, 3] = -torch.inf
    labels[labels == 3] = 4
    mask = torch.ones(6, dtype=torch.bool)
    logp, entropy = token_logp(logits.requires_grad_(), labels, mask, with_entropy=True)
    (logp + entropy).sum().backward()
    keep = [0, 1, 2, 4, 5, 6, 7, 8]
    part = logits.detach()[:, keep].requires_grad_()
    expected, expected_entropy = token_logp(part, torch.where(labels > 3, labels - 1, labels), mask, with_entropy=True)
    (expected + expected_entropy).sum().backward()
    assert torch.allclose(logp, expected) and torch.allclose(entropy, expected_entropy)
    assert torch.allclose(logits.grad[:, keep], part.grad) and (logits.grad[:, 3] == 0).all()


def test_chunks_are_small_for_a_large_vocabulary() -> None:
    limit = CHUNK_ELEMENTS["cpu"]
    assert chunk_rows(512) == CHUNK_TOKENS and chunk_rows(152_064) * 152_064 <= limit
    assert chunk_rows(2 * limit) == 1 and chunk_rows(512, 7) == 7
    assert chunk_rows(152_064, device="cuda") > chunk_rows(152_064)
