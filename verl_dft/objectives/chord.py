"""CHORD's phi weighting: SFT on tokens that are neither certain nor impossible."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from verl_dft.objectives.batch import TokenBatch, TokenLoss, token_loss
from verl_dft.objectives.options import check_range


@dataclass(frozen=True)
class CHORD:
    r"""Negative log-likelihood, each token weighted by the variance of "the policy picks it".

    .. math::
        \ell_t = -\,\mathrm{sg}[p_t (1 - p_t)] \log p_t, \qquad p_t = \pi_\theta(y_t \mid x, y_{<t})

    Reads ``logp`` and ``mask``. With ``cutoff`` below 1, a token with p above it is not trained on and counts in the
    loss with the value its log-probability would have at the cutoff, as in Trinity-RFT.

    This is the SFT part of CHORD-phi; ``chord_mix`` has the part of reinforcement learning beside it.

    References:
      Zhang et al., `On-Policy RL Meets Off-Policy Experts <https://arxiv.org/abs/2508.11408>`_, 2025;
      ``trinity/algorithm/policy_loss_fn/chord_policy_loss.py`` of modelscope/Trinity-RFT.
    """

    cutoff: float = 1.0
    """Largest probability that is trained on, in (0, 1]; 1 is off, the paper."""

    requires: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_range("cutoff", self.cutoff, low=1e-6, high=1.0, hint="a probability; 1 is off")

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        logp = batch.trained(batch.logp)
        phi = -(torch.exp(logp) * torch.expm1(logp)).detach()
        certain = logp > math.log(self.cutoff)
        nll = torch.where(certain, torch.full_like(logp, -math.log(self.cutoff)), -logp)
        weight = torch.where(certain, torch.zeros_like(phi), phi)
        return token_loss(
            batch, -logp, weight, changed=torch.ones_like(batch.mask), loss=phi * nll, cutoff_frac=certain
        )
