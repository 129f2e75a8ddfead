"""Proximal SFT (PSFT): SFT as a clipped policy-gradient step from the policy at the start of the batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from verl_dft.objectives.batch import TokenBatch, TokenLoss, token_loss
from verl_dft.objectives.options import check_range, check_switch

MAX_LOG_RATIO = 20.0
"""Log-ratios are held within this of 0, as in verl's and the authors' code: it keeps the exponential finite."""


@dataclass(frozen=True)
class PSFT:
    r"""PPO's clipped surrogate with every demonstrated token an action of advantage 1.

    .. math::
        \ell_t = -\min\!\left(r_t A_t,\ \mathrm{clip}(r_t, 1 - \epsilon_{\text{low}},
                 1 + \epsilon_{\text{high}}) A_t\right), \qquad
        r_t = \frac{\pi_\theta(y_t \mid x, y_{<t})}{\pi_{\text{old}}(y_t \mid x, y_{<t})}

    with A = 1. Reads ``logp``, ``mask`` and ``old_logp``; ``use_advantage`` also ``advantage``. The gradient is
    :math:`-r_t A_t \nabla \log \pi_\theta`, or 0 where clipped; that factor is reported as ``token_weight``. A token
    whose probability has risen by more than ``eps_high`` since the batch began is no longer trained on.

    Limits: theta = old has SFT's gradient (its value is -1 per token), so one update per batch is SFT;
    ``eps_high=inf`` never clips, and with A = 1 ``eps_low`` is then without effect at any value.
    With A = 1 only the upper clip acts: below 1 - eps_low the unclipped term is the smaller one.
    Differs from the authors' code: their dual clip (``clip_c=10``) acts on negative advantages only, and is left out.
    Their responses have no end token; ours keep it.

    References:
      Zhu et al., `Proximal Supervised Fine-Tuning <https://arxiv.org/abs/2508.17784>`_, 2025; ``recipe/psft`` of
      zwhong714/PSFT.
    """

    eps_low: float = 0.2
    """Lower clip, dimensionless, in [0, 1]: 0.2 in the authors' run script. Acts only on negative advantages."""
    eps_high: float = 0.28
    """Upper clip, dimensionless, >= 0: 0.28 in the authors' run script; inf is off."""
    use_advantage: bool = False
    """Weight tokens by the batch's advantages (the online trainer has them); false is the paper, A = 1."""

    def __post_init__(self) -> None:
        check_range("eps_low", self.eps_low, high=1.0, hint="0.2 is the authors' value")
        check_range("eps_high", self.eps_high, hint="0.28 is the authors' value, inf is off")
        check_switch("use_advantage", self.use_advantage)

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"old_logp"} | ({"advantage"} if self.use_advantage else set()))

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        logp = batch.trained(batch.logp)
        advantage = batch.advantage if self.use_advantage else torch.ones_like(logp)
        gain, weight, clipped, ratio = clipped_surrogate(logp - batch.old_logp, advantage, self.eps_low, self.eps_high)
        return token_loss(batch, -logp, weight, changed=weight != 1, loss=-gain, clipped_frac=clipped, ratio=ratio)


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, eps_low: float, eps_high: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """PPO's objective, to be raised: ``min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)``.

    Args:
        log_ratio: [N] nats, with grad.
        advantage: [N] dimensionless.

    Returns:
        [N] each: the objective with its grad, what multiplies the gradient of the log-prob in it, bool whether clipped,
        and the ratio.
    """
    ratio = torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    bounded = ratio.clamp(1 - eps_low, 1 + eps_high)
    clipped = bounded * advantage < ratio * advantage
    gain = torch.where(clipped, bounded, ratio) * advantage
    moving = ~clipped & (log_ratio.abs() <= MAX_LOG_RATIO)
    return gain, torch.where(moving, ratio * advantage, torch.zeros_like(ratio)), clipped, ratio
