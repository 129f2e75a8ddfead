"""Dynamic fine-tuning (DFT): SFT with each token weighted by its own probability."""

import math
from dataclasses import dataclass

import torch

from verl_dft.errors import InputError
from verl_dft.objectives.batch import TokenBatch, TokenLoss, token_loss
from verl_dft.objectives.options import check_level, check_range


@dataclass(frozen=True)
class DFT:
    r"""Negative log-likelihood, weighted by the probability of the token or of the whole response.

    .. math::
        \ell_t = -\,\mathrm{sg}\!\left[\max(\pi, \text{floor})^{\alpha}\right]
                 \log \pi_\theta(y_t \mid x, y_{<t})

    where sg stops the gradient and :math:`\pi` is :math:`\pi_\theta(y_t \mid x, y_{<t})` (``level=token``, Eq. 9) or
    :math:`\pi_\theta(y \mid x) = \prod_t \pi_\theta(y_t \mid x, y_{<t})` over the trained tokens (``level=sequence``,
    Eq. 7). Reads ``logp`` and ``mask``, and ``exempt`` where tokens are exempt.

    Limits: ``alpha=0`` is SFT; ``floor=1`` is SFT; ``alpha=1, floor=0`` is the paper. A response of one token has the
    same loss at both levels.
    Exempt tokens get weight 1, and are left out of the response's probability at the sequence level: a token that the
    model gives p = 0, such as an end-of-turn token that was added to the vocabulary, has weight 0 and is never
    learned otherwise (issue 10 of the authors' repository).
    Differs from the authors' code: their ``raft_scale`` loss has ``floor=0.1``, which the paper does not mention; the
    sequence level is in the paper only, as a step to Eq. 9.

    References:
      Wu et al., `On the Generalization of SFT <https://arxiv.org/abs/2508.05629>`_, 2025, Eqs. 7 and 9.
    """

    alpha: float = 1.0
    """Exponent of the probability weight, dimensionless, >= 0. Ours: the paper has 1."""
    floor: float = 0.0
    """Smallest probability used as a weight, in [0, 1]. The paper has 0; the authors' ``raft_scale`` has 0.1."""
    level: str = "token"
    """``token`` (Eq. 9, the paper's final loss) or ``sequence`` (Eq. 7)."""
    length_normalized: bool = False
    """At the sequence level, the geometric mean of the token probabilities. Ours: Eq. 7 has the product."""
    exempt_tokens: tuple[str | int, ...] = ()
    """Tokens with weight 1: ids, literal tokens, ``end_of_turn`` or ``added``. Ours: the paper exempts none."""

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, hint="0 is SFT, 1 is DFT")
        check_range("floor", self.floor, high=1.0, hint="a probability; 0 is the paper")
        check_level(self.level, self.length_normalized)
        tokens = self.exempt_tokens
        if not isinstance(tokens, list | tuple) or not all(type(token) in (str, int) for token in tokens):
            raise InputError(
                f"objective.exempt_tokens must be a list of tokens or ids, e.g. [end_of_turn], got {tokens!r}"
            )
        object.__setattr__(self, "exempt_tokens", tuple(tokens))  # a config gives a list

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"exempt"}) if self.exempt_tokens else frozenset()

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        exempt = batch.exempt if self.exempt_tokens else torch.zeros_like(batch.mask)
        log_p = batch.logp.detach()
        if self.level == "sequence":
            per_sequence = batch.sequence_mean if self.length_normalized else batch.sequence_sum
            log_p = batch.to_tokens(per_sequence(log_p, over=batch.mask & ~exempt))
        log_floor = math.log(self.floor) if self.floor else -math.inf
        # in log space: a response's probability underflows long before a small power of it does
        weight = torch.exp(self.alpha * log_p.clamp(min=log_floor))
        weight = torch.where(exempt, torch.ones_like(weight), weight)
        return token_loss(
            batch,
            -batch.logp,
            weight,
            changed=weight != 1,
            floored_frac=(log_p < log_floor) & ~exempt,
            exempt_frac=exempt,
        )
