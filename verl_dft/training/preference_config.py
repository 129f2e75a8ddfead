"""The configuration of a DPO run: ``configs/dpo.yaml``, completed for the machine and checked. Imports no TRL."""

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_dft.config import blamed, compose, group_options, require, split_config_name
from verl_dft.data.dataset import OVERLONG
from verl_dft.errors import InputError
from verl_dft.paths import configs_dir
from verl_dft.training.configure import attention_for, check_choice, check_loggers, has_accelerator
from verl_dft.training.resume import Checkpoint, resume_point

CONFIG = "dpo"
TRL_VERSION = "0.27.0"
"""The newest that verl works beside; pyproject.toml pins it in the extra ``dpo``."""
MAX_AUTO_MICRO_BATCH = 8
_INSTALL = "pip install 'verl-dft[dpo]'"
_DEVICES = {"cpu": "cpu", "gpu": "cuda"}
_PAIR_FILES = (".parquet", ".jsonl", ".json", ".gz")


def wanted(argv: Sequence[str]) -> bool:
    """Whether a command line of ``verl-dft train`` asks for DPO: ``objective=dpo``, or ``--config-name dpo``."""
    argv = list(argv)
    named = f"--config-name={CONFIG}" in argv or ("--config-name", CONFIG) in zip(argv, argv[1:], strict=False)
    return named or f"objective={CONFIG}" in argv


def check_trl() -> None:
    """Raise :class:`InputError` unless the one version of TRL that fits is installed."""
    if importlib.util.find_spec("trl") is None:
        raise InputError(f"objective=dpo needs TRL, which is not installed: {_INSTALL}")
    found = importlib.metadata.version("trl")
    if found != TRL_VERSION:
        raise InputError(f"objective=dpo needs trl {TRL_VERSION}, {found} is installed: {_INSTALL}")


@blamed
def compose_dpo(argv: Sequence[str]) -> DictConfig:
    """The checked configuration of a command line, ``auto`` values filled in.

    Raises:
        InputError: the first thing about it that cannot work.
    """
    name, overrides = split_config_name(argv, CONFIG)
    config = compose(name, [_rewrite(override) for override in overrides if override != f"objective={CONFIG}"])
    require(config, "model.path", "output_dir", "data.train_files")
    config.output_dir = os.path.abspath(config.output_dir)
    if isinstance(config.data.train_files, str):
        config.data.train_files = [config.data.train_files]
    _complete(config)
    _check_choices(config)
    _check_numbers(config)
    _check_batch(config)
    return config


def resume_from(config: DictConfig, thorough: bool = False) -> Checkpoint | None:
    """:func:`resume_point` with a run's configuration."""
    trainer = config.trainer
    return resume_point(
        trainer.default_local_dir,
        mode=trainer.resume_mode,
        given=trainer.resume_from_path,
        world_size=trainer.n_gpus_per_node,
        thorough=thorough,
    )


def _rewrite(override: str) -> str:
    """The shorthands of ``verl-dft train``: a file for ``data=``, a name of configs/model, a kind of hardware."""
    key, _, value = override.partition("=")
    if key == "data":
        if Path(value).suffix not in _PAIR_FILES:
            raise InputError(f"data={value}: objective=dpo takes a file of preference pairs, as verl-dft reject writes")
        return f"data.train_files='{value}'"
    if key == "model" and value in group_options("model"):
        return f"model.path={OmegaConf.load(configs_dir() / 'model' / f'{value}.yaml').path}"
    if key == "hardware" and value in _DEVICES:
        return f"trainer.device={_DEVICES[value]}"
    return override


