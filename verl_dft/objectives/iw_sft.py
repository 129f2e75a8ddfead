"""Importance-weighted SFT (iw-SFT): SFT weighted by how far the policy has moved from a reference."""

from dataclasses import dataclass

import torch

from verl_dft.errors import InputError
from verl_dft.objectives.batch import TokenBatch, TokenLoss, token_loss
from verl_dft.objectives.options import check_choice, check_range

CLAMPS = {"sequence": (0.0, 16.0), "token": (0.2, 1.8)}
"""Bounds of the weight in the authors' code, by level."""


@dataclass(frozen=True)
class IWSFT:
    r"""Negative log-likelihood, weighted by a power of the likelihood ratio to a reference policy.

    .. math::
        \ell_t = -\,\mathrm{sg}\!\left[\mathrm{clamp}(e^{\text{temperature} \cdot d})\right]
                 \log \pi_\theta(y_t \mid x, y_{<t}), \qquad
        d = \frac{1}{|y|} \sum_s \log \frac{q(y_s \mid x, y_{<s})}{\pi_{\text{ref}}(y_s \mid x, y_{<s})}

    with the mean over the response's trained tokens (``level=sequence``), or d the token's own log-ratio
    (``level=token``). q is the policy itself or its moving average. Reads ``logp``, ``mask`` and ``ref_logp``;
    ``policy=ema`` also ``ema_logp``.

    Limits: q = ref is SFT, so the first step of a run is; ``temperature=0`` is SFT (between bounds that contain 1).
    Differs from the authors' code: there the weight of a response multiplies a whole micro-batch wrongly unless it
    has one row; here it is spread over the response's own tokens. Theirs has no temperature at the token level
    (1 here is that). Averaging weights in time (``policy=ema``) is in their control experiments only.

    References:
      Qin and Springenberg, `Supervised Fine Tuning on Curated Data is Reinforcement Learning (and can be improved)
      <https://arxiv.org/abs/2507.12856>`_, 2025; ``bounding_trainers.py`` of emmyqin/iw_sft, ``main.py`` of
      emmyqin/iw_sft_control.
    """

    level: str = "sequence"
    """``sequence`` (the authors' runs) or ``token`` (their variant without a sum over time)."""
    temperature: float = 1.0
    """Exponent of the ratio, dimensionless, >= 0: 1 in the authors' language runs, 10 in their control runs."""
    clamp_min: float | None = None
    """Smallest weight, >= 0; null is the authors' value for the level (0 for sequence, 0.2 for token)."""
    clamp_max: float | None = None
    """Largest weight; null is the authors' value for the level (16 for sequence, 1.8 for token); inf is off."""
    policy: str = "current"
    """The ratio's numerator: ``current`` (language runs) or ``ema``, the policy's moving average (control runs)."""
    ema_decay: float = 0.9
    """Share of the old average kept at each step with ``policy=ema``, in [0, 1]: 0.9 in the authors' control runs."""

    def __post_init__(self) -> None:
        check_choice("level", self.level, ("sequence", "token"))
        check_range("temperature", self.temperature, hint="1 is the authors' value, 0 is SFT")
        for name in ("clamp_min", "clamp_max"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), hint="null is the authors' value for the level")
        low, high = self.clamp
        if low > high:
            raise InputError(
                f"objective.clamp_min={low} is above objective.clamp_max={high}; lower the one or raise the other"
            )
        check_choice("policy", self.policy, ("current", "ema"))
        check_range("ema_decay", self.ema_decay, high=1.0, hint="0.9 is the authors' value, 0 is the policy itself")

    @property
    def clamp(self) -> tuple[float, float]:
        """Bounds of the weight."""
        low, high = CLAMPS[self.level]
        return low if self.clamp_min is None else self.clamp_min, high if self.clamp_max is None else self.clamp_max

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"ref_logp"} | ({"ema_logp"} if self.policy == "ema" else set()))

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        numerator = batch.ema_logp if self.policy == "ema" else batch.logp.detach()
        log_ratio = numerator - batch.ref_logp
        if self.level == "sequence":
            log_ratio = batch.to_tokens(batch.sequence_mean(log_ratio))
        ratio = torch.exp(self.temperature * log_ratio)
        weight = ratio.clamp(*self.clamp)
        return token_loss(
            batch, -batch.logp, weight, changed=weight != 1, log_ratio=log_ratio, clipped_frac=weight != ratio
        )
