"""Focal loss: SFT that looks away from what the model already knows, the opposite of DFT."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from verl_dft.objectives.batch import TokenBatch, TokenLoss, token_loss
from verl_dft.objectives.options import check_range, check_switch


@dataclass(frozen=True)
class Focal:
    r"""Negative log-likelihood, each token weighted by how far it is from certain.

    .. math::
        \ell_t = -(1 - p_t)^{\gamma} \log p_t, \qquad p_t = \pi_\theta(y_t \mid x, y_{<t})

    Reads ``logp`` and ``mask``. By default the gradient passes through the weight, as in Lin et al.:
    :math:`-\left[(1 - p)^{\gamma} - \gamma p (1 - p)^{\gamma - 1} \log p\right] \nabla \log p`; the bracket is reported
    as ``token_weight``. ``stop_gradient`` holds the weight constant, which makes it DFT's mirror image: DFT multiplies
    SFT's gradient by p, this by :math:`(1 - p)^{\gamma}`; at gamma = 1 the two add up to SFT.

    Limits: ``gamma=0`` is SFT.

    References:
      Lin et al., `Focal Loss for Dense Object Detection <https://arxiv.org/abs/1708.02002>`_, 2017, Eq. 4;
      Wu et al., `On the Generalization of SFT <https://arxiv.org/abs/2508.05629>`_, 2025, end of Section 2.
    """

    gamma: float = 2.0
    """Exponent of 1 - p, dimensionless, >= 0: 2 is Lin et al.'s best, 0 is SFT."""
    stop_gradient: bool = False
    """Whether the weight is a constant to the gradient: false is Lin et al., true is the mirror image of DFT."""

    requires: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, hint="0 is SFT, 2 is Lin et al.'s")
        check_switch("stop_gradient", self.stop_gradient)

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        logp = batch.trained(batch.logp)
        # not 0, where a power below 1 has an infinite slope and 0 * inf would be NaN
        miss = (-torch.expm1(logp)).clamp(min=torch.finfo(logp.dtype).tiny)
        modulator = weight = miss**self.gamma
        if self.stop_gradient:
            modulator = modulator.detach()
        else:  # the product rule's other term
            weight = modulator - self.gamma * miss ** (self.gamma - 1) * torch.exp(logp) * logp
        return token_loss(batch, -logp, weight, changed=weight != 1, loss=-modulator * logp)
