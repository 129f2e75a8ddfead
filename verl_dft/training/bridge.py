"""From verl's engine to an objective and back: log-probs, reduction, metrics.

verl calls a :class:`LossBridge` twice per micro-batch: first with the logits (its distillation hook), which the bridge
turns into float32 log-probs, then with what it returned, for the loss. Nothing else of verl reaches an objective.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.ulysses import ulysses_pad_and_slice_inputs

from verl_dft.objectives import Objective, TokenBatch, TokenLoss
from verl_dft.training.logprob import CHUNK_TOKENS, token_logp
from verl_dft.training.reference_kl import token_kl

TOKEN_COLUMNS = ("ref_logp", "behavior_logp")
"""Fields that come from the rows, one value per token at the token's own position."""

ROW_COLUMNS = ("advantage", "origin")
"""Fields that come from the rows, one value per row."""

SCORED_COLUMNS = ("old_logp", "ema_logp")
"""Fields that the worker scores before the update, each value at the position that predicts its token."""

SUMS = "verl_dft/sums"
"""Key under which the bridge hands numerators and the token count to the worker."""


def shift_left(values: Tensor, offsets: Tensor, fill: float) -> Tensor:
    """Align per-token values [N] with the position that predicts them: value of token t moves to t - 1.

    The last position of each sequence predicts nothing and gets ``fill``.
    """
    shifted = torch.roll(values, shifts=-1, dims=0)
    shifted[offsets[1:] - 1] = fill
    return shifted


def labels_and_mask(data: TensorDict) -> tuple[Tensor, Tensor]:
    """The token that each position predicts and whether it is trained on, [n] each.

    n = the tokens of the micro-batch, or of this sequence-parallel shard with its padding.
    """
    ids = data["input_ids"]
    labels = torch.roll(ids.values(), shifts=-1, dims=0)
    mask = shift_left(data["loss_mask"].values(), ids.offsets(), fill=0)
    sp_size = tu.get_non_tensor_data(data, "sp_size", 1)
    if sp_size > 1:
        labels, mask = (ulysses_pad_and_slice_inputs(x[None], None, sp_size)[0][0] for x in (labels, mask))
    return labels, mask.bool()


def loss_weight(reduction: str, *, dp_size: int, batch_tokens: int, batch_seqs: int, tokens: int, micros: int) -> float:
    """The factor of the summed token losses of one micro-batch, before FSDP averages gradients over ranks.

    Args:
        reduction: ``token_mean`` (mean over the global batch's trained tokens), ``sequence_sum`` (mean over its
            sequences of summed token losses, as the papers write it), ``micro_batch_mean`` and ``micro_batch_sum``
            (mean over each micro-batch's tokens, averaged or summed over micro-batches, as the authors' trainers did).
        dp_size: data-parallel ranks R.
        batch_tokens, batch_seqs: trained tokens, and sequences that have one, of the global batch.
        tokens: trained tokens of this micro-batch.
        micros: micro-batches of this rank in this step.
    """
    match reduction:
        case "token_mean":
            return dp_size / batch_tokens
        case "sequence_sum":
            return dp_size / batch_seqs
        case "micro_batch_mean":
            return 1 / (max(tokens, 1) * micros)
        case "micro_batch_sum":
            return 1 / max(tokens, 1)
    raise AssertionError(f"unknown reduction {reduction}")  # checked with the configuration


