"""LUFFY: GRPO's clipped loss on the policy's own responses, and a shaped one on those that others wrote."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from verl_dft.objectives.batch import TokenBatch, TokenLoss, token_loss
from verl_dft.objectives.options import check_range
from verl_dft.objectives.psft import clipped_surrogate
from verl_dft.origins import ORIGINS

OWN = ORIGINS.index("self")


@dataclass(frozen=True)
class LUFFY:
    r"""Policy gradient over a group in which some responses are demonstrations.

    .. math::
        \ell_t = \begin{cases}
            -\min\!\left(r_t A_t,\ \mathrm{clip}(r_t, 1 - \epsilon_{\text{low}}, 1 + \epsilon_{\text{high}}) A_t\right)
                & \text{the policy's own} \\
            -A_t\, \frac{p_t}{p_t + \gamma} & \text{written by another}
        \end{cases}

    with :math:`p_t = \pi_\theta(y_t \mid x, y_{<t})` and :math:`r_t = p_t / \pi_{\text{old}}(y_t \mid x, y_{<t})`.
    Reads ``logp``, ``mask``, ``advantage``, ``old_logp`` and ``origin``. Own rows are those of origin ``self``; a
    ``guided`` row was sampled with the solution in the prompt and counts as another's.

    For another's text the importance ratio is p over 1, as if its writer had been certain. Shaping it moves the
    gradient to rare tokens: it is :math:`-A \frac{\gamma p}{(p + \gamma)^2} \nabla \log p`, largest at p = gamma,
    instead of :math:`-A p \nabla \log p`. There is no clip there. ``token_weight`` is the factor of
    :math:`-\nabla \log p` in either kind of row.

    Limits: own rows alone are PSFT's loss with advantages; ``gamma=null`` on others' rows with A = 1 has DFT's
    gradient. One update per step has r = 1, and nothing is clipped.
    Differs from the authors' code: their run script takes the clip out for own rows too (``eps_low=1``,
    ``eps_high=inf``), sums tokens over a constant length, and does not divide advantages by their deviation; the
    group's mean there may be taken over own rows only, where the paper has the whole group. Reduction and advantages
    are the trainer's here.

    References:
      Yan et al., `Learning to Reason under Off-Policy Guidance <https://arxiv.org/abs/2504.14945>`_, 2025;
      ``compute_token_on_off_policy_loss`` in ``luffy/verl/verl/mix_src/mix_core_alg.py`` of ElliottYan/LUFFY.
    """

    gamma: float | None = 0.1
    """Shaping of others' rows, a probability above 0: 0.1 is the paper; null is off, A p."""
    eps_low: float = 0.2
    """Lower clip of own rows, dimensionless, in [0, 1]: 0.2 is PPO's, 1 is off. Acts on negative advantages."""
    eps_high: float = 0.2
    """Upper clip of own rows, dimensionless, >= 0: 0.2 is PPO's, inf is off. Acts on positive advantages."""

    requires: ClassVar[frozenset[str]] = frozenset({"advantage", "old_logp", "origin"})

    def __post_init__(self) -> None:
        if self.gamma is not None:
            check_range("gamma", self.gamma, low=1e-6, hint="0.1 is the paper, null is off")
        check_range("eps_low", self.eps_low, high=1.0, hint="0.2 is PPO's, 1 is off")
        check_range("eps_high", self.eps_high, hint="0.2 is PPO's, inf is off")

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        logp, own, advantage = batch.trained(batch.logp), batch.origin == OWN, batch.advantage
        gain, own_weight, clipped, _ = clipped_surrogate(logp - batch.old_logp, advantage, self.eps_low, self.eps_high)
        p = torch.exp(logp)
        shaped = slope = p
        if self.gamma is not None:
            shaped, slope = p / (p + self.gamma), self.gamma * p / (p + self.gamma) ** 2
        weight = torch.where(own, own_weight, slope * advantage)
        return token_loss(
            batch,
            -logp,
            weight,
            changed=weight != 1,
            loss=-torch.where(own, gain, shaped * advantage),
            clipped_frac=clipped & own,
            others_frac=~own,
            advantage=advantage,
        )
