"""A run's configuration: composed, completed for the machine, and checked before anything is loaded."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_dft.config import blamed, compose, require, split_config_name
from verl_dft.data.dataset import OVERLONG
from verl_dft.errors import InputError
from verl_dft.objectives import Objective, build_objective
from verl_dft.training.evaluate_during import ON_FAILURE
from verl_dft.training.logprob import HEADS

ROW_FIELDS = {
    "advantage": "verl-dft groups",
    "behavior_logp": "verl-dft rewrite or verl-dft reject",
    "origin": "any builder",
}
"""Row columns an objective may require -> the builder that makes them."""

COMPUTED_FIELDS = frozenset({"ref_logp", "old_logp", "ema_logp", "entropy", "ref_kl", "exempt"})
"""What the trainer computes itself when an objective requires it (``ref_logp`` only where the rows have none)."""

_OF_OPTION = {"ema_logp": "ema_decay", "exempt": "exempt_tokens"}
"""Fields that the trainer can provide only by what the objective says in an option."""

_FROM_LOGITS = frozenset({"entropy", "ref_kl"})

MAX_AUTO_MICRO_BATCH = 16
REDUCTIONS = ("token_mean", "sequence_sum", "micro_batch_mean", "micro_batch_sum")
"""How per-token losses become one number; see ``bridge.loss_weight``."""
LOGGERS = {
    "console": None,
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "vemlp_wandb": "volcengine_ml_platform",
    "clearml": "clearml",
    "trackio": "trackio",
    "file": None,
    "rl_insight": "rl_insight",
}
"""verl's backends of ``trainer.logger`` -> the package each imports."""
_DTYPES = ("fp32", "bf16", "fp16")


@blamed
def compose_training(argv: Sequence[str]) -> DictConfig:
    """The checked configuration of ``verl-dft train`` for a command line."""
    name, overrides = split_config_name(argv, "sft")
    choose_hardware()
    config = compose(name, overrides)
    require(config, "model.path", "output_dir")
    with open_dict(config):
        _complete(config)
    check(config)
    return config


def choose_hardware() -> None:
    """Set ``VERL_DFT_HARDWARE``, which the configurations read, to what this machine has; the user's value stays."""
    if "VERL_DFT_HARDWARE" not in os.environ:
        os.environ["VERL_DFT_HARDWARE"] = "gpu" if has_accelerator() else "cpu"


def attention_for(precision: str) -> str:
    """What ``attn_implementation=auto`` means: flash attention where it is installed; it takes fp16 and bf16 only."""
    has_flash = importlib.util.find_spec("flash_attn") is not None and precision != "fp32"
    return "flash_attention_2" if has_flash else "sdpa"


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


def objective_of(config: DictConfig) -> Objective:
    """The run's objective with its options."""
    return build_objective(OmegaConf.to_container(config.objective, resolve=True))


def updates_per_step(config: DictConfig) -> int:
    """Optimizer updates of a step: ``data.train_batch_size`` over ``data.mini_batch_size``."""
    return config.data.train_batch_size // (config.data.mini_batch_size or config.data.train_batch_size)


def remarks(config: DictConfig) -> list[str]:
    """What is allowed but hardly meant."""
    if "old_logp" in objective_of(config).requires and updates_per_step(config) == 1:
        return ["one update per step: every ratio to the old policy is 1, as in SFT; set data.mini_batch_size"]
    return []


def _complete(config: DictConfig) -> None:
    """Fill in ``auto`` values that need no model or data."""
    config.output_dir = os.path.abspath(config.output_dir)  # a Ray worker's working directory is another
    if "WORLD_SIZE" in os.environ and config.launcher == "torchrun":  # started by torchrun: it knows the ranks
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        config.trainer.n_gpus_per_node = local
        config.trainer.nnodes = int(os.environ["WORLD_SIZE"]) // local
    attention = config.model.override_config.get("attn_implementation")
    if attention == "auto":
        config.model.override_config.attn_implementation = attention_for(config.precision)
    if config.model.use_remove_padding == "auto" and config.trainer.device != "cpu":
        flash = config.model.override_config.get("attn_implementation", "flash_attention_2")
        config.model.use_remove_padding = str(flash).startswith("flash")
    if config.data.micro_batch_size_per_gpu == "auto":
        share = (config.data.mini_batch_size or config.data.train_batch_size) // data_parallel_size(config)
        fitting = (size for size in range(min(share, MAX_AUTO_MICRO_BATCH), 0, -1) if share % size == 0)
        config.data.micro_batch_size_per_gpu = next(fitting, 1)


def check(config: DictConfig) -> None:
    """Raise :class:`InputError` for the first thing about the configuration that cannot work."""
    _check_choices(config)
    _check_batch(config)
    _check_parallelism(config)
    _check_objective(config)


def check_choice(config: DictConfig, key: str, valid: Sequence[Any]) -> None:
    """Raise :class:`InputError` where the value of ``key`` is not among ``valid``."""
    value = OmegaConf.select(config, key)
    if value not in valid:
        raise InputError(f"{key}={value} is not one of {', '.join(map(str, valid))}")


