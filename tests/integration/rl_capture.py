"""Saves what an actor of ``verl-dft rl`` trains on: every micro-batch at its loss, and the gradient of every update.

verl imports this module in each of its processes (``VERL_USE_EXTERNAL_MODULES``). It calls what it wraps with the
arguments that it got and returns what that returned.
"""

import os
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from verl_dft.platform.hooks import when_imported

VARIABLE = "RL_CAPTURE"
"""Environment variable with the folder: ``loss-<rank>-<number>.pt`` and ``update-<rank>-<number>.pt``."""
_counts: dict[str, int] = {}


def _save(kind: str, content: Any) -> None:
    rank, number = torch.distributed.get_rank(), _counts.get(kind, 0)
    _counts[kind] = number + 1
    torch.save(content, Path(os.environ[VARIABLE]) / f"{kind}-{rank}-{number:03d}.pt")


def _plain(value: Any) -> Any:
    """A tensor of rows of their own lengths as a list of tensors, verl's wrappers as what they wrap."""
    if isinstance(value, torch.Tensor):
        return [row.detach().clone() for row in value.unbind()] if value.is_nested else value.detach().clone()
    value = getattr(value, "data", value)
    return value.tolist() if hasattr(value, "tolist") else value


def _save_at_loss(module: ModuleType) -> None:
    original = module.ppo_loss

    @wraps(original)
    def ppo_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> Any:
        from verl_dft.training.policy_rows import current_rows

        loss, metrics = original(config=config, model_output=model_output, data=data, dp_group=dp_group)
        content = {name: _plain(data[name]) for name in data.keys()}
        rows = current_rows()
        content |= {"rows": None if rows is None else tuple(rows), "loss": loss.detach().clone()}
        content["logp"] = _plain(model_output["log_probs"])
        _save("loss", content)
        return loss, metrics

    module.ppo_loss = ppo_loss


def _save_gradient(module: ModuleType) -> None:
    original = module.FSDPEngine.optimizer_step

    @wraps(original)
    def optimizer_step(self: Any) -> Any:
        found = {}
        for name, parameter in self.module.named_parameters():
            if (gradient := parameter.grad) is not None:
                gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                found[name] = gradient.detach().clone()
        _save("update", found)
        return original(self)

    module.FSDPEngine.optimizer_step = optimizer_step


if VARIABLE in os.environ:
    when_imported("verl.workers.utils.losses", _save_at_loss)
    when_imported("verl.workers.engine.fsdp.transformer_impl", _save_gradient)
