"""The configuration of a command that samples from a model for a set of problems."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_dft.config import blamed, compose, split_config_name
from verl_dft.errors import InputError
from verl_dft.grading.pool import ANSWER_TYPES
from verl_dft.sampling.ask import Sampling


@blamed
def compose_sampling(config_name: str, argv: Sequence[str], *, need_model: bool = True) -> DictConfig:
    """``configs/<config_name>.yaml`` (which has ``sampler`` among its defaults) with overrides.

    ``--dry-run`` sets ``dry_run=true``; ``--config-name NAME`` takes another configuration.

    Raises:
        InputError: no model or no ``output_dir``, or whatever composing is refused for.
    """
    argv = ["dry_run=true" if argument == "--dry-run" else argument for argument in argv]
    name, overrides = split_config_name(argv, config_name)
    config = compose(name, overrides)
    if need_model and not config.model.path:
        raise InputError("no model was given; add model=FOLDER or model=HUB_NAME")
    if not config.output_dir:
        raise InputError("output_dir is not set; give output_dir=FOLDER, where samples and results are written")
    check_sampler(plain(config))
    return config


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as plain dicts and lists, interpolations resolved. Raises InputError where one leads nowhere."""
    if not isinstance(config, DictConfig):
        return dict(config)
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{str(error).partition(chr(10))[0]}; give the key a value") from None


def check_sampler(config: Mapping[str, Any]) -> None:
    """Raise InputError for the first of the keys of ``configs/sampler.yaml`` that cannot work."""
    for key in ("shard_size", "num_replicas"):
        whole_number(key, config[key], 1)
    whole_number("engine.tensor_parallel_size", config["engine"]["tensor_parallel_size"], 1)
    whole_number("seed", config["seed"], 0)
    for key in ("deterministic", "overwrite", "want_logp"):
        if not isinstance(config.get(key, False), bool):
            raise InputError(f"{key}={config[key]}; it must be true or false")
    if config.get("answer_type", "auto") not in ANSWER_TYPES:
        raise InputError(f"answer_type={config['answer_type']} is not one of {', '.join(ANSWER_TYPES)}")


def sampling_of(config: Mapping[str, Any], where: str = "") -> Sampling:
    """``temperature, top_p, top_k, max_tokens`` of a mapping, checked. ``where`` is a prefix of the keys' names.

    Raises:
        InputError: a value out of its range.
    """
    whole_number(f"{where}max_tokens", config["max_tokens"], 1)
    whole_number(f"{where}top_k", config["top_k"], 0)
    temperature, top_p = config["temperature"], config["top_p"]
    if not _is_number(temperature) or temperature < 0:
        raise InputError(f"{where}temperature={temperature}; it must be a number of at least 0")
    if not _is_number(top_p) or not 0 < top_p <= 1:
        raise InputError(f"{where}top_p={top_p}; it must be above 0 and at most 1")
    return Sampling(float(temperature), float(top_p), config["top_k"], config["max_tokens"])


def check_count(config: Mapping[str, Any], where: str = "") -> int:
    """``n`` of a mapping: a whole number of at least 1, and 1 at temperature 0. Raises InputError."""
    n = config["n"]
    whole_number(f"{where}n", n, 1)
    if config["temperature"] == 0 and n > 1:
        raise InputError(
            f"{where}temperature=0 gives the same text {n} times; use {where}n=1, or a temperature above 0"
        )
    return n


def whole_number(name: str, value: Any, least: int) -> int:
    """``value``, or InputError where it is not a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}={value}; it must be a whole number of at least {least}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
