"""Supervised fine-tuning (SFT): the negative log-likelihood of the demonstration."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from verl_dft.objectives.batch import TokenBatch, TokenLoss, token_loss


@dataclass(frozen=True)
class SFT:
    r"""Negative log-likelihood.

    .. math::
        \ell_t = -\log \pi_\theta(y_t \mid x, y_{<t})

    Reads ``logp`` and ``mask``.

    References:
      Wu et al., `On the Generalization of SFT <https://arxiv.org/abs/2508.05629>`_, 2025, Eq. 1.
    """

    requires: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        nll = -batch.logp
        return token_loss(batch, nll, torch.ones_like(nll), changed=torch.zeros_like(batch.mask))
