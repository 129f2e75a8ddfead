"""The frozen reference policy beside the one that is trained: logits per micro-batch, or log-probs of rows.

Under LoRA the reference is the trained model with its adapters off; otherwise a second, forward-only engine of verl's
(sharded like the first; verl keeps its weights in host memory where there is an accelerator).
"""

import dataclasses
from contextlib import nullcontext
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.workers.engine import EngineRegistry

from verl_dft.training.bridge import LossBridge


class _Capture:
    """Stands in for a loss function: keeps the logits that verl's hook hands over."""

    logits: Tensor | None = None

    def __call__(self, model_output: Any = None, data: Any = None, dp_group: Any = None, student_logits: Any = None):
        if student_logits is None:
            return torch.zeros(()), {}
        self.logits = student_logits.detach()
        return {"logp": student_logits.new_zeros(student_logits.shape[:2])}


class Reference:
    """A frozen policy with the trained one's packing and precision.

    Args:
        engine: verl's FSDP engine that is trained.
        path: Hugging Face folder or name of the reference; None for the model that training starts from.
    """

    def __init__(self, engine: Any, path: str | None) -> None:
        self.trained = engine
        # what training starts from has the adapters that were loaded, which "adapters off" would leave out
        self.adapted = path is None and engine._is_lora and not engine.model_config.lora_adapter_path
        self.engine = engine if self.adapted else _frozen_engine(engine, path)
        self.forward_step = self.engine.forward_step  # before `attach` replaces the trained engine's

    def attach(self) -> None:
        """Give each micro-batch's reference logits to the :class:`LossBridge`, before the policy's forward pass."""
        policy_step = self.trained.forward_step

        def forward_step(micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
            if isinstance(loss_function, LossBridge) and "ref_kl" in loss_function.wanted:
                loss_function.reference_logits = self.logits(micro_batch)
            return policy_step(micro_batch, loss_function=loss_function, forward_only=forward_only)

        self.trained.forward_step = forward_step

    def logits(self, micro_batch: TensorDict) -> Tensor:
        """[1, n, V] without gradient, n = this sequence-parallel shard's tokens."""
        capture = _Capture()
        module = self.engine.module
        training = module.training
        module.eval()  # no dropout
        try:
            with torch.no_grad(), module.disable_adapter() if self.adapted else nullcontext():
                self.forward_step(micro_batch, loss_function=capture, forward_only=True)
        finally:
            module.train(training)
        assert capture.logits is not None
        return capture.logits


def _frozen_engine(engine: Any, path: str | None) -> Any:
    model_config = engine.model_config
    if path is not None:
        model_config = dataclasses.replace(
            model_config, path=path, hf_config_path=None, lora_rank=0, lora_adapter_path=None, load_tokenizer=False,
            tokenizer=None, custom_chat_template=None,
        )  # fmt: skip
    frozen = EngineRegistry.new(
        model_type="language_model",
        backend=engine.engine_config.strategy,
        model_config=model_config,
        engine_config=dataclasses.replace(engine.engine_config, forward_only=True),
        optimizer_config=None,
        checkpoint_config=engine.checkpoint_config,
    )
    frozen.initialize()
    return frozen
