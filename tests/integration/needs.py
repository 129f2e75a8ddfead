"""Objectives that ask the trainer for something, for the tests of what it provides."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from verl_dft.objectives import TokenBatch, TokenLoss, token_loss


@dataclass(frozen=True)
class Recorder:
    """SFT's loss; reports the mean of each field in ``fields``."""

    fields: Sequence[str] = ()
    exempt_tokens: Sequence[str | int] = ("end_of_turn",)
    ema_decay: float = 0.5

    @property
    def requires(self) -> frozenset[str]:
        return frozenset(self.fields)

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        values = {f"mean_{name}": getattr(batch, name).to(batch.logp.dtype) for name in self.fields}
        ones, none = torch.ones_like(batch.logp), torch.zeros_like(batch.mask)
        return token_loss(batch, -batch.logp, ones, none, **values)


@dataclass(frozen=True)
class Pull:
    """The reference's pull alone: KL(reference || policy)."""

    requires = frozenset({"ref_kl"})

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        result = token_loss(batch, -batch.logp, torch.ones_like(batch.logp), torch.zeros_like(batch.mask))
        return TokenLoss(torch.where(batch.mask, batch.ref_kl, 0.0), result.metrics)


@dataclass(frozen=True)
class Ratio:
    """A clipped ratio against the policy at the start of the step, and one against the moving average."""

    averaged: bool = False
    ema_decay: float = 0.5

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"ema_logp" if self.averaged else "old_logp"})

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        result = token_loss(batch, -batch.logp, torch.ones_like(batch.logp), torch.zeros_like(batch.mask))
        other = batch.ema_logp if self.averaged else batch.old_logp
        ratio = torch.exp(torch.where(batch.mask, batch.logp - other, 0.0))
        return TokenLoss(torch.where(batch.mask, -ratio.clamp(max=1.2), 0.0), result.metrics)
