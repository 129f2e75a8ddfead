"""Drawing tokens: the distribution, its restrictions, and what a draw depends on."""

import numpy as np
import pytest
import torch

from verl_dft.sampling.choose import choose_tokens, uniforms

_DRAWS = 40_000


def _counts(logits: torch.Tensor, **options: float) -> np.ndarray:
    u = torch.from_numpy(uniforms(range(_DRAWS), [5] * _DRAWS))
    tokens = choose_tokens(logits.expand(_DRAWS, -1), u, **options)
    return np.bincount(tokens.numpy(), minlength=logits.shape[0])


def _chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    assert counts[p == 0].sum() == 0, "a token of probability 0 was drawn"
    expected = p[p > 0] * _DRAWS
    return float(((counts[p > 0] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    ("options", "p"),
    [
        ({"temperature": 1.0}, [0.5, 0.25, 0.125, 0.0625, 0.0625]),
        # temperature 1/2 squares the probabilities: 64 : 16 : 4 : 1 : 1 of 86
        ({"temperature": 0.5}, [64 / 86, 16 / 86, 4 / 86, 1 / 86, 1 / 86]),
        ({"temperature": 1.0, "top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
        # .5 + .25 = .75 reaches .7; the rest is cut
        ({"temperature": 1.0, "top_p": 0.7}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.8}, [4 / 7, 2 / 7, 1 / 7, 0, 0]),
        # k first: 4/7, 2/7, 1/7, of which the first two reach .8
        ({"temperature": 1.0, "top_p": 0.8, "top_k": 3}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 1e-9}, [1, 0, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(options: dict, p: list[float]) -> None:
    """Chi-square with 4 degrees of freedom exceeds 23.5 once in 10,000 times; the seeds are fixed."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log()
    assert _chi_square(_counts(logits, **options), np.array(p)) < 23.5


def test_order_of_the_vocabulary_does_not_matter_to_top_p() -> None:
    logits = torch.tensor([0.0625, 0.25, 0.0625, 0.5, 0.125]).log()
    assert _chi_square(_counts(logits, temperature=1.0, top_p=0.7), np.array([0, 1 / 3, 0, 2 / 3, 0])) < 23.5


def test_a_masked_token_is_never_drawn() -> None:
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")])
    counts = _counts(logits, temperature=1.0)
    assert counts[[0, 2, 4]].sum() == 0 and abs(counts[1] - _DRAWS / 2) < 400
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose_tokens(logits.expand(2, -1), ends, 1.0).tolist() == [1, 3]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(50, 301, generator=torch.Generator().manual_seed(0))
    u = torch.from_numpy(uniforms(range(50), range(50)))
    whole = choose_tokens(logits, u, 0.8, 0.9, 100)
    monkeypatch.setattr("verl_dft.sampling.choose._CHUNK_ELEMENTS", 301 * 7)
    assert torch.equal(choose_tokens(logits, u, 0.8, 0.9, 100), whole)


def test_uniforms_are_uniform_and_independent_over_positions() -> None:
    """One seed, many positions, and many seeds, one position: mean 1/2, variance 1/12, no correlation at lag 1."""
    for u in (uniforms([3] * _DRAWS, range(_DRAWS)), uniforms(range(_DRAWS), [3] * _DRAWS)):
        assert (u >= 0).all() and (u < 1).all()
        assert abs(u.mean() - 0.5) < 0.006 and abs(u.var() - 1 / 12) < 0.003
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02


def test_uniforms_are_fixed_for_ever() -> None:
    """Published outputs of SplitMix64 from seed 1234567, so that a stored seed stays reproducible."""
    first, second = 6457827717110365317, 3203168211198807973
    expected = [(x >> 11) * 2.0**-53 for x in (first, second)]
    assert uniforms([1234567, 1234567], [0, 1]).tolist() == expected
    assert uniforms([2**63 - 1], [10**6]).shape == (1,)  # the largest seed does not overflow