@dataclass
class LossBridge:
    """The loss function given to verl's engine (picklable: under Ray it travels to the workers)."""

    objective: Objective
    reduction: str = "token_mean"
    chunk: int = CHUNK_TOKENS
    updates: int = 1
    """Mini-batches of a step, each with an update of its own."""
    exempt_ids: tuple[int, ...] = ()
    """Token ids behind the field ``exempt``."""
    reference_path: str | None = None
    """Model of the reference policy; None for the one that training starts from."""
    head: str = "auto"
    """How log-probs are computed, one of ``logprob.HEADS``."""
    reference_logits: Tensor | None = field(default=None, repr=False)
    """[1, n, V] of the micro-batch about to be run; set before the forward pass where ``ref_kl`` is wanted."""

    @property
    def wanted(self) -> frozenset[str]:
        """The fields that must be computed from the logits or beside them."""
        return self.objective.requires

    def __call__(
        self,
        model_output: dict[str, Any] | None = None,
        data: TensorDict | None = None,
        dp_group: Any = None,
        student_logits: Tensor | None = None,
    ) -> Any:
        if student_logits is not None:
            return self.log_probs(student_logits, data)
        return self.loss(model_output, data)

    def log_probs(self, logits: Tensor, data: TensorDict) -> dict[str, Tensor]:
        """verl's logits hook. ``logits`` [1, n, V], n = this sequence-parallel shard's tokens; returns [1, n] each."""
        labels, mask = labels_and_mask(data)
        logp, entropy = token_logp(logits[0], labels, mask, with_entropy="entropy" in self.wanted, chunk=self.chunk)
        outputs = {"logp": logp, "entropy": entropy}
        if self.reference_logits is not None:
            outputs["ref_kl"] = token_kl(logits[0], self.reference_logits[0], mask, chunk=self.chunk)
            self.reference_logits = None
        return {name: value[None] for name, value in outputs.items() if value is not None}

    def loss(self, model_output: dict[str, Any], data: TensorDict) -> tuple[Tensor, dict[str, Any]]:
        """Reduced loss (scalar, with grad) and ``{SUMS: {name: numerator, "tokens": denominator}}``."""
        assert self.reference_logits is None, "reference logits were not used"
        batch = self.token_batch(model_output, data)
        missing = [name for name in self.objective.requires if getattr(batch, name) is None]
        validation = tu.get_non_tensor_data(data, "validation", False)
        assert validation or not missing, f"objective {self.objective} lacks {missing}"  # checked before the run
        # validation rows need not have the objective's columns: then only the plain nll is computed
        result = TokenLoss(torch.zeros_like(batch.logp)) if missing else self.objective(batch)
        tokens = int(batch.mask.sum())
        weight = loss_weight(
            self.reduction,
            dp_size=data["dp_size"],
            batch_tokens=data["batch_num_tokens"],
            batch_seqs=tu.get_non_tensor_data(data, "batch_num_seqs", None),
            tokens=tokens,
            micros=tu.get_non_tensor_data(data, "num_micro_batches", None) or 1,
        )
        loss = (torch.where(batch.mask, result.loss, 0.0)).sum() * weight
        return loss, {SUMS: self._sums(batch, result, tokens, has_objective=not missing)}

    def token_batch(self, model_output: dict[str, Any], data: TensorDict) -> TokenBatch:
        """The micro-batch as an objective sees it."""
        ids = data["input_ids"]
        offsets = ids.offsets()
        lengths = offsets.diff()
        num_seqs = lengths.shape[0]
        seq = torch.repeat_interleave(torch.arange(num_seqs, device=lengths.device), lengths)
        # fused kernels never materialise logits, so the hook did not run: verl's own log-probs are used
        logp = model_output["logp"] if "logp" in model_output else model_output["log_probs"]
        logp = logp.values().float()
        fields: dict[str, Tensor] = {name: data[name].values()[seq] for name in ROW_COLUMNS if name in data.keys()}
        for name in TOKEN_COLUMNS:
            if name in data.keys():
                fields[name] = shift_left(data[name].values(), offsets, fill=0.0)
        fields |= {name: data[name].values() for name in SCORED_COLUMNS if name in data.keys()}
        fields |= {name: model_output[name].values() for name in ("entropy", "ref_kl") if name in model_output}
        if "origin" in fields:
            fields["origin"] = fields["origin"].long()
        if "exempt" in self.objective.requires:
            labels = shift_left(ids.values(), offsets, fill=0)
            fields["exempt"] = torch.isin(labels, torch.tensor(self.exempt_ids, device=labels.device))
        if "old_logp" in self.objective.requires:  # not scored: this is the batch's first update
            fields.setdefault("old_logp", logp.detach())
        mask = shift_left(data["loss_mask"].values(), offsets, fill=0).bool()
        return TokenBatch(logp=logp, mask=mask, seq=seq, num_seqs=num_seqs, **fields)

    def _sums(self, batch: TokenBatch, result: TokenLoss, tokens: int, has_objective: bool) -> dict[str, float]:
        """Numerators over this micro-batch's trained tokens; one device synchronisation for all of them."""
        columns = {"nll": -batch.logp.detach()}
        if has_objective:
            columns |= {"objective": result.loss.detach(), **result.metrics}
        zero = torch.zeros((), device=batch.logp.device)
        sums = [
            torch.where(batch.mask, value, zero).sum() if value.ndim else value * tokens for value in columns.values()
        ]
        return {**dict(zip(columns, torch.stack(sums).tolist(), strict=True)), "tokens": float(tokens)}


@dataclass
class ScoreBridge(LossBridge):
    """Computes log-probs and no loss: what the engine is given to score rows."""

    @property
    def wanted(self) -> frozenset[str]:
        """Nothing but log-probs."""
        return frozenset()

    def loss(self, model_output: dict[str, Any], data: TensorDict) -> tuple[Tensor, dict[str, Any]]:
        if "logp" not in model_output:  # fused kernels: the hook did not run; whoever scores reads one name
            model_output["logp"] = model_output.pop("log_probs")
        return torch.zeros((), device=model_output["logp"].values().device), {}
