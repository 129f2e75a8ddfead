"""A run's configuration: composed, completed for the machine, and checked before anything is loaded."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_dft.config import compose, require, split_config_name
from verl_dft.errors import InputError
from verl_dft.objectives import build_objective

ROW_FIELDS = {
    "advantage": "verl-dft groups",
    "ref_logp": "verl-dft score",
    "behavior_logp": "verl-dft rewrite or verl-dft reject",
}
"""Row columns an objective may require -> the builder that makes them."""

COMPUTED_FIELDS = frozenset({"entropy"})
"""What the trainer computes itself when an objective requires it."""

MAX_AUTO_MICRO_BATCH = 16
REDUCTIONS = ("token_mean", "sequence_sum", "micro_batch_mean", "micro_batch_sum")
"""How per-token losses become one number; see ``bridge.loss_weight``."""
_DTYPES = ("fp32", "bf16", "fp16")


def compose_training(argv: Sequence[str]) -> DictConfig:
    """The checked configuration of ``verl-dft train`` for a command line."""
    name, overrides = split_config_name(argv, "sft")
    if "VERL_DFT_HARDWARE" not in os.environ:
        os.environ["VERL_DFT_HARDWARE"] = "gpu" if has_accelerator() else "cpu"
    config = compose(name, overrides)
    require(config, "model.path", "output_dir")
    with open_dict(config):
        _complete(config)
    check(config)
    return config


def has_accelerator() -> bool:
    """Whether verl would find an accelerator here (torch's view; ``hardware=gpu`` on the command line overrules)."""
    import torch

    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        return False
    return torch.cuda.is_available() or bool(getattr(torch, "npu", None) and torch.npu.is_available())


def world_size(config: DictConfig) -> int:
    """Ranks of the run: under a launcher its own count, else ``n_gpus_per_node * nnodes``."""
    return config.trainer.n_gpus_per_node * config.trainer.nnodes


def data_parallel_size(config: DictConfig) -> int:
    """Ranks that the batch is split over."""
    return max(1, world_size(config) // config.engine.ulysses_sequence_parallel_size)


def _complete(config: DictConfig) -> None:
    """Fill in ``auto`` values that need no model or data."""
    config.output_dir = os.path.abspath(config.output_dir)  # a Ray worker's working directory is another
    if "WORLD_SIZE" in os.environ and config.launcher == "torchrun":  # started by torchrun: it knows the ranks
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        config.trainer.n_gpus_per_node = local
        config.trainer.nnodes = int(os.environ["WORLD_SIZE"]) // local
    attention = config.model.override_config.get("attn_implementation")
    if attention == "auto":
        # flash attention takes fp16 and bf16 only
        has_flash = importlib.util.find_spec("flash_attn") is not None and config.precision != "fp32"
        config.model.override_config.attn_implementation = "flash_attention_2" if has_flash else "sdpa"
    if config.model.use_remove_padding == "auto" and config.trainer.device != "cpu":
        flash = config.model.override_config.get("attn_implementation", "flash_attention_2")
        config.model.use_remove_padding = str(flash).startswith("flash")
    if config.data.micro_batch_size_per_gpu == "auto":
        share = config.data.train_batch_size // data_parallel_size(config)
        fitting = (size for size in range(min(share, MAX_AUTO_MICRO_BATCH), 0, -1) if share % size == 0)
        config.data.micro_batch_size_per_gpu = next(fitting, 1)


def check(config: DictConfig) -> None:
    """Raise :class:`InputError` for the first thing about the configuration that cannot work."""
    _check_choices(config)
    _check_batch(config)
    _check_parallelism(config)
    _check_objective(config)


def _choice(config: DictConfig, key: str, valid: Sequence[Any]) -> None:
    value = OmegaConf.select(config, key)
    if value not in valid:
        raise InputError(f"{key}={value} is not one of {', '.join(map(str, valid))}")


def _check_choices(config: DictConfig) -> None:
    _choice(config, "launcher", ("torchrun", "ray"))
    _choice(config, "trainer.reduction", REDUCTIONS)
    _choice(config, "precision", ("fp32", "bf16"))
    _choice(config, "export.dtype", _DTYPES)
    _choice(config, "trainer.resume_mode", ("auto", "disable", "resume_path"))
    _choice(config, "data.overlong", ("drop", "truncate", "error"))
    _choice(config, "optim.lr_scheduler_type", ("constant", "cosine"))
    steps = config.trainer.total_training_steps
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise InputError(f"trainer.total_training_steps={steps} must be at least 1, or null for whole epochs")
    if not isinstance(config.trainer.seed, int) or config.trainer.seed < 0:
        raise InputError(f"trainer.seed={config.trainer.seed} must be a whole number of at least 0")
    if not config.optim.clip_grad or config.optim.clip_grad < 0:
        raise InputError(f"optim.clip_grad={config.optim.clip_grad} must be above 0; a large number switches it off")
    if config.trainer.device == "cpu":
        _choice(config, "engine.strategy", ("fsdp2",))
    for key in ("train_batch_size", "max_length", "micro_batch_size_per_gpu"):
        value = config.data[key]
        if not isinstance(value, int) or value < 1:
            raise InputError(f"data.{key}={value} must be a whole number of at least 1")
    for key in ("save_freq", "test_freq"):
        value = config.trainer[key]
        if value != "after_each_epoch" and (not isinstance(value, int) or value == 0):
            raise InputError(f"trainer.{key}={value} must be a number of steps, -1 (never) or after_each_epoch")


def _check_batch(config: DictConfig) -> None:
    data, ranks = config.data, data_parallel_size(config)
    if data.train_batch_size % ranks:
        raise InputError(
            f"data.train_batch_size={data.train_batch_size} is not divisible by {ranks} data-parallel ranks; "
            f"use a multiple of {ranks} or change trainer.n_gpus_per_node"
        )
    share = data.train_batch_size // ranks
    if not data.use_dynamic_bsz and share % data.micro_batch_size_per_gpu:
        raise InputError(
            f"data.micro_batch_size_per_gpu={data.micro_batch_size_per_gpu} does not divide a rank's {share} rows per "
            f"step ({data.train_batch_size} over {ranks} ranks); use a divisor of {share}, or auto"
        )
    if data.use_dynamic_bsz and config.trainer.reduction.startswith("micro_batch"):
        raise InputError(
            f"trainer.reduction={config.trainer.reduction} depends on micro-batches of fixed size; "
            "set data.use_dynamic_bsz=false"
        )
    if data.use_dynamic_bsz and (
        data.max_token_len_per_gpu * config.engine.ulysses_sequence_parallel_size < data.max_length
    ):
        raise InputError(
            f"data.max_token_len_per_gpu={data.max_token_len_per_gpu} is below data.max_length={data.max_length}: "
            "the longest row would not fit a forward pass"
        )


def _check_parallelism(config: DictConfig) -> None:
    sequence = config.engine.ulysses_sequence_parallel_size
    attention = config.model.override_config.get("attn_implementation", "flash_attention_2")
    if sequence > 1 and not (str(attention).startswith("flash") and importlib.util.find_spec("flash_attn")):
        raise InputError(
            f"engine.ulysses_sequence_parallel_size={sequence} needs flash attention (flash-attn installed and "
            "model.override_config.attn_implementation=flash_attention_2): with sdpa each rank would attend only to "
            "its own part of a sequence"
        )
    if sequence > 1 and not config.model.use_remove_padding:
        raise InputError("engine.ulysses_sequence_parallel_size > 1 needs model.use_remove_padding=true")
    if world_size(config) % sequence:
        raise InputError(
            f"{world_size(config)} ranks are not divisible by engine.ulysses_sequence_parallel_size={sequence}"
        )
    if config.engine.pad_to_length and not config.model.use_fused_kernels:
        raise InputError("engine.pad_to_length cannot be combined with verl's logits hook; set it to false")


def _check_objective(config: DictConfig) -> None:
    objective = build_objective(OmegaConf.to_container(config.objective, resolve=True))
    unknown = sorted(objective.requires - set(ROW_FIELDS) - COMPUTED_FIELDS)
    if unknown:
        raise InputError(
            f"objective {config.objective._target_} requires {', '.join(unknown)}, which this trainer does not provide"
        )
    if config.model.use_fused_kernels and "entropy" in objective.requires:
        raise InputError("model.use_fused_kernels=true returns no logits, which the objective's entropy needs")
