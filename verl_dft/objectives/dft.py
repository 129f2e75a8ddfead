"""Dynamic fine-tuning (DFT): SFT with each token weighted by its own probability."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from verl_dft.errors import InputError
from verl_dft.objectives.batch import TokenBatch, TokenLoss, token_loss


@dataclass(frozen=True)
class DFT:
    r"""Negative log-likelihood, each token weighted by its own probability.

    .. math::
        \ell_t = -\,\mathrm{sg}\!\left[\max(\pi_\theta(y_t \mid x, y_{<t}), \text{floor})^{\alpha}\right]
                 \log \pi_\theta(y_t \mid x, y_{<t})

    where sg stops the gradient. Reads ``logp`` and ``mask``.

    Limits: ``alpha=0`` is SFT; ``alpha=1, floor=0`` is the paper; ``floor=1`` is SFT.
    Differs from the authors' code: their ``raft_scale`` loss has ``floor=0.1``, which the paper does not mention.

    References:
      Wu et al., `On the Generalization of SFT <https://arxiv.org/abs/2508.05629>`_, 2025, Eq. 9.
    """

    alpha: float = 1.0
    """Exponent of the probability weight, dimensionless, >= 0. Ours: the paper has 1."""
    floor: float = 0.0
    """Smallest probability used as a weight, in [0, 1]. The paper has 0; the authors' ``raft_scale`` has 0.1."""

    requires: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise InputError(f"objective.alpha must be >= 0 (0 is SFT, 1 is DFT), got {self.alpha}")
        if not 0 <= self.floor <= 1:
            raise InputError(f"objective.floor must be a probability in [0, 1] (0 is the paper), got {self.floor}")

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        nll = -batch.logp
        probability = torch.exp(batch.logp.detach())
        weight = probability.clamp(min=self.floor) ** self.alpha
        # a floor of 1 or an exponent of 0 leaves SFT's weight; "changed" says how many tokens were down-weighted
        return token_loss(batch, nll, weight, changed=weight < 1, floored_frac=(probability < self.floor).to(nll.dtype))
