"""Generalized cross entropy: a bounded loss between the negative log-likelihood and 1 - p."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from verl_dft.errors import InputError
from verl_dft.objectives import TokenBatch, TokenLoss, token_loss


@dataclass(frozen=True)
class GCE:
    r"""Generalized cross entropy.

    .. math::
        \ell_t = \frac{1 - p_t^q}{q}, \qquad p_t = \pi_\theta(y_t \mid x, y_{<t})

    Reads ``logp`` and ``mask``. The gradient is :math:`-p_t^q \nabla \log p_t`, that of DFT with ``alpha=q``.

    Limits: q to 0 is SFT; ``q=1`` has DFT's gradient.

    References:
      Zhang and Sabuncu, `Generalized Cross Entropy Loss <https://arxiv.org/abs/1805.07836>`_, 2018.
    """

    q: float = 0.7
    """Exponent, dimensionless, in (0, 1]: 0.7 in the paper's experiments."""

    requires: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not 0 < self.q <= 1:
            raise InputError(f"objective.q must be in (0, 1] (0.7 is the paper), got {self.q}")

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        logp = batch.trained(batch.logp)
        loss = -torch.expm1(self.q * logp) / self.q
        weight = torch.exp(self.q * logp.detach())
        return token_loss(batch, -logp, weight, changed=weight != 1, loss=loss)
