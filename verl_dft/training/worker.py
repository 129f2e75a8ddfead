"""ObjectiveWorker: verl's TrainingWorker with an objective. The one seam, under torchrun, Ray and verl's actor."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import TrainingWorker

from verl_dft.errors import InputError
from verl_dft.failpoints import failpoint
from verl_dft.platform.memory import keep_freed_memory
from verl_dft.training.average import WeightAverage
from verl_dft.training.bridge import SUMS, LossBridge, ScoreBridge
from verl_dft.training.checkpoint import without_lock_files
from verl_dft.training.export import export_model
from verl_dft.training.linear_head import install_linear_head
from verl_dft.training.reference import Reference

_DISPATCH = make_nd_compute_dataproto_dispatch_fn(mesh_name="train")


class ObjectiveWorker(TrainingWorker):
    """Trains with a :class:`LossBridge`; metrics are exact over micro-batches and ranks.

    Each micro-batch returns numerators and a token count; they are summed over the step and over the data-parallel
    group, and only their quotients are logged (``train/nll``, ``train/token_weight`` …).
    """

    _validation: dict[str, float] | None = None
    _average: WeightAverage | None = None
    _reference: Reference | None = None
    _has_head = False

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reset(self) -> None:
        """Build the model; what is random about it (LoRA) follows the run's seed, which verl does not see to."""
        torch.manual_seed(self.engine_config.seed)
        if self.device_name == "cpu":
            keep_freed_memory()
        super().reset()
        self._equip()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_loss_fn(self, loss_fn: Any) -> None:
        """Take the bridge."""
        super().set_loss_fn(loss_fn)
        self._equip()

    def _equip(self) -> None:
        """Build what the objective requires beside the model, once both are known (verl's trainers differ in order)."""
        if not isinstance(self.loss_fn, LossBridge) or not hasattr(self.engine, "module"):
            return
        objective = self.loss_fn.objective
        if not self._has_head:
            install_linear_head(self.engine, self.loss_fn.head)
            self._has_head = True
        if "ref_kl" in objective.requires and self._reference is None:
            self._reference = Reference(self.engine, self.loss_fn.reference_path)
            self._reference.attach()
        if "ema_logp" in objective.requires and self._average is None:
            self._average = WeightAverage(self.engine.module, objective.ema_decay)

    @register(dispatch_mode=_DISPATCH, blocking=False)
    def train_batch(self, data: TensorDict) -> TensorDict | None:
        """One step on this rank's share of the global batch: an update per mini-batch, one move of the schedule."""
        assert isinstance(self.loss_fn, LossBridge)
        minis = tu.chunk_tensordict(data, self.loss_fn.updates)
        self._score(minis)
        outputs = []
        for mini in minis:
            self._prepare(mini, validation=False)
            last = len(outputs) == len(minis) - 1
            tu.assign_non_tensor(mini, update_lr_scheduler=last and tu.get(data, "update_lr_scheduler", False))
            outputs.append(super().train_batch(mini))
        if self._average is not None:
            self._average.update()
        failpoint("worker.step")
        return merge_updates(outputs)

    def _score(self, minis: list[TensorDict]) -> None:
        """Add the log-probs that the objective compares with, all of the policies before the first update."""
        if "old_logp" in self.loss_fn.objective.requires:
            for mini in minis[1:]:  # the first update's own log-probs are the old ones
                mini["old_logp"] = self._logp(mini)
        if self._average is not None:
            for mini in minis:
                mini["ema_logp"] = self._logp(mini, averaged=True)

    def _logp(self, data: TensorDict, averaged: bool = False) -> torch.Tensor:
        """Log-probs of the trained tokens, nested [rows, tokens], each at the position that predicts its token."""
        self._prepare(data, validation=False)
        with self.engine.eval_mode(), self._average.in_place() if averaged else nullcontext():
            output = self.engine.infer_batch(data, loss_function=ScoreBridge(self.loss_fn.objective))
        return output["model_output"]["logp"].cpu()

    @register(dispatch_mode=_DISPATCH, blocking=False)
    def infer_batch(self, data: TensorDict) -> TensorDict:
        """A forward pass with the loss; its sums are added to the running validation."""
        if self._average is not None:
            data["ema_logp"] = self._logp(data, averaged=True)
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

    @register(dispatch_mode=_DISPATCH, blocking=False)
    def reference_logp(self, data: TensorDict) -> TensorDict:
        """:meth:`compute_logp` of the reference policy; before the first step the trained model itself is it."""
        if self.loss_fn.reference_path is None:
            return self.compute_logp(data)
        if self._reference is None:
            self._reference = Reference(self.engine, self.loss_fn.reference_path)
        trained, self.engine = self.engine, self._reference.engine
        try:
            return self.compute_logp(data)
        finally:
            self.engine = trained

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reference_scored(self) -> None:
        """Free the reference, unless its logits are needed."""
        if "ref_kl" not in self.loss_fn.objective.requires:
            self._reference = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, local_path: str, hdfs_path: str | None = None, global_step: int = 0, **kwargs: Any):
        """verl's checkpoint, with the moving average where there is one."""
        with without_lock_files():
            super().save_checkpoint(local_path, hdfs_path, global_step, **kwargs)
        if self._average is not None:
            self._average.save(local_path)
            torch.distributed.barrier()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, local_path: str, hdfs_path: str | None = None, **kwargs: Any) -> None:
        """verl's checkpoint, with the moving average where there is one."""
        super().load_checkpoint(local_path, hdfs_path, **kwargs)
        if self._average is not None:
            self._average.load(local_path)

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
    def export(self, path: str, dtype: str, trained_with: dict[str, Any] | None = None) -> None:
        """Write the model as a Hugging Face folder, with that record in it; every rank must call it."""
        with self.engine.eval_mode():
            export_model(self.engine, Path(path), dtype, trained_with)

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
            use_fused_kernels=fused,
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


def merge_updates(outputs: list[TensorDict | None]) -> TensorDict | None:
    """One step's output from its updates': ``train/…`` are token means over the step, the rest means over updates."""
    if outputs[0] is None:
        return None
    parts = [tu.get(output, "metrics") for output in outputs]
    tokens = [part["train/num_tokens"] for part in parts]
    merged: dict[str, Any] = {"train/num_updates": len(parts)}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [(part[name], count) for part, count in zip(parts, tokens, strict=True) if name in part]
        if name.startswith("train/"):
            merged[name] = sum(value * count for value, count in values) / sum(tokens)
        else:
            merged[name] = sum(value for value, _ in values) / len(values)
    merged["train/num_tokens"] = sum(tokens)
    if "mfu" in merged:
        merged["mfu"] /= len(parts)  # verl counts the whole step's tokens for each update
    tu.assign_non_tensor(outputs[-1], metrics=merged)
    return outputs[-1]