def _check_choices(config: DictConfig) -> None:
    check_choice(config, "launcher", ("torchrun", "ray"))
    check_choice(config, "trainer.reduction", REDUCTIONS)
    check_choice(config, "trainer.log_prob_head", HEADS)
    check_choice(config, "precision", ("fp32", "bf16"))
    check_choice(config, "export.dtype", _DTYPES)
    check_choice(config, "trainer.resume_mode", ("auto", "disable", "resume_path"))
    if config.trainer.resume_mode == "resume_path" and not config.trainer.resume_from_path:
        raise InputError("trainer.resume_mode=resume_path needs trainer.resume_from_path=…/checkpoints/global_step_N")
    check_choice(config, "data.overlong", OVERLONG)
    check_choice(config, "optim.lr_scheduler_type", ("constant", "cosine"))
    steps = config.trainer.total_training_steps
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise InputError(f"trainer.total_training_steps={steps} must be at least 1, or null for whole epochs")
    if not isinstance(config.trainer.seed, int) or config.trainer.seed < 0:
        raise InputError(f"trainer.seed={config.trainer.seed} must be a whole number of at least 0")
    if not config.optim.clip_grad or config.optim.clip_grad < 0:
        raise InputError(f"optim.clip_grad={config.optim.clip_grad} must be above 0; a large number switches it off")
    check_choice(config, "engine.strategy", ("fsdp2",) if config.trainer.device == "cpu" else ("fsdp", "fsdp2"))
    check_loggers(config.trainer.logger)
    for key in ("train_batch_size", "max_length", "micro_batch_size_per_gpu"):
        value = config.data[key]
        if not isinstance(value, int) or value < 1:
            raise InputError(f"data.{key}={value} must be a whole number of at least 1")
    mini = config.data.mini_batch_size
    if mini is not None and (not isinstance(mini, int) or mini < 1):
        raise InputError(f"data.mini_batch_size={mini} must be a whole number of at least 1, or null")
    for key in ("save_freq", "test_freq"):
        value = config.trainer[key]
        if value != "after_each_epoch" and (not isinstance(value, int) or value == 0):
            raise InputError(f"trainer.{key}={value} must be a number of steps, -1 (never) or after_each_epoch")
    every = config.trainer.eval_every
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise InputError(f"trainer.eval_every={every} must be a number of steps of at least 1, or null (never)")
    check_choice(config, "trainer.eval_failure", ON_FAILURE)


def check_loggers(logger: str | Sequence[str]) -> None:
    """Raise :class:`InputError` for a logger that cannot be: verl would find out after the model is loaded."""
    for name in [logger] if isinstance(logger, str) else logger or ():
        if name not in LOGGERS:
            raise InputError(f"trainer.logger: {name!r} is not one of {', '.join(LOGGERS)}")
        if LOGGERS[name] and importlib.util.find_spec(LOGGERS[name]) is None:
            raise InputError(f"trainer.logger={name} needs a package that is not installed: {LOGGERS[name]}")


def _check_batch(config: DictConfig) -> None:
    data, ranks = config.data, data_parallel_size(config)
    if data.train_batch_size % ranks:
        raise InputError(
            f"data.train_batch_size={data.train_batch_size} is not divisible by {ranks} data-parallel ranks; "
            f"use a multiple of {ranks} or change trainer.n_gpus_per_node"
        )
    mini = data.mini_batch_size or data.train_batch_size
    if data.train_batch_size % mini or mini % ranks:
        raise InputError(
            f"data.mini_batch_size={mini} must divide data.train_batch_size={data.train_batch_size} and be a multiple "
            f"of the {ranks} data-parallel ranks; null is one update per step"
        )
    share = mini // ranks
    if not data.use_dynamic_bsz and share % data.micro_batch_size_per_gpu:
        raise InputError(
            f"data.micro_batch_size_per_gpu={data.micro_batch_size_per_gpu} does not divide a rank's {share} rows per "
            f"update ({mini} over {ranks} ranks); use a divisor of {share}, or auto"
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
    if str(attention).startswith("flash") and config.precision == "fp32":
        raise InputError(
            f"model.override_config.attn_implementation={attention} computes in bf16 or fp16, not in precision=fp32; "
            "set precision=bf16, or attn_implementation=sdpa"
        )
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
    if config.launcher == "torchrun" and config.trainer.nnodes > 1 and "RANK" not in os.environ:
        missing = [name for name in ("MASTER_ADDR", "NODE_RANK") if not os.environ.get(name)]
        if missing:
            raise InputError(
                f"trainer.nnodes={config.trainer.nnodes} needs {' and '.join(missing)} in the environment: run this "
                "command on every machine, with export MASTER_ADDR=(address of the first) and export NODE_RANK=(0 on "
                "the first, 1 on the next, …); or launcher=ray on a Ray cluster"
            )
    if config.engine.pad_to_length and not config.model.use_fused_kernels:
        raise InputError("engine.pad_to_length cannot be combined with verl's logits hook; set it to false")


def _check_objective(config: DictConfig) -> None:
    objective = objective_of(config)
    for name, option in _OF_OPTION.items():
        if name in objective.requires and not hasattr(objective, option):
            raise InputError(
                f"objective {config.objective._target_} requires {name}, for which it must have an option {option}"
            )
    if config.reference.path and not objective.requires & {"ref_logp", "ref_kl"}:
        raise InputError(
            f"reference.path={config.reference.path} is set, but objective {config.objective._target_} compares with "
            "no reference; remove it"
        )
    if "ema_logp" in objective.requires and config.engine.strategy != "fsdp2":
        raise InputError(
            f"engine.strategy={config.engine.strategy} cannot score with a moving average of the weights; "
            "set engine.strategy=fsdp2"
        )
    if config.trainer.log_prob_head == "chunked" and (config.model.use_fused_kernels or "ref_kl" in objective.requires):
        why = (
            "model.use_fused_kernels=true" if config.model.use_fused_kernels else "an objective's ref_kl (from logits)"
        )
        raise InputError(f"trainer.log_prob_head=chunked cannot be combined with {why}; set it to auto")
    from_logits = sorted(objective.requires & _FROM_LOGITS)
    if config.model.use_fused_kernels and from_logits:
        raise InputError(
            f"model.use_fused_kernels=true returns no logits, which the objective's {', '.join(from_logits)} needs"
        )
