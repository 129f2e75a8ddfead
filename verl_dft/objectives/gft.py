"""Group fine-tuning (GFT): group advantages times a rectified coefficient."""

from dataclasses import dataclass

import torch

from verl_dft.objectives.batch import TokenBatch, TokenLoss, token_loss
from verl_dft.objectives.options import check_level, check_range, check_switch


@dataclass(frozen=True)
class GFT:
    r"""Negative log-likelihood, weighted by the response's advantage in its group and by DFT's weight where unsure.

    .. math::
        \ell_t = -A\, C(\pi) \log \pi_\theta(y_t \mid x, y_{<t}), \qquad
        C(\pi) = \begin{cases} \mathrm{sg}[\pi] & \pi < \tau \\ 1 & \pi \ge \tau \end{cases}

    where :math:`\pi` is the token's probability (``level=token``, Eq. 21) or the whole response's over its trained
    tokens (``level=sequence``, Eq. 16). Reads ``logp``, ``mask`` and, unless ``no_gal``, ``advantage``.

    The gradient is :math:`-A\, C(\pi) \nabla \log \pi_\theta`. The paper's Eqs. 6, 17 and 22 print
    :math:`A\, (C/\pi) \nabla \log \pi_\theta` instead, with one :math:`1/\pi` too many and the other sign; that is the
    gradient of no loss in the paper. This is the loss of Eqs. 16 and 21, as in the authors' code.

    Limits: ``tau=0`` with A = 1 is SFT; ``tau`` above 1 with A = 1 is DFT; ``no_dcr`` is ``tau=0``.
    ``no_gal`` sets A = 1 and is meant for expert rows alone; ``no_gal`` with ``no_dcr`` is SFT.
    Differs from the authors' code: ``tau`` is 0.1 in its script and 0.5 in its function, around 0.7 is the paper's
    best; it compares with > (``strict``); its coefficient is per token only.

    References:
      GFT: From Imitation to Reward Fine-Tuning, `arXiv 2604.14258 <https://arxiv.org/abs/2604.14258>`_, 2026, Eqs. 5,
      16 and 21; ``compute_gft_loss`` in ``verl/trainer/ppo/core_algos.py`` of ZJU-OmniAI/GFT.
    """

    tau: float = 0.7
    """Probability from which a token keeps SFT's weight, >= 0: 0.7 in the paper, 0.1 in the authors' script."""
    strict: bool = False
    """Compare with > instead of >=: false is the paper (Eq. 5), true the authors' code."""
    level: str = "token"
    """``token`` (Eq. 21, the authors' code) or ``sequence`` (Eq. 16)."""
    length_normalized: bool = False
    """At the sequence level, the geometric mean of the token probabilities. Ours: Eq. 16 has the product."""
    no_dcr: bool = False
    """Ablation without dynamic coefficient rectification: C = 1."""
    no_gal: bool = False
    """Ablation without group advantage learning: A = 1; train it on expert rows alone."""

    def __post_init__(self) -> None:
        check_range("tau", self.tau, hint="0.7 is the paper, 0 is off, above 1 is DFT's weight throughout")
        check_level(self.level, self.length_normalized)
        for name in ("strict", "no_dcr", "no_gal"):
            check_switch(name, getattr(self, name))

    @property
    def requires(self) -> frozenset[str]:
        return frozenset() if self.no_gal else frozenset({"advantage"})

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        log_p = batch.logp.detach()
        advantage = torch.ones_like(log_p) if self.no_gal else batch.advantage
        if self.level == "sequence":
            per_sequence = batch.sequence_mean if self.length_normalized else batch.sequence_sum
            log_p = batch.to_tokens(per_sequence(log_p))
        p = torch.exp(log_p)
        rectified = p <= self.tau if self.strict else p < self.tau
        if self.no_dcr:
            rectified = torch.zeros_like(rectified)
        weight = advantage * torch.where(rectified, p, torch.ones_like(p))
        return token_loss(
            batch,
            -batch.logp,
            weight,
            changed=weight != 1,
            rectified_frac=rectified,
            advantage=advantage,
            zero_advantage_frac=advantage == 0,
        )
