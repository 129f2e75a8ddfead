"""Two models compared without the logits of either: the KL of whole next-token distributions, a few tokens at a time.

Both models' output layers are replaced while a micro-batch runs (see ``linear_head``). The reference runs first and
hands over the hidden states of the scored tokens; its layer's weight is kept, since it never changes. Where the other
model's layer is called, the logits of a chunk of tokens are computed from both, compared in float32, and forgotten. So
what is in memory is one more weight [V, D] and a chunk of logits, whatever the micro-batch.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from verl_dft.training.linear_head import _CHECK, LinearHead, Targets, _Unusable
from verl_dft.training.logprob import chunk_rows
from verl_dft.training.reference import Reference
from verl_dft.training.score_rows import KL_COLUMNS


class CompareHead(LinearHead):
    """Runs verl's ``forward_step`` of both models with their output layers replaced.

    Args:
        engine: verl's, of the model that is scored.
        layers: output layers of the model and of the reference.
        reference: attached to ``engine``; serves where the layers turn out to be unusable.
    """

    def __init__(self, engine: Any, layers: tuple[nn.Linear, nn.Linear], reference: Reference) -> None:
        super().__init__(engine, layers[0], "auto")
        self.with_logits = engine.forward_step  # the attached reference's
        self.verl_forward_step = partial(type(engine).forward_step, engine)
        self.reference, self.reference_layer = reference, layers[1]
        self.hidden: Tensor | None = None
        self.weights: tuple[Tensor, Tensor | None] | None = None

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        """In place of the engine's: same arguments, same results."""
        if self.usable:
            targets = Targets.of(micro_batch, with_entropy=False)
            try:
                self._run_reference(micro_batch, targets)
                with self._replaced(targets):
                    hook = partial(self._loss, loss_function)
                    return self.verl_forward_step(micro_batch, loss_function=hook, forward_only=forward_only)
            except _Unusable as reason:  # on every rank alike: all have the same models
                self._give_up(str(reason))
        return self.with_logits(micro_batch, loss_function=loss_function, forward_only=forward_only)

    def _run_reference(self, micro_batch: TensorDict, targets: Targets) -> None:
        module = self.reference.engine.module
        self.hidden = None
        self.reference_layer.forward = partial(self._capture, targets)
        try:
            module.eval()  # no dropout
            with torch.no_grad():
                self.reference.forward_step(micro_batch, loss_function=_check_reference, forward_only=True)
        finally:
            del self.reference_layer.forward  # the class's own is back
        if self.hidden is None:
            raise _Unusable("never calls the reference's output layer")

    def _capture(self, targets: Targets, hidden: Tensor) -> Tensor:
        """The reference layer's forward: hidden [B, S, D] -> [B, S, 1], the constant."""
        if self.hidden is not None:
            raise _Unusable("calls the reference's output layer twice in a forward pass")
        rows, _ = targets.rows(hidden.shape[:-1], hidden.device)
        self.hidden = hidden.reshape(-1, hidden.shape[-1])[rows]
        if self.weights is None:  # whole only while the layer is called
            layer = self.reference_layer
            self.weights = (layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone())
        return torch.full((*hidden.shape[:-1], 1), _CHECK, dtype=torch.float32, device=hidden.device)

    def _columns(self, targets: Targets, hidden: Tensor) -> Tensor:
        """The layer's forward: hidden [B, S, D] -> [B, S, 4] float32: log-prob, both KL, the constant."""
        assert self.hidden is not None and self.weights is not None
        self.calls += 1
        shape = hidden.shape[:-1]
        rows, labels = targets.rows(shape, hidden.device)
        flat = hidden.reshape(-1, hidden.shape[-1])[rows]
        size = chunk_rows(self.layer.weight.shape[0], device=hidden.device.type)
        values = torch.zeros(len(rows), 3, device=hidden.device)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            ours = F.linear(flat[part], self.layer.weight, self.layer.bias)
            values[part] = compare(ours, F.linear(self.hidden[part], *self.weights), labels[part])
        columns = values.new_zeros(shape.numel(), 3).index_copy(0, rows, values)
        return torch.cat([columns, torch.full_like(columns[:, :1], _CHECK)], dim=-1).view(*shape, 4)

    def _loss(self, loss_function: Any, **kwargs: Any) -> Any:
        columns = kwargs.get("student_logits")
        if columns is None:
            return loss_function(**kwargs)
        if not self.checked:
            if self.calls != 1 or columns.shape[-1] != 4 or not bool((columns[..., -1] == _CHECK).all()):
                raise _Unusable("changes its logits after its output layer, or calls it more than once")
            self.checked = True
        return dict(zip(("logp", *KL_COLUMNS), columns[..., :3].unbind(-1), strict=True))


def _check_reference(student_logits: Tensor | None = None, **_: Any) -> Any:
    """The loss function of the reference's pass: its constant must come back as it was."""
    if student_logits is None:
        return torch.zeros(()), {}
    if student_logits.shape[-1] != 1 or not bool((student_logits == _CHECK).all()):
        raise _Unusable("is compared with a reference that changes its logits after its output layer")
    return {"logp": student_logits[..., 0]}


def compare(ours: Tensor, theirs: Tensor, labels: Tensor) -> Tensor:
    """Log-prob of the labels under ours, KL(ours || theirs) and KL(theirs || ours): [m, 3] float32, nats.

    Args:
        ours, theirs: [m, V] logits, any float dtype.
        labels: [m] int64.
    """
    with torch.autocast(device_type=ours.device.type, enabled=False):
        log_p, log_q = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        difference = log_p - log_q
        logp = log_p.gather(-1, labels[:, None]).squeeze(-1)
        # a token that is ruled out (probability 0) adds 0
        forward = torch.where(log_p.isneginf(), 0.0, log_p.exp_() * difference).sum(-1)
        backward = -torch.where(log_q.isneginf(), 0.0, log_q.exp_() * difference).sum(-1)
        return torch.stack([logp, forward, backward], dim=-1)


def install_compare_head(engine: Any, reference: Reference) -> None:
    """Let an engine with an attached reference compare without logits, where both models' output layers allow it."""
    model, other = (part.module.get_output_embeddings() for part in (engine, reference.engine))
    if all(isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward for layer in (model, other)):
        engine.forward_step = CompareHead(engine, (model, other), reference).forward_step