def _complete(config: DictConfig) -> None:
    """Fill in ``auto`` values, but for the micro-batch."""
    trainer, model = config.trainer, config.model
    if trainer.nnodes != 1 or os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1"):
        raise InputError(
            "objective=dpo trains on one machine: trainer.nnodes=1; trainer.n_gpus_per_node sets its ranks"
        )
    if "WORLD_SIZE" in os.environ:  # started by torchrun: it knows the ranks
        trainer.n_gpus_per_node = int(os.environ["WORLD_SIZE"])
    if trainer.device == "auto":
        trainer.device = "cuda" if has_accelerator() else "cpu"
    if config.precision == "auto":
        config.precision = "fp32" if trainer.device == "cpu" else "bf16"
    if model.enable_gradient_checkpointing == "auto":
        model.enable_gradient_checkpointing = trainer.device != "cpu"
    if model.override_config.attn_implementation == "auto":
        model.override_config.attn_implementation = attention_for(config.precision)


def _check_choices(config: DictConfig) -> None:
    check_choice(config, "precision", ("fp32", "bf16"))
    check_choice(config, "export.dtype", ("fp32", "bf16", "fp16"))
    check_choice(config, "trainer.device", ("cpu", "cuda"))
    check_choice(config, "trainer.resume_mode", ("auto", "disable", "resume_path"))
    check_choice(config, "data.overlong", OVERLONG)
    check_choice(config, "optim.lr_scheduler_type", ("cosine", "constant"))
    trainer = config.trainer
    if trainer.resume_mode == "resume_path" and not trainer.resume_from_path:
        raise InputError("trainer.resume_mode=resume_path needs trainer.resume_from_path=…/checkpoints/global_step_N")
    if config.reference.path and config.model.lora_rank:
        raise InputError("reference.path cannot be combined with model.lora_rank: the model without adapters is one")
    check_loggers(trainer.logger)


def _check_numbers(config: DictConfig) -> None:
    for key in ("data.train_batch_size", "data.max_length", "trainer.total_epochs", "trainer.n_gpus_per_node"):
        _whole(config, key, least=1)
    for key in ("trainer.seed", "model.lora_rank"):
        _whole(config, key, least=0)
    if config.trainer.total_training_steps is not None:
        _whole(config, "trainer.total_training_steps", least=1)
    frequency = config.trainer.save_freq
    if type(frequency) is not int or frequency == 0:
        raise InputError(f"trainer.save_freq={frequency} must be a number of steps, or -1 (after the last only)")
    for key in ("objective.beta", "optim.lr", "optim.clip_grad"):
        _number(config, key, lambda value: value > 0, "above 0")
    for key in ("optim.weight_decay", "optim.lr_warmup_steps_ratio"):
        _number(config, key, lambda value: value >= 0, "at least 0")
    _number(config, "objective.label_smoothing", lambda value: 0 <= value < 0.5, "in [0, 0.5)")
    if config.objective.rpo_alpha is not None:
        _number(config, "objective.rpo_alpha", lambda value: value > 0, "above 0, or null")


def _check_batch(config: DictConfig) -> None:
    data, ranks = config.data, config.trainer.n_gpus_per_node
    if data.train_batch_size % ranks:
        raise InputError(
            f"data.train_batch_size={data.train_batch_size} is not divisible by {ranks} ranks; use a multiple of "
            f"{ranks} or change trainer.n_gpus_per_node"
        )
    share = data.train_batch_size // ranks
    if data.micro_batch_size_per_gpu == "auto":
        data.micro_batch_size_per_gpu = max(k for k in range(1, MAX_AUTO_MICRO_BATCH + 1) if share % k == 0)
    _whole(config, "data.micro_batch_size_per_gpu", least=1)
    if share % data.micro_batch_size_per_gpu:
        raise InputError(
            f"data.micro_batch_size_per_gpu={data.micro_batch_size_per_gpu} does not divide a rank's {share} pairs per "
            "step; use a divisor, or auto"
        )


def _whole(config: DictConfig, key: str, least: int) -> None:
    value = OmegaConf.select(config, key)
    if type(value) is not int or value < least:
        raise InputError(f"{key}={value} must be a whole number of at least {least}")


def _number(config: DictConfig, key: str, holds: Any, what: str) -> None:
    value = OmegaConf.select(config, key)
    if type(value) not in (int, float) or not holds(value):
        raise InputError(f"{key}={value} must be a number {what}")
