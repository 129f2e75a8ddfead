"""ObjectiveWorker: verl's TrainingWorker with an objective. The one seam, under torchrun, Ray and verl's actor."""

from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import TrainingWorker

from verl_dft.errors import InputError
from verl_dft.failpoints import failpoint
from verl_dft.training.bridge import SUMS, LossBridge, ScoreBridge
from verl_dft.training.export import export_model

_DISPATCH = make_nd_compute_dataproto_dispatch_fn(mesh_name="train")


class ObjectiveWorker(TrainingWorker):
    """Trains with a :class:`LossBridge`; metrics are exact over micro-batches and ranks.

    Each micro-batch returns numerators and a token count; they are summed over the step and over the data-parallel
    group, and only their quotients are logged (``train/nll``, ``train/token_weight`` …).
    """

    _validation: dict[str, float] | None = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reset(self) -> None:
        """Build the model; what is random about it (LoRA) follows the run's seed, which verl does not see to."""
        torch.manual_seed(self.engine_config.seed)
        super().reset()

    @register(dispatch_mode=_DISPATCH, blocking=False)
    def train_batch(self, data: TensorDict) -> TensorDict:
        """One optimizer step on this rank's share of the global batch."""
        self._prepare(data, validation=False)
        output = super().train_batch(data)
        failpoint("worker.step")
        return output

    @register(dispatch_mode=_DISPATCH, blocking=False)
    def infer_batch(self, data: TensorDict) -> TensorDict:
        """A forward pass with the loss; its sums are added to the running validation."""
        self._prepare(data, validation=True)
        return super().infer_batch(data)

    @register(dispatch_mode=_DISPATCH, blocking=False)
    def compute_logp(self, data: TensorDict) -> TensorDict:
        """Log-probs of trained tokens: ``logp`` [rows, tokens] nested, each at the position that predicts it."""
        loss_fn, self.loss_fn = self.loss_fn, ScoreBridge(self.loss_fn.objective)
        try:
            self._prepare(data, validation=False)
            return super().infer_batch(data)
        finally:
            self.loss_fn = loss_fn

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reset_validation(self) -> None:
        """Start a validation pass."""
        self._validation = {}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def validation_metrics(self) -> dict[str, float]:
        """Plain token means over every row seen since :meth:`reset_validation`, equal on all ranks."""
        sums = dict(self._validation or {})
        tokens = sums.pop("tokens", 0.0)
        found = {name: sums[name] / tokens for name in ("nll", "objective") if name in sums and tokens}
        return {**found, "num_tokens": tokens}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def export(self, path: str, dtype: str) -> None:
        """Write the model as a Hugging Face folder; every rank must call it."""
        with self.engine.eval_mode():
            export_model(self.engine, Path(path), dtype)

    def _prepare(self, data: TensorDict, *, validation: bool) -> None:
        """Tell the engine to call the logits hook, and the bridge what it cannot see from one micro-batch."""
        assert isinstance(self.loss_fn, LossBridge)
        group = self.engine.get_data_parallel_group()
        trained = torch.stack([row.sum() for row in data["loss_mask"].unbind()])
        counts = torch.stack([trained.sum(), (trained > 0).sum()]).to(self.device_name)
        torch.distributed.all_reduce(counts, group=group)
        tokens, seqs = counts.tolist()
        if tokens == 0:
            raise InputError("a global batch has no trained token; check the rows' responses and data.max_length")
        fused = self.engine_config.use_fused_kernels
        micro = tu.get_non_tensor_data(data, "micro_batch_size_per_gpu", None)
        tu.assign_non_tensor(
            data,
            distillation_use_topk=not fused,
            distillation_only=not fused,
            validation=validation,
            batch_num_seqs=seqs,
            num_micro_batches=len(data) // micro if micro else None,
        )

    def _postprocess_output(self, output: dict[str, Any], **kwargs: Any) -> TensorDict:
        """verl would nest metrics by rank and micro-batch and its loggers drop nested lists: sum ours first."""
        micro_sums = output["metrics"].pop(SUMS, None)
        final = super()._postprocess_output(output, **kwargs)
        if not micro_sums:
            return final
        sums = self._reduce(micro_sums)
        if kwargs["forward_only"]:
            if self._validation is not None:
                for name, value in sums.items():
                    self._validation[name] = self._validation.get(name, 0.0) + value
            return final
        tokens = sums.pop("tokens")
        metrics = tu.get(final, "metrics")
        metrics.update({f"train/{name}": value / tokens for name, value in sums.items()})
        metrics["train/num_tokens"] = tokens
        if self.device_name == "cpu":
            metrics.update(mfu=0.0)  # verl has no peak FLOP/s for a CPU; the tracker drops it
        tu.assign_non_tensor(final, metrics=metrics)
        return final

    def _reduce(self, micro_sums: list[dict[str, float]]) -> dict[str, float]:
        names = sorted(micro_sums[0])
        total = torch.tensor(
            [sum(micro[name] for micro in micro_sums) for name in names], dtype=torch.float64, device=self.device_name
        )
        torch.distributed.all_reduce(total, group=self.engine.get_data_parallel_group())
        return dict(zip(names, total.tolist(), strict=True))
