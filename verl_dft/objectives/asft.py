"""Anchored SFT (ASFT): DFT plus a penalty on leaving the reference policy."""

from dataclasses import dataclass

import torch
from torch import Tensor

from verl_dft.objectives.batch import TokenBatch, TokenLoss, token_loss
from verl_dft.objectives.options import check_choice, check_range

MAX_LOG_RATIO = 20.0
"""Log-ratios above this are held there, which keeps the exponential finite; verl's KL estimators do the same."""


@dataclass(frozen=True)
class ASFT:
    r"""DFT's loss plus a weighted divergence from a frozen reference.

    .. math::
        \ell_t = -\,\mathrm{sg}[w_t] \log \pi_\theta(y_t \mid x, y_{<t}) + \lambda D_t

    with :math:`w_t = \pi_\theta(y_t \mid x, y_{<t})` (``weight=dft``) or 1 (``weight=sft``, the authors' ``sft+kl``).
    Reads ``logp``, ``mask`` and what D needs.

    ``kl=full``: :math:`D_t = \sum_v \pi_{\text{ref}}(v) \log(\pi_{\text{ref}}(v) / \pi_\theta(v))`, which is
    KL(ref || theta) over the vocabulary at that position, with its gradient. Needs ``ref_kl``.

    ``kl=k3``: :math:`D_t = e^{d} - 1 - d` with :math:`d = \log \pi_{\text{ref}}(y_t) - \log \pi_\theta(y_t)`; it needs
    the target's log-probs only. Needs ``ref_logp``. For tokens drawn from theta its value estimates KL(theta || ref),
    and its gradient, :math:`(1 - \pi_{\text{ref}}/\pi_\theta) \nabla \log \pi_\theta`, has the full term's gradient,
    that of KL(ref || theta), as its mean. For other text it is no estimate of either, only a penalty that is least,
    and 0, at theta = ref; so lambda does not carry over from ``full``. The other direction would have the gradient
    :math:`(\pi_\theta/\pi_{\text{ref}} - 1) \nabla \log \pi_\theta`, without bound exactly where fine-tuning raises a
    rare token; this one is at most 1 there.

    ``token_weight`` is all that multiplies the gradient of the nll, so under ``k3`` it includes the penalty's share.

    Limits: ``kl_weight=0`` is DFT (or SFT); theta = ref has D = 0, and under both kinds no gradient of D.
    Differs from the authors' code: that averages over each micro-batch's tokens; reduction here is the trainer's.

    References:
      Zhu et al., `Anchored Supervised Fine-Tuning <https://arxiv.org/abs/2509.23753>`_, 2025; ``train_v2.py`` of
      zhuchichi56/ASFT; NVIDIA-NeMo/RL pull request 3302 (k3 of the target token).
    """

    kl_weight: float = 0.05
    """lambda, dimensionless, >= 0. 0.05 in the authors' README and maths example, 0.1 in their command's default."""
    kl: str = "full"
    """``full`` (the paper) or ``k3`` (the target token only; needs no reference logits)."""
    weight: str = "dft"
    """``dft`` (the paper) or ``sft`` (the authors' mode ``sft+kl``)."""

    def __post_init__(self) -> None:
        check_range("kl_weight", self.kl_weight, hint="lambda; 0.05 is the authors' README, 0 is DFT")
        check_choice("kl", self.kl, ("full", "k3"))
        check_choice("weight", self.weight, ("dft", "sft"))

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"ref_kl" if self.kl == "full" else "ref_logp"})

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        logp = batch.trained(batch.logp)
        weight = torch.exp(logp.detach()) if self.weight == "dft" else torch.ones_like(logp)
        if self.kl == "full":
            kl, share = batch.ref_kl, torch.zeros_like(weight)
        else:
            kl, share = _k3(logp, batch.ref_logp)
        total = weight + self.kl_weight * share
        loss = -weight * logp + self.kl_weight * kl
        return token_loss(batch, -logp, total, changed=total != 1, loss=loss, ref_kl=kl)


def _k3(logp: Tensor, ref_logp: Tensor) -> tuple[Tensor, Tensor]:
    """The estimator [N], with grad, and its derivative with respect to the nll [N], ref/theta - 1."""
    d = ref_logp - logp
    held = d.clamp(max=MAX_LOG_RATIO)
    share = torch.where(d > MAX_LOG_RATIO, torch.zeros_like(d), torch.expm1(held))
    return torch.expm1(held) - held, share
