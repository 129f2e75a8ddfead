"""Composing a run's configuration with Hydra, and answering a mistake with the valid names."""

import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, InterpolationToMissingValueError, OmegaConfBaseException

from verl_dft.errors import InputError
from verl_dft.installed import installed_objectives
from verl_dft.paths import configs_dir, recipes_dir

_MISTAKEN = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError, AssertionError,
             OSError, OmegaConfBaseException)  # fmt: skip
_OVERRIDE = re.compile(r"^(?P<prefix>\+\+|\+|~)?(?P<key>[^=]+?)(=(?P<value>.*))?$", re.DOTALL)

_Composed = TypeVar("_Composed")


def blamed(compose_and_check: Callable[..., _Composed]) -> Callable[..., _Composed]:
    """``compose_and_check(…, argv)`` that answers a value of another kind than it expects with that override's name.

    Checks look at what values are, and some of what a command line can hold (a list for a number) is found out by the
    error alone: the override without which there is none is to blame.
    """

    @functools.wraps(compose_and_check)
    def told(*arguments: Any, **options: Any) -> _Composed:
        try:
            return compose_and_check(*arguments, **options)
        except InputError:
            raise
        except _MISTAKEN as error:
            *before, argv = arguments
            if not argv:  # no override is to blame
                raise
            why = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no reason given'}"[:300]
            for index, item in enumerate(argv):
                try:
                    compose_and_check(*before, [*argv[:index], *argv[index + 1 :]], **options)
                except (InputError, *_MISTAKEN):
                    continue
                raise InputError(f"{item!r} cannot be used ({why})") from error
            raise InputError(f"{' '.join(map(repr, argv))} cannot be used together ({why})") from error

    return told


@blamed
def compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration ``config_name`` with command-line overrides.

    Args:
        config_name: a file of ``configs/`` or ``recipes/`` without ``.yaml`` (``sft``, ``laptop/gsm8k_dft``), or a
            path to a YAML file of your own.
        overrides: Hydra overrides (``objective=dft``, ``optim.lr=1e-5``, ``+new.key=1``). ``model=`` also takes a
            model folder or hub name, ``data=`` a parquet or jsonl file.

    Raises:
        InputError: unknown config, group option or key, with the valid ones and the nearest.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    from verl_dft import config_source

    config_source.register()
    folder, name = _locate(config_name)
    groups = _groups(folder)
    overrides = [changed for override in overrides for changed in _rewrite(override, overrides, groups)]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder), version_base="1.3"):
        try:
            config = hydra_compose(name, overrides=overrides)
            _check_missing_references(config)
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(_explain(error, folder, name)) from None
    if "objective" in config:
        from verl_dft.objectives import list_objectives

        list_objectives()  # a package that takes one of our names is refused here, not when the model is loaded
    return config


def _locate(config_name: str) -> tuple[Path, str]:
    path = Path(config_name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"config file {config_name} does not exist")
        return path.resolve().parent, path.stem
    for folder in (configs_dir(), recipes_dir()):
        if (folder / f"{config_name}.yaml").is_file():
            return folder, config_name
    names = [f.relative_to(root).with_suffix("").as_posix() for root in (configs_dir(), recipes_dir())
             for f in sorted(root.rglob("*.yaml"))]  # fmt: skip
    raise InputError(f"no config {config_name!r}{_nearest(config_name, names)}; see configs/ and recipes/")


def _groups(folder: Path) -> set[str]:
    """Names of the config groups beside the primary config and among ours."""
    return {p.name for root in (configs_dir(), folder) for p in root.iterdir() if p.is_dir()}


def group_options(group: str) -> list[str]:
    """What ``group=`` takes, e.g. ``group_options("objective")``: our files, and objectives of installed packages."""
    names = set(_shipped(group))
    if group == "objective":
        names |= set(installed_objectives())
    return sorted(names)


def _shipped(group: str) -> list[str]:
    """Names of a config group's files."""
    folder = configs_dir() / group
    return [f.stem for f in folder.glob("*.yaml")] if folder.is_dir() else []


def _rewrite(override: str, everything: Sequence[str], groups: set[str]) -> list[str]:
    """Shorthands: paths given for ``model=``/``data=``, objectives of other packages."""
    match = _OVERRIDE.match(override)
    if not match or match["prefix"] or match["value"] is None:
        return [override]
    key, value = match["key"], match["value"]
    if key == "model" and "model" in groups and value not in _shipped("model"):
        if "/" in value or Path(value).exists():
            return [f"model.path={_quote(value)}"]
    if key == "data" and "data" in groups and value not in _shipped("data"):
        if Path(value).suffix in (".parquet", ".jsonl", ".json", ".gz"):
            return ["data=files", f"data.train_files={_quote(value)}"]
    if key == "objective" and value not in _shipped("objective"):
        from verl_dft.objectives import objective_target

        return ["objective=custom", f"objective._target_={objective_target(value)}"]
    if key.startswith("objective.") and _custom_objective(everything):
        first = key == "objective._target_" and not any(o.startswith("objective=") for o in everything)
        return [*(["objective=custom"] if first else []), f"++{key}={value}"]
    return [override]


