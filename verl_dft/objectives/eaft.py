"""Entropy-adaptive fine-tuning (EAFT): SFT weighted by how undecided the model is."""

from dataclasses import dataclass
from typing import ClassVar

from verl_dft.errors import InputError
from verl_dft.objectives.batch import TokenBatch, TokenLoss, token_loss
from verl_dft.objectives.options import check_range


@dataclass(frozen=True)
class EAFT:
    r"""Negative log-likelihood, each token weighted by the entropy of the distribution it was picked from.

    .. math::
        \ell_t = -\,\mathrm{sg}\!\left[(H_t / \text{scale})^{\alpha}\right] \log \pi_\theta(y_t \mid x, y_{<t})

    with :math:`H_t` the entropy in nats of :math:`\pi_\theta(\cdot \mid x, y_{<t})`. Reads ``logp``, ``mask`` and
    ``entropy``. A token that the model is sure is something else, p near 0 at a low entropy, is hardly trained on.

    Limits: ``alpha=0`` is SFT; H = scale has SFT's weight.
    Differs from other code: the entropy is the full vocabulary's; LLaMA-Factory has the entropy of the 20 most likely
    tokens, renormalised, over 3 (about ln 20, its maximum), and axolotl an unscaled one.

    References:
      `Entropy-Adaptive Fine-Tuning <https://arxiv.org/abs/2601.02151>`_, 2026; ``eaft_loss_func`` in
      ``src/llamafactory/train/trainer_utils.py`` of hiyouga/LLaMA-Factory.
    """

    alpha: float = 1.0
    """Exponent of the weight, dimensionless, >= 0: 1 is the authors' default, 0 is SFT."""
    scale: float = 3.0
    """Entropy, in nats and above 0, that has weight 1: 3 is LLaMA-Factory's, 1 is axolotl's."""

    requires: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, hint="0 is SFT, 1 is the authors' default")
        check_range("scale", self.scale, hint="nats; 3 is LLaMA-Factory's")
        if self.scale == 0:
            raise InputError("objective.scale must be above 0 (nats; 3 is LLaMA-Factory's), got 0")

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        # rounding can leave a certain token an entropy just below 0, of which a power is NaN
        entropy = batch.entropy.detach().clamp(min=0)
        weight = (entropy / self.scale) ** self.alpha
        return token_loss(batch, -batch.logp, weight, changed=weight != 1, entropy=entropy)
