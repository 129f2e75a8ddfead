"""A recipe for one run: its scale, options and command line applied."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.recipes.load import SCALES, Recipe, check_keys, nearest, parse_value, shared_scales

RESERVED = ("scale", "output_dir", "at_once", "hardware", "redo", "share")
_ESTIMATE = "estimate."


@dataclass
class Settings:
    """What decides the steps of a run, besides the recipe's own lines."""

    recipe: Recipe
    scale: str
    root: Path
    keys: dict[str, Any]
    patches: list[tuple[str, Mapping[str, Any]]]
    """Changes of steps, weakest first: (a step's name, or a verb with ``verb:`` before it; the change)."""
    choices: dict[str, str]
    keep: dict[str, list[str]] = field(default_factory=dict)
    """Loop variable -> names of the arms that the command line keeps."""
    hardware: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    estimate: dict[str, Any] = field(default_factory=dict)
    at_once: int = 1
    share: bool = False
    """Whether trainings share a process, and evaluations a process and its engine."""
    redo: list[str] = field(default_factory=list)


def settings_of(recipe: Recipe, overrides: Sequence[str]) -> Settings:
    """The settings of a command line.

    Raises:
        InputError: an unknown key, scale or choice, with the valid ones.
    """
    given = [_split(item) for item in overrides]
    scale = str(dict(given).get("scale", "tiny"))
    if scale not in SCALES:
        raise InputError(f"scale={scale} is not one of {', '.join(SCALES)}")
    layers = [shared_scales().get(scale) or {}, recipe.scales.get(scale) or {}]
    choices = _choices(recipe, given)
    layers += [recipe.options[option][choice] or {} for option, choice in choices.items()]
    found = Settings(recipe, scale, Path("runs", "recipes", scale), dict(recipe.keys), [], choices)
    for number, layer in enumerate(layers):
        keys = layer.get("keys") or {}
        if number:
            check_keys(recipe.path, f"keys at scale={scale}", keys, recipe.keys)
        found.keys |= {key: value for key, value in keys.items() if key in recipe.keys}
        found.patches += [(f"verb:{name}", change or {}) for name, change in (layer.get("verbs") or {}).items()]
        found.patches += [(name, change or {}) for name, change in (layer.get("steps") or {}).items()]
        found.hardware = layer.get("hardware", found.hardware)
        found.share = layer.get("share", found.share)
        found.env |= {key: str(value) for key, value in (layer.get("env") or {}).items()}
        found.estimate |= layer.get("estimate") or {}
    for key, value in given:
        _apply(found, key, value)
    found.root = Path(found.root).absolute()
    return found


def _split(item: str) -> tuple[str, Any]:
    key, separator, text = item.partition("=")
    if not separator or not key or key.startswith("-"):
        raise InputError(f"{item!r} is not KEY=VALUE, e.g. scale=tiny")
    return key, parse_value(text)


def _choices(recipe: Recipe, given: Sequence[tuple[str, Any]]) -> dict[str, str]:
    chosen = {option: str(choices["default"]) for option, choices in recipe.options.items()}
    for key, value in given:
        if key in recipe.options:
            valid = [choice for choice in recipe.options[key] if choice != "default"]
            if str(value) not in valid:
                raise InputError(f"{key}={value} is not one of {', '.join(valid)}")
            chosen[key] = str(value)
    return chosen


def _apply(found: Settings, key: str, value: Any) -> None:
    """One ``key=value`` of the command line."""
    recipe = found.recipe
    if key in recipe.options or key == "scale":
        return
    if key == "redo":
        found.redo = _names(value)
    elif key == "output_dir":
        found.root = Path(str(value)).expanduser()
    elif key == "at_once":
        if not isinstance(value, int) or value < 1:
            raise InputError(f"at_once={value} must be a whole number of at least 1")
        found.at_once = value
    elif key == "share":
        if not isinstance(value, bool):
            raise InputError(f"share={value} must be true or false")
        found.share = value
    elif key == "hardware":
        if value not in ("cpu", "gpu", None):
            raise InputError(f"hardware={value} is not one of cpu, gpu, null")
        found.hardware = value
    elif key.startswith(_ESTIMATE):
        name = key.removeprefix(_ESTIMATE)
        if name not in found.estimate:
            raise InputError(f"unknown key {key!r}{nearest(name, found.estimate)}")
        if not isinstance(value, int | float) or value <= 0:
            raise InputError(f"{key}={value} must be a number above 0")
        found.estimate[name] = value
    elif key.startswith(("steps.", "verbs.")):
        found.patches.append(_step_change(recipe, key, value))
    elif not _set_key(found.keys, key, value):
        _keep(found, key, value)


def _step_change(recipe: Recipe, key: str, value: Any) -> tuple[str, Mapping[str, Any]]:
    kind, _, rest = key.partition(".")
    name, _, name_of_key = rest.partition(".")
    verbs = sorted({step["verb"].split()[0] for step in recipe.steps.values()})
    verbs += ["dpo"] if "train" in verbs else []
    valid = list(recipe.steps) if kind == "steps" else verbs
    if name not in valid or not name_of_key:
        raise InputError(f"{key}: write {kind}.NAME.KEY=VALUE, with one of {', '.join(valid)} as NAME")
    target = name if kind == "steps" else f"verb:{name}"
    return target, {"config": value} if name_of_key == "config" else {"with": {name_of_key: value}}


def _set_key(keys: dict[str, Any], key: str, value: Any) -> bool:
    """Set ``a`` or ``a.b.c`` where it is there (names may have dots in them). Returns whether it was."""
    if key in keys:
        keys[key] = value
        return True
    for name, inner in keys.items():
        if key.startswith(f"{name}.") and isinstance(inner, dict):
            inner, rest = dict(inner), key.removeprefix(f"{name}.")
            if _set_key(inner, rest, value):
                keys[name] = inner
                return True
    return False


def _keep(found: Settings, key: str, value: Any) -> None:
    variables = loop_variables(found.recipe)
    if key not in variables:
        valid = [*RESERVED, *found.recipe.options, *found.recipe.keys, *variables, "steps.…", "verbs.…", "estimate.…"]
        raise InputError(f"{found.recipe.name} has no key {key!r}{nearest(key, dict.fromkeys(valid))}")
    found.keep[key] = _names(value)


def loop_variables(recipe: Recipe) -> list[str]:
    """Names of the variables that any step loops over."""
    return list(dict.fromkeys(name for step in recipe.steps.values() for name in step.get("for") or {}))


def _names(value: Any) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def changes_of(found: Settings, step: str, verb: str, objective: Any = None) -> Iterator[Mapping[str, Any]]:
    """The changes that hold for a step, weakest first: of each layer those of its verb come before its own.

    ``train`` with ``objective=dpo`` is ``dpo`` here: it is another trainer, with another configuration.
    """
    kind = "dpo" if (verb, objective) == ("train", "dpo") else verb.split()[0]
    for target, change in found.patches:
        if target in (step, f"verb:{kind}"):
            yield change