def _custom_objective(overrides: Iterable[str]) -> bool:
    """Whether the command line names a class rather than one of our objectives: its options are then its own."""
    shipped = _shipped("objective")
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "objective._target_" or (key == "objective" and (value == "custom" or value not in shipped)):
            return True
    return False


def _quote(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _nearest(wrong: str, valid: Iterable[str]) -> str:
    valid = sorted(set(valid))
    close = difflib.get_close_matches(wrong, valid, n=3, cutoff=0.6)
    if close:
        return f" (did you mean {' or '.join(close)}?)"
    return f" (valid: {', '.join(valid[:40])})" if valid else ""


def _explain(error: Exception, folder: Path, name: str) -> str:
    """One line for Hydra's several: which override is wrong and what would be right."""
    from verl_dft.config_source import verl_configs

    text = str(error)
    cause = error.__cause__
    if isinstance(cause, ConfigKeyError) or "is not in struct" in text or "Could not override" in text:
        match = re.search(r"Could not override '([^']+)'", text) or re.search(r"full_key: (\S+)", f"{text}{cause}")
        key = match[1] if match else "?"
        return f"config {name!r} has no key {key!r}{_nearest_key(key, folder, name)}; to add a new key, write +{key}=…"
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        valid = group_options(group) or [f.stem for f in (verl_configs() / group).glob("*.yaml")]
        return f"config group {group!r} has no option {option!r}{_nearest(option, valid)}"
    if match := re.search(r"Could not override '([^']+)'\.\s*No match in the defaults list", text):
        return f"config {name!r} has no group {match[1]!r}"
    return " ".join(text.split())


def _nearest_key(key: str, folder: Path, name: str) -> str:
    from hydra import compose as hydra_compose

    try:
        config = hydra_compose(name)
    except Exception:  # a recipe that needs an override to compose: the suggestion is a courtesy
        return ""
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    siblings = {str(k): f"{parent}.{k}" if parent else str(k) for k in node} if isinstance(node, DictConfig) else {}
    close = [siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=3, cutoff=0.6)]
    keys = _flatten(OmegaConf.to_container(config, resolve=False))
    close = close or [k for k in keys if k.rpartition(".")[2] == leaf]  # the right key in the wrong place
    if close:
        return f" (did you mean {' or '.join(close[:3])}?)"
    return f" (valid: {', '.join(siblings.values() or map(str, config))})"


def _flatten(config: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")


def _check_missing_references(config: DictConfig | ListConfig) -> None:
    """Resolve every interpolation now, so that a dangling one is reported before any work starts."""
    for key in config if isinstance(config, DictConfig) else range(len(config)):
        if OmegaConf.is_missing(config, key):
            continue
        try:
            value = config[key]
        except InterpolationToMissingValueError:  # a ??? that the caller asks for by name: see require
            continue
        if isinstance(value, DictConfig | ListConfig):
            _check_missing_references(value)


def require(config: DictConfig, *keys: str) -> None:
    """Raise :class:`InputError` for the first of ``keys`` that has no value."""
    for key in keys:
        if OmegaConf.select(config, key, throw_on_missing=False) is None:
            raise InputError(f"{key} is not set; give {key}=… on the command line")


def split_config_name(argv: Sequence[str], default: str) -> tuple[str, list[str]]:
    """Take ``--config-name NAME`` (or ``--config-name=NAME``) out of a command line."""
    name, rest, items = default, [], iter(argv)
    for item in items:
        if item == "--config-name":
            name = next(items, "")
            if not name:
                raise InputError("--config-name needs a name, e.g. --config-name laptop/gsm8k_dft")
        elif item.startswith("--config-name="):
            name = item.partition("=")[2]
        elif item.startswith("-"):
            raise InputError(f"unknown option {item!r}; overrides are key=value, e.g. optim.lr=1e-5")
        elif "=" not in item and not item.startswith("~"):
            raise InputError(f"{item!r} is not an override; write key=value, e.g. objective=dft")
        else:
            rest.append(item)
    return name, rest


def command_line() -> str:
    """The command being run, for manifests; without secrets."""
    import shlex

    from verl_dft.redact import redacted

    return redacted(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
