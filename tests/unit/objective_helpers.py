"""Batches of tokens with given probabilities, for values worked out by hand."""

import math
from collections.abc import Sequence

import torch

from verl_dft.objectives import TokenBatch


def batch_of(
    probabilities: Sequence[float], lengths: Sequence[int] = (), masked: Sequence[int] = (), **others: Sequence[float]
) -> TokenBatch:
    """Tokens with these probabilities, float64.

    Args:
        probabilities: of each token under the policy.
        lengths: of the sequences; one sequence when empty.
        masked: positions that are not trained on.
        others: a field of the TokenBatch as it is, or ``ref=``, ``old=``, ``behavior=``, ``ema=`` as probabilities.
    """
    n = len(probabilities)
    lengths = lengths or (n,)
    assert sum(lengths) == n
    fields = {}
    for name, values in others.items():
        if name in ("ref", "old", "behavior", "ema"):
            fields[f"{name}_logp"] = torch.tensor(values, dtype=torch.float64).log()
        elif name in ("origin", "exempt"):
            fields[name] = torch.tensor(values)
        else:
            fields[name] = torch.tensor(values, dtype=torch.float64)
    return TokenBatch(
        logp=torch.tensor([math.log(p) for p in probabilities], dtype=torch.float64).requires_grad_(),
        mask=torch.tensor([i not in masked for i in range(n)]),
        seq=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        num_seqs=len(lengths),
        **fields,
    )


def same(actual: torch.Tensor, expected: Sequence[float], tolerance: float = 1e-6) -> bool:
    """Whether a tensor holds these numbers, to ``tolerance`` relative."""
    return torch.allclose(actual, torch.tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=1e-9)
