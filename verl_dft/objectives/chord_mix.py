"""CHORD's two losses, each in its rows: GRPO's on the policy's own responses, weighted SFT on demonstrations."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from verl_dft.objectives.batch import TokenBatch, TokenLoss, token_loss
from verl_dft.objectives.options import check_range, check_switch
from verl_dft.objectives.psft import clipped_surrogate
from verl_dft.origins import ORIGINS

OWN = ORIGINS.index("self")


@dataclass(frozen=True)
class CHORDMix:
    r"""Policy gradient on the policy's own responses and supervised learning on those that others wrote.

    .. math::
        \ell_t = \begin{cases}
            -\min\!\left(r_t A_t,\ \mathrm{clip}(r_t, 1 - \epsilon_{\text{low}}, 1 + \epsilon_{\text{high}}) A_t\right)
                & \text{the policy's own} \\
            -\,\mathrm{sg}[\phi_t] \log p_t & \text{written by another}
        \end{cases}

    with :math:`p_t = \pi_\theta(y_t \mid x, y_{<t})`, :math:`r_t = p_t / \pi_{\text{old}}(y_t \mid x, y_{<t})` and
    :math:`\phi_t = p_t (1 - p_t)`, or 1. Reads ``logp``, ``mask``, ``advantage``, ``old_logp`` and ``origin``. Own rows
    are those of origin ``self``; others' advantages are not used.

    The mix itself, (1 - mu) times the mean over own tokens plus mu times the mean over others', with mu on a schedule,
    is a matter of the batch: ``verl-dft rl algorithm=chord`` weighs the rows so. Without it all tokens count the same.

    Limits: own rows alone are PSFT's loss with advantages; others' are ``chord``, or SFT with ``phi=false``.
    Differs from the authors' code: there the demonstrations come from a data set and a batch of their own; in
    ``verl-dft rl`` they answer the problems that the policy answers in the same step.

    References:
      Zhang et al., `On-Policy RL Meets Off-Policy Experts <https://arxiv.org/abs/2508.11408>`_, 2025;
      ``trinity/algorithm/policy_loss_fn/chord_policy_loss.py`` of modelscope/Trinity-RFT.
    """

    phi: bool = True
    """Weight others' tokens by p (1 - p): true is CHORD-phi, false is CHORD-mu (plain SFT)."""
    eps_low: float = 0.2
    """Lower clip of own rows, dimensionless, in [0, 1]: 0.2 is PPO's, 1 is off. Acts on negative advantages."""
    eps_high: float = 0.2
    """Upper clip of own rows, dimensionless, >= 0: 0.2 is PPO's, inf is off. Acts on positive advantages."""

    requires: ClassVar[frozenset[str]] = frozenset({"advantage", "old_logp", "origin"})

    def __post_init__(self) -> None:
        check_switch("phi", self.phi)
        check_range("eps_low", self.eps_low, high=1.0, hint="0.2 is PPO's, 1 is off")
        check_range("eps_high", self.eps_high, hint="0.2 is PPO's, inf is off")

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        logp, own, advantage = batch.trained(batch.logp), batch.origin == OWN, batch.advantage
        gain, own_weight, clipped, _ = clipped_surrogate(logp - batch.old_logp, advantage, self.eps_low, self.eps_high)
        phi = -(torch.exp(logp) * torch.expm1(logp)).detach() if self.phi else torch.ones_like(logp)
        weight = torch.where(own, own_weight, phi)
        return token_loss(
            batch,
            -logp,
            weight,
            changed=weight != 1,
            loss=-torch.where(own, gain, phi * logp),
            clipped_frac=clipped & own,
            others_frac=~own,
        )
