"""What an objective reads and returns: flat, unpadded tensors of per-token log-probabilities."""

from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

OPTIONAL_FIELDS = (
    "advantage",
    "ref_logp",
    "old_logp",
    "behavior_logp",
    "ema_logp",
    "entropy",
    "ref_kl",
    "origin",
    "exempt",
)
"""The fields of :class:`TokenBatch` that an objective may list in ``requires``."""


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch: N tokens of B sequences laid end to end, prompt and response alike, without padding."""

    logp: Tensor
    """[N] float32, nats, log pi_theta(y_t | x, y_<t), with grad. Undefined (0 from the trainer) outside ``mask``."""
    mask: Tensor
    """[N] bool, the tokens that are trained on."""
    seq: Tensor
    """[N] int64 in [0, num_seqs), the sequence each token belongs to."""
    num_seqs: int
    """B, the number of sequences (a sequence may have no trained token)."""
    advantage: Tensor | None = None
    """[N] float32, dimensionless; constant over a sequence offline, per token under PPO."""
    ref_logp: Tensor | None = None
    """[N] float32, nats, the frozen reference policy."""
    old_logp: Tensor | None = None
    """[N] float32, nats, the policy at the start of the current batch."""
    behavior_logp: Tensor | None = None
    """[N] float32, nats, the policy that wrote the text; NaN where unknown."""
    ema_logp: Tensor | None = None
    """[N] float32, nats, the exponential moving average of the policy's weights, after the previous step."""
    entropy: Tensor | None = None
    """[N] float32, nats, of the next-token distribution."""
    ref_kl: Tensor | None = None
    """[N] float32, nats, KL(reference || policy) over the full vocabulary, with grad."""
    origin: Tensor | None = None
    """[N] int64, who wrote the sequence: an index into :data:`verl_dft.origins.ORIGINS`."""
    exempt: Tensor | None = None
    """[N] bool, tokens named by the objective's ``exempt_tokens`` (see :class:`verl_dft.objectives.dft.DFT`)."""

    def trained(self, x: Tensor) -> Tensor:
        """``x`` [N] at the trained tokens, 0 elsewhere: whatever is there enters no value and no gradient."""
        # torch.where, not a product: 0 * inf would be NaN, in value and gradient.
        return torch.where(self.mask, x, torch.zeros_like(x))

    def sequence_sum(self, x: Tensor, over: Tensor | None = None) -> Tensor:
        """Sum of ``x`` [N] over the trained tokens of each sequence, or over ``over`` [N] bool: [B]."""
        chosen = torch.where(self.mask if over is None else over, x, torch.zeros_like(x))
        return torch.zeros(self.num_seqs, dtype=x.dtype, device=x.device).index_add(0, self.seq, chosen)

    def sequence_mean(self, x: Tensor, over: Tensor | None = None) -> Tensor:
        """Mean of ``x`` [N] over the same tokens as :meth:`sequence_sum`: [B]; 0 for a sequence without one."""
        count = self.sequence_sum(torch.ones_like(x), over)
        return self.sequence_sum(x, over) / count.clamp(min=1)

    def to_tokens(self, per_sequence: Tensor) -> Tensor:
        """Spread a per-sequence value [B] over the tokens: [N]."""
        return per_sequence[self.seq]


@dataclass(frozen=True)
class TokenLoss:
    """What an objective returns: the loss of each token, unreduced, and what is worth logging."""

    loss: Tensor
    """[N] float32, unreduced; exactly 0 where not ``mask``."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Name -> [N] (averaged over the trained tokens of the global batch) or scalar, detached."""


@runtime_checkable
class Objective(Protocol):
    """A pure function of a :class:`TokenBatch`; it never sees padding, ranks, configs or reductions."""

    requires: ClassVar[frozenset[str]]
    """Which of :data:`OPTIONAL_FIELDS` must be present; a property where it depends on the options."""

    def __call__(self, batch: TokenBatch) -> TokenLoss: ...


def token_loss(
    batch: TokenBatch, nll: Tensor, weight: Tensor, changed: Tensor, *, loss: Tensor | None = None, **extra: Tensor
) -> TokenLoss:
    """The loss ``weight * nll`` on the trained tokens, with the metrics every objective reports.

    Args:
        batch: the micro-batch.
        nll: [N] -log pi_theta, with grad.
        weight: [N] what multiplies the gradient of ``nll``; without ``loss``, the caller has stopped its gradient.
        changed: [N] bool, tokens whose weight differs from SFT's 1 for a reason of the objective's.
        loss: [N] the loss, for an objective whose value is not ``weight * nll``. It must be computed from
            ``batch.trained(batch.logp)``: what masked tokens hold would reach the gradient otherwise.
        extra: further metrics, [N] (bool counts as 0 and 1) or scalar.
    """
    nll = batch.trained(nll)
    weight = batch.trained(weight)
    metrics = {"nll": nll, "token_weight": weight, "changed_frac": changed, **extra}
    return TokenLoss(
        loss=weight * nll if loss is None else batch.trained(loss),
        metrics={
            name: (batch.trained(value) if value.ndim else value).detach().to(nll.dtype)
            for name, value in metrics.items()
        },
    )
