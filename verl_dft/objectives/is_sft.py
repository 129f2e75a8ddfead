"""Importance-sampled SFT: data rewriting's loss, SFT weighted by the policy's probability over the sampler's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from verl_dft.objectives.batch import TokenBatch, TokenLoss, token_loss
from verl_dft.objectives.options import check_choice, check_range
from verl_dft.origins import ORIGINS

STORED = {"one": (), "self": ("self",), "all": ("self", "guided")}
"""``behavior`` -> the origins whose stored log-probs divide the weight."""


@dataclass(frozen=True)
class ISSFT:
    r"""Negative log-likelihood, each token weighted by an importance weight.

    .. math::
        \ell_t = -\,\mathrm{sg}\!\left[\min\!\left(\frac{\pi_\theta(y_t \mid x, y_{<t})}{b_t},
                 \text{clip}\right)\right] \log \pi_\theta(y_t \mid x, y_{<t})

    where :math:`b_t` is the probability that the policy which wrote the text gave the token, or 1 where that is not
    known or not asked for. Reads ``logp`` and ``mask``; ``behavior`` other than ``one`` also ``behavior_logp`` and
    ``origin``.

    Limits: ``behavior=one`` is DFT, the paper's approximation; b = pi_theta (text just sampled) is SFT on its rows.
    Expert and teacher rows always have b = 1. Guided rows were sampled with the reference solution in the prompt, so
    their stored log-probs are of another context; only ``behavior=all`` uses them. A token without a stored value
    (NaN) has b = 1 and counts in ``unknown_frac``.
    Differs from the paper: Eq. 5's exact weight is available for sampled rows, at the token level as in DFT; the
    authors' released trainer is DFT's, with b = 1 throughout.

    References:
      Mind the Gap: data rewriting for off-policy SFT, 2025, Eq. 5 and Section 3.3; NKU-HLT/Off-Policy-SFT.
    """

    behavior: str = "one"
    """Whose stored log-probs to divide by: ``one`` (nobody's: the paper), ``self`` or ``all`` (self and guided)."""
    clip: float | None = None
    """Largest weight, >= 0; null is off, as in the paper."""

    def __post_init__(self) -> None:
        check_choice("behavior", self.behavior, tuple(STORED))
        if self.clip is not None:
            check_range("clip", self.clip, hint="the largest weight; null is off")

    @property
    def requires(self) -> frozenset[str]:
        return frozenset() if self.behavior == "one" else frozenset({"behavior_logp", "origin"})

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        log_weight = batch.logp.detach()
        shares: dict[str, Tensor] = {}
        if self.behavior != "one":
            wanted = torch.zeros_like(batch.mask)
            for index, origin in enumerate(ORIGINS):
                shares[f"{origin}_frac"] = batch.origin == index
                if origin in STORED[self.behavior]:
                    wanted = wanted | (batch.origin == index)
            known = ~torch.isnan(batch.behavior_logp)
            log_weight = torch.where(wanted & known, log_weight - batch.behavior_logp, log_weight)
            shares |= {"stored_frac": wanted & known, "unknown_frac": wanted & ~known}
        ratio = torch.exp(log_weight)
        weight = ratio if self.clip is None else ratio.clamp(max=self.clip)
        return token_loss(batch, -batch.logp, weight, changed=weight != 1, clipped_frac=weight != ratio, **shares)
