"""The objectives, by name: ``get_objective("dft", alpha=1.0)``.

The table below is all there is to registering one of ours. A package of yours adds its own through the entry-point
group ``verl_dft.objectives`` (``name = "my_pkg.losses:MyObjective"``).
"""

import dataclasses
import difflib
import importlib
from collections.abc import Callable
from typing import Any

from verl_dft.errors import InputError
from verl_dft.installed import GROUP, installed_objectives
from verl_dft.objectives.batch import OPTIONAL_FIELDS, Objective, TokenBatch, TokenLoss, token_loss

_TABLE = {
    "sft": "verl_dft.objectives.sft.SFT",
    "dft": "verl_dft.objectives.dft.DFT",
    "iw_sft": "verl_dft.objectives.iw_sft.IWSFT",
    "is_sft": "verl_dft.objectives.is_sft.ISSFT",
    "asft": "verl_dft.objectives.asft.ASFT",
    "psft": "verl_dft.objectives.psft.PSFT",
    "gft": "verl_dft.objectives.gft.GFT",
    "chord": "verl_dft.objectives.chord.CHORD",
    "focal": "verl_dft.objectives.focal.Focal",
    "eaft": "verl_dft.objectives.eaft.EAFT",
    "chord_mix": "verl_dft.objectives.chord_mix.CHORDMix",
    "luffy": "verl_dft.objectives.luffy.LUFFY",
}

__all__ = [
    "OPTIONAL_FIELDS",
    "Objective",
    "TokenBatch",
    "TokenLoss",
    "build_objective",
    "get_objective",
    "list_objectives",
    "objective_name",
    "objective_target",
    "token_loss",
]


def _targets() -> dict[str, str]:
    plugins = installed_objectives()
    clash = sorted(set(plugins) & set(_TABLE))
    if clash:
        raise InputError(f"entry points of group {GROUP} reuse the built-in name(s) {', '.join(clash)}; rename them")
    return {**_TABLE, **plugins}


def list_objectives() -> list[str]:
    """Names of the built-in objectives and of those that installed packages add."""
    return sorted(_targets())


def objective_target(name: str) -> str:
    """Dotted path of the class behind a name; :class:`InputError` lists the valid names."""
    targets = _targets()
    if name not in targets:
        close = difflib.get_close_matches(name, targets, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(f"unknown objective {name!r}; valid: {', '.join(sorted(targets))}.{hint}")
    return targets[name]


def get_objective(name: str, **options: Any) -> Objective:
    """The objective ``name`` with its options, e.g. ``get_objective("dft", alpha=1.0)``."""
    return build_objective({"_target_": objective_target(name), **options})


def build_objective(config: dict[str, Any]) -> Objective:
    """The objective of a config node: ``_target_`` is a class's dotted path, the rest are its options."""
    options = dict(config)
    target = options.pop("_target_", None)
    if not target or target == "???":
        raise InputError("objective._target_ is not set; give a class, e.g. objective._target_=my_pkg.MyObjective")
    factory = _load(str(target))
    if dataclasses.is_dataclass(factory):
        valid = [f.name for f in dataclasses.fields(factory) if f.init]
        for name in options:
            if name not in valid:
                raise InputError(f"objective {target} has no option {name!r}; valid: {', '.join(valid) or 'none'}")
    try:
        objective = factory(**options)
    except TypeError as error:
        raise InputError(f"objective {target}: {error}") from None
    requires = getattr(objective, "requires", None)
    if not isinstance(requires, frozenset) or not requires <= set(OPTIONAL_FIELDS):
        raise InputError(
            f"objective {target}: `requires` must be a frozenset of {', '.join(OPTIONAL_FIELDS)}; got {requires!r}"
        )
    return objective


def objective_name(config: dict[str, Any]) -> str:
    """The name used in metrics and tables: the registered one, else the class's name in lower case."""
    target = str(config["_target_"])
    return next((name for name, path in _targets().items() if path == target), target.rpartition(".")[2].lower())


def _load(target: str) -> Callable[..., Objective]:
    module, _, attribute = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"cannot import objective {target!r} ({error}); built-in names: {', '.join(list_objectives())}"
        ) from None
