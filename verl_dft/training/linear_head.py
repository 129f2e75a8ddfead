"""The output layer of verl's model, replaced while a micro-batch runs: log-probs instead of logits.

verl asks a model for logits [.., V] and hands them to our logits hook. Here the layer that makes them returns the few
numbers per token that the hook would compute from them, [.., K], computed by :func:`linear_logp` from the hidden
states of the trained tokens only; verl passes them on to the hook as it would the logits. So [.., V] is never
materialised (what may be kept of the trained tokens' logits: :func:`keep_bytes`), and nothing else about the model or
verl's engine changes: FSDP2 has the layer's weight gathered when the layer is called, tied or not.

Models that change their logits after that layer (soft-capping, scaling) or never call it are recognised in the first
micro-batch by a column of constants that must come back as it was; they keep the path over the logits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu

from verl_dft.errors import InputError
from verl_dft.training.bridge import LossBridge, labels_and_mask
from verl_dft.training.linear_logp import KEEP_ALL, KEEP_BYTES, linear_logp
from verl_dft.training.logprob import HEADS

RECOMPUTE_SHARE = 0.8
"""Share of trained tokens up to which skipping the others saves more time than computing their logits twice costs
(measured with ``scripts/bench_logprob.py`` on a CPU; by the count of multiplications alone it is 0.75)."""

_CHECK = 7.0
"""The constant that must come back: scaling and soft-capping change it."""


class _Unusable(Exception):
    """The model does more, or something else, than return what its output layer gives."""


@dataclass(frozen=True)
class Targets:
    """What the output layer has to compute for one micro-batch.

    labels, mask: [n], the token that each position predicts and whether it is trained on; n = the tokens of the packed
    micro-batch (of this sequence-parallel shard, with its padding), or of all rows without padding.
    lengths: [rows] where the micro-batch is padded, None where it is packed.
    """

    labels: Tensor
    mask: Tensor
    lengths: Tensor | None
    with_entropy: bool

    @classmethod
    def of(cls, data: TensorDict, with_entropy: bool) -> "Targets":
        """Those of a micro-batch as verl's engine gets it."""
        packed = tu.get_non_tensor_data(data, "use_remove_padding", True)  # sequence parallelism always is
        return cls(*labels_and_mask(data), None if packed else data["input_ids"].offsets().diff(), with_entropy)

    def rows(self, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
        """Trained positions in hidden states of ``shape`` [B, S] without their last dimension, flattened; labels."""
        trained = self.mask.nonzero().squeeze(-1)
        rows = trained
        if self.lengths is not None:  # the t-th token of row b is at b * S + t
            gaps = shape[-1] - self.lengths
            before = torch.repeat_interleave(gaps.cumsum(0) - gaps, self.lengths)
            rows = trained + before[trained]
            assert shape == (len(self.lengths), int(self.lengths.max())), f"hidden states {tuple(shape)}"
        else:
            assert shape.numel() == len(self.mask), f"hidden states {tuple(shape)} for {len(self.mask)} tokens"
        return rows.to(device, non_blocking=True), self.labels[trained].to(device, non_blocking=True)


class LinearHead:
    """Runs verl's ``forward_step`` with the output layer replaced, where the loss allows it."""

    def __init__(self, engine: Any, layer: nn.Linear, mode: str) -> None:
        self.layer, self.mode, self.usable, self.checked, self.calls = layer, mode, True, False, 0
        self.verl_forward_step: Callable[..., Any] = engine.forward_step
        self.is_first_rank = engine.rank == 0

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        """In place of the engine's: same arguments, same results."""
        if self.usable and self.serves(micro_batch, loss_function):
            targets = Targets.of(micro_batch, "entropy" in loss_function.wanted)
            try:
                with self._replaced(targets):
                    hook = partial(self._loss, loss_function)
                    return self.verl_forward_step(micro_batch, loss_function=hook, forward_only=forward_only)
            except _Unusable as reason:  # on every rank alike: all have the same model
                self._give_up(str(reason))
        return self.verl_forward_step(micro_batch, loss_function=loss_function, forward_only=forward_only)

    def serves(self, micro_batch: TensorDict, loss_function: Any) -> bool:
        """Whether all that is wanted of this micro-batch's logits is what ``linear_logp`` computes."""
        temperature = micro_batch["temperature"]
        return (
            isinstance(loss_function, LossBridge)
            and "ref_kl" not in loss_function.wanted
            and tu.get_non_tensor_data(micro_batch, "distillation_only", False)
            and not isinstance(temperature, Tensor)
            and float(temperature) == 1.0
        )

    @contextmanager
    def _replaced(self, targets: Targets) -> Iterator[None]:
        self.calls = 0
        self.layer.forward = partial(self._columns, targets)
        try:
            yield
        finally:
            del self.layer.forward  # the class's own is back

    def _columns(self, targets: Targets, hidden: Tensor) -> Tensor:
        """The layer's forward: hidden [B, S, D] -> [B, S, 3] float32: log-prob, entropy (or 0), the constant."""
        self.calls += 1
        shape = hidden.shape[:-1]
        rows, labels = targets.rows(shape, hidden.device)
        flat = hidden.reshape(-1, hidden.shape[-1])[rows]
        logp, entropy = linear_logp(
            flat,
            self.layer.weight,
            self.layer.bias,
            labels,
            with_entropy=targets.with_entropy,
            keep_bytes=keep_bytes(self.mode, len(rows), shape.numel()),
        )
        values = torch.stack([logp, torch.zeros_like(logp) if entropy is None else entropy], dim=-1)
        columns = values.new_zeros(shape.numel(), 2).index_copy(0, rows, values)
        return torch.cat([columns, torch.full_like(columns[:, :1], _CHECK)], dim=-1).view(*shape, 3)

    def _loss(self, loss_function: LossBridge, **kwargs: Any) -> Any:
        """The loss function for verl's engine: unpacks the columns where verl has logits, else the bridge's own."""
        columns = kwargs.get("student_logits")
        if columns is None:
            return loss_function(**kwargs)
        if not self.checked:
            self._check(columns)
        logp, entropy, _ = columns.unbind(-1)
        return {"logp": logp} | ({"entropy": entropy} if "entropy" in loss_function.wanted else {})

    def _check(self, columns: Tensor) -> None:
        if self.calls != 1:
            raise _Unusable(f"calls its output layer {self.calls} times in a forward pass")
        if columns.shape[-1] != 3 or not bool((columns[..., -1] == _CHECK).all()):
            raise _Unusable("changes its logits after its output layer")
        self.checked = True

    def _give_up(self, reason: str) -> None:
        self.usable = False
        _refuse(self.mode, f"the model {reason}", self.is_first_rank)


def keep_bytes(mode: str, trained: int, positions: int) -> int:
    """Logits to keep for the backward pass: a fixed amount, but all under ``auto`` where the rest would cost time."""
    return KEEP_ALL if mode == "auto" and trained > RECOMPUTE_SHARE * positions else KEEP_BYTES


def install_linear_head(engine: Any, mode: str = "auto") -> None:
    """Let an initialised engine compute log-probs without logits, where ``mode`` (see :data:`HEADS`) and it allow it.

    Raises:
        InputError: mode ``chunked`` and an output layer that cannot be replaced. (What only the first micro-batch can
            show is raised there.)
    """
    assert mode in HEADS, mode
    if mode == "logits" or engine.engine_config.use_fused_kernels:  # with fused kernels verl has no logits either
        return
    layer = engine.module.get_output_embeddings()
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        # adapters and quantisation replace the layer's class or its forward, and compute something else
        what = "has adapters" if hasattr(layer, "base_layer") else f"is a {type(layer).__name__}"
        _refuse(mode, f"the model's output layer {what}", engine.rank == 0)
        return
    engine.forward_step = LinearHead(engine, layer, mode).forward_step


def _refuse(mode: str, reason: str, is_first_rank: bool) -> None:
    if mode == "chunked":
        raise InputError(f"trainer.log_prob_head=chunked: {reason}; set it to auto or logits")
    if is_first_rank:
        print(f"log-probs are computed from the full logits: {reason}", flush=True)
