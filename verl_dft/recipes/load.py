"""Recipe files: found, read, and refused in one line where a key is unknown. The format: docs/recipes.md."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from verl_dft.errors import InputError
from verl_dft.paths import recipes_dir

SCALES = ("tiny", "laptop", "paper")
_TOP = ("title", "source", "keys", "steps", "scales", "options")
_STEP = ("verb", "config", "with", "drop", "args", "for", "only", "scales", "after", "outputs")
_PATCH = ("keys", "verbs", "steps")
_SCALE = (*_PATCH, "hardware", "env", "share", "estimate")
_STEP_PATCH = ("config", "with", "drop", "only")


@dataclass(frozen=True)
class Recipe:
    """A recipe file as it is written, its sections filled in where they are missing."""

    name: str
    path: Path
    title: str
    source: str
    keys: dict[str, Any]
    steps: dict[str, dict[str, Any]]
    scales: dict[str, dict[str, Any]]
    options: dict[str, dict[str, Any]]


def recipe_names() -> list[str]:
    """Names of the shipped recipes: ``gft/sft_grpo`` and its like."""
    found = []
    for path in sorted(recipes_dir().rglob("*.yaml")):
        if path.name not in ("expected.yaml", "scales.yaml") and "\nsteps:" in path.read_text(encoding="utf-8"):
            found.append(path.relative_to(recipes_dir()).with_suffix("").as_posix())
    return found


def load_recipe(name: str) -> Recipe:
    """The recipe of a name, or of a YAML file of your own.

    Raises:
        InputError: no such recipe, or a file that is not one; the line names the key.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else recipes_dir() / f"{name}.yaml"
    if not path.is_file():
        raise InputError(f"no recipe {name!r}{nearest(name, recipe_names())}; see verl-dft recipe list")
    content = read_yaml(path)
    if not isinstance(content, dict) or "steps" not in content:
        raise InputError(f"{path} has no steps, so it is no recipe; a verb runs it: --config-name {name}")
    check_keys(path, "", content, _TOP)
    recipe = Recipe(
        path.stem if name.endswith((".yaml", ".yml")) else name,
        path,
        str(content.get("title", name)),
        str(content.get("source", "")),
        mapping(path, "keys", content.get("keys")),
        mapping(path, "steps", content["steps"]),
        mapping(path, "scales", content.get("scales")),
        mapping(path, "options", content.get("options")),
    )
    _check(recipe)
    return recipe


def shared_scales() -> dict[str, dict[str, Any]]:
    """``recipes/scales.yaml``: what a scale changes in every recipe."""
    path = recipes_dir() / "scales.yaml"
    scales = mapping(path, "", read_yaml(path))
    for scale, patch in scales.items():
        _check_patch(path, scale, patch, _SCALE)
    return scales


def read_yaml(path: Path) -> Any:
    """A YAML file. Raises InputError for bad YAML and for a key given twice."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, which YAML would let pass."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.YAMLError(f"{key!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep=deep)


_NUMBER = re.compile(r"[-+]?(\d+|(\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+)")
# YAML 1.1 would read 1:3:4 as a number of seconds, and 1e-6 as a text
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    text = str(loader.construct_scalar(node))
    return int(text) if text.lstrip("+-").isdigit() else float(text)


_Loader.add_implicit_resolver("!number", re.compile(f"^(?:{_NUMBER.pattern})$"), list("-+.0123456789"))
_Loader.add_constructor("!number", _number)


def parse_value(text: str) -> Any:
    """A value of the command line, read as in a recipe; what is no YAML is a text."""
    try:
        return yaml.load(text, _Loader) if text else ""
    except yaml.YAMLError:
        return text


def mapping(path: Path, where: str, value: Any) -> dict[str, Any]:
    """``value`` as a mapping with text keys, null as an empty one. Raises InputError."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{path}: {where or 'the file'} must be a mapping of names to values")
    return value


def check_keys(path: Path, where: str, given: Mapping[str, Any], valid: Iterable[str]) -> None:
    """Raise InputError for a key that is not among ``valid``."""
    valid = list(valid)
    for key in given:
        if key not in valid:
            raise InputError(f"{path}: {where + ': ' if where else ''}unknown key {key!r}{nearest(key, valid)}")


def nearest(wrong: str, valid: Iterable[str]) -> str:
    """`` (did you mean …?)``, or the valid names where none is near."""
    valid = list(valid)
    close = difflib.get_close_matches(wrong, valid, n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(close)}?)" if close else f" (valid: {', '.join(valid)})" if valid else ""


# ---- checks ----


def _check(recipe: Recipe) -> None:
    path = recipe.path
    for name, step in recipe.steps.items():
        step = mapping(path, f"steps.{name}", step)
        check_keys(path, f"steps.{name}", step, _STEP)
        if not isinstance(step.get("verb"), str):
            raise InputError(f"{path}: steps.{name} has no verb, e.g. verb: train")
        for key in ("for", "only", "outputs"):
            mapping(path, f"steps.{name}.{key}", step.get(key))
        for output, file in (step.get("outputs") or {}).items():
            if Path(str(file)).is_absolute() or ".." in Path(str(file)).parts:
                raise InputError(f"{path}: steps.{name}.outputs.{output}={file} is outside the step's folder")
        check_keys(path, f"steps.{name}.scales", dict.fromkeys(step.get("scales") or ()), SCALES)
        check_keys(path, f"steps.{name}.after", dict.fromkeys(step.get("after") or ()), recipe.steps)
    check_keys(path, "scales", recipe.scales, SCALES)
    for scale, patch in recipe.scales.items():
        _check_patch(path, f"scales.{scale}", patch, _SCALE, recipe)
    for option, choices in recipe.options.items():
        choices = mapping(path, f"options.{option}", choices)
        if choices.get("default") not in [key for key in choices if key != "default"]:
            raise InputError(f"{path}: options.{option}.default must name one of its choices")
        for choice, patch in choices.items():
            if choice != "default":
                _check_patch(path, f"options.{option}.{choice}", patch, _PATCH, recipe)


def _check_patch(path: Path, where: str, patch: Any, valid: Iterable[str], recipe: Recipe | None = None) -> None:
    patch = mapping(path, where, patch)
    check_keys(path, where, patch, valid)
    for kind in ("verbs", "steps"):
        for name, change in mapping(path, f"{where}.{kind}", patch.get(kind)).items():
            change = mapping(path, f"{where}.{kind}.{name}", change)
            check_keys(path, f"{where}.{kind}.{name}", change, _STEP_PATCH)
            if kind == "steps" and recipe is not None:
                check_keys(path, f"{where}.steps", {name: None}, recipe.steps)
