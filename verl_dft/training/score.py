"""Log-probs of given rows by verl's engine, as training computes them, and the KL between two models.

Float32 values do not depend on the number of ranks, on micro-batches or on packing by more than 1e-5
(tests/integration/test_score.py), and repeat bit for bit on the same number of ranks and the same kind of machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.workers.engine_workers import TrainingWorkerConfig

from verl_dft.training.bridge import ScoreBridge, labels_and_mask
from verl_dft.training.configure import objective_of
from verl_dft.training.logprob import token_logp
from verl_dft.training.reference_kl import token_kl
from verl_dft.training.reference_scores import forward_settings
from verl_dft.training.score_head import install_compare_head
from verl_dft.training.score_rows import KL_COLUMNS
from verl_dft.training.worker import ObjectiveWorker

Item = dict[str, Tensor]


@dataclass
class CompareBridge(ScoreBridge):
    """Log-probs, and the KL to the reference in both directions, from the logits of both models.

    Only where ``CompareHead`` cannot serve: both models' logits of a micro-batch exist here, in the dtype of the
    forward pass; float32 copies are made by the chunk.
    """

    @property
    def wanted(self) -> frozenset[str]:
        """The reference's logits, which makes the worker run the reference first."""
        return frozenset({"ref_kl"})

    def log_probs(self, logits: Tensor, data: TensorDict) -> dict[str, Tensor]:
        assert self.reference_logits is not None, "the reference did not run"
        labels, mask = labels_and_mask(data)
        ours, theirs, self.reference_logits = logits[0], self.reference_logits[0], None
        logp, _ = token_logp(ours, labels, mask, chunk=self.chunk)
        to_reference = token_kl(theirs, ours, mask, chunk=self.chunk)  # token_kl is KL(second || first)
        from_reference = token_kl(ours, theirs, mask, chunk=self.chunk)
        return {"logp": logp[None], KL_COLUMNS[0]: to_reference[None], KL_COLUMNS[1]: from_reference[None]}


class EngineScorer:
    """verl's engine with a model loaded, one per rank; made like the trainer's, so that its numbers are the same.

    A forward-only engine of verl's would keep its weights in host memory and move them for every micro-batch. The
    process group must exist.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        names = ("model", "engine", "optim", "checkpoint", "profiler")
        parts = {name: omega_conf_to_dataclass(config[name]) for name in names}
        parts["optim"].total_training_steps = 1  # no step is taken: optimizer states, made in the first, never exist
        self.worker = ObjectiveWorker(
            TrainingWorkerConfig(
                model_type="language_model",
                model_config=parts["model"],
                engine_config=parts["engine"],
                optimizer_config=parts["optim"],
                checkpoint_config=parts["checkpoint"],
                profiler_config=parts["profiler"],
            )
        )
        bridge = CompareBridge if config.kl else ScoreBridge
        self.names = ("logp", *KL_COLUMNS) if config.kl else ("logp",)
        head, reference = config.trainer.log_prob_head, config.reference.path
        self.worker.set_loss_fn(bridge(objective_of(config), head=head, reference_path=reference))
        self.worker.reset()
        if config.kl and head != "logits":
            install_compare_head(self.worker.engine, self.worker._reference)
        self.collate = SFTTensorCollator(config.data.pad_mode)
        engine = self.worker.engine
        self.dp_size, self.dp_rank = engine.get_data_parallel_size(), engine.get_data_parallel_rank()
        self.is_first_rank = torch.distributed.get_rank() == 0

    def __call__(self, items: Sequence[Item]) -> list[np.ndarray]:
        """[k, tokens] float32 of each item's response; every rank calls it, the first gets the result, others []."""
        micro = 1 if self.config.data.use_dynamic_bsz else self.config.data.micro_batch_size_per_gpu
        spare = -len(items) % (self.dp_size * micro)
        shortest = min(items, key=lambda item: len(item["input_ids"]))
        unscored = {**shortest, "loss_mask": torch.zeros_like(shortest["loss_mask"])}
        padded = [*items, *[unscored] * spare]
        mine = list(range(self.dp_rank, len(padded), self.dp_size))
        batch = self.collate([padded[i] for i in mine])
        settings = forward_settings(self.config, self.worker.engine.model_config.tokenizer)
        output = self.worker.infer_batch(tu.get_tensordict(batch, settings))
        found: dict[int, np.ndarray] = {}
        if output is not None:
            rows = [output[name].unbind() for name in self.names]
            for place, i in enumerate(mine):
                if i < len(items):
                    values = torch.stack([row[place].float() for row in rows]).cpu().numpy()
                    found[i] = _of_response(values, items[i])
        parts: list[Any] | None = [None] * torch.distributed.get_world_size() if self.is_first_rank else None
        torch.distributed.gather_object(found, parts)
        if parts is None:
            return []
        whole = {i: values for part in parts for i, values in part.items()}
        return [whole[i] for i in range(len(items))]


def _of_response(values: np.ndarray, item: Item) -> np.ndarray:
    """[k, tokens] of the response, from [k, T] with each value at the position that predicts its token."""
    trained = int(item["loss_mask"].sum())
    return np.ascontiguousarray(values[:, -trained - 1 : -1])
