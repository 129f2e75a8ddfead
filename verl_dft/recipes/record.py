"""What ``run.json`` says of a run besides its steps' results: its settings, and how they differ from the recipe's."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from verl_dft.files import sha256_file
from verl_dft.recipes.load import Recipe, shared_scales
from verl_dft.recipes.plan import Planned
from verl_dft.recipes.settings import Settings, settings_of

_SEEDS = {"data": "data.source.seed", "train": "trainer.seed", "score": None}
"""Verb -> its seed, where that is not ``seed``."""


def run_facts(settings: Settings) -> dict[str, Any]:
    """The recipe and the settings; ``changed``: what the command line set otherwise than the recipe does."""
    recipe = settings.recipe
    return {
        "recipe": recipe.name,
        "recipe_path": str(recipe.path.absolute()),
        "recipe_sha256": sha256_file(recipe.path),
        "recipe_hash": recipe_hash(recipe, settings.scale),
        "title": recipe.title,
        "source": recipe.source,
        "scale": settings.scale,
        "keys": settings.keys,
        "options": settings.choices,
        "keep": settings.keep,
        "changed": changed(settings),
    }


def recipe_hash(recipe: Recipe, scale: str) -> str:
    """Of what decides a recipe's steps at a scale: not of comments, nor of other scales."""
    parts = [recipe.keys, recipe.steps, recipe.options, recipe.scales.get(scale), shared_scales().get(scale)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def step_facts(step: Planned, record_id: str, settings: Settings, record: Mapping[str, Any]) -> dict[str, Any]:
    """One step; ``record``: the runner's, empty where the step is not done yet."""
    return {
        "name": step.name,
        "step": step.step,
        "verb": step.verb,
        "arm": {variable: name for variable, (name, _) in step.arm.items()},
        "needs": step.needs,
        "folder": os.path.relpath(step.folder, settings.root),
        "record": f"steps/{record_id}.json",
        "seeds": _seeds(step),
        "command": record.get("command"),
        "seconds": record.get("seconds"),
        "reused": record.get("reused"),
        "code": record.get("code"),
        "results": [os.path.relpath(path, settings.root) for path in step.outputs.get("results", [])],
    }


def changed(settings: Settings) -> dict[str, Any]:
    """Keys and overrides of the command line, options that are not at their default, with their values."""
    same = [f"scale={settings.scale}", *(f"{option}={choice}" for option, choice in settings.choices.items())]
    default = settings_of(settings.recipe, same)
    found = _differences(default.keys, settings.keys, "")
    for option, choice in settings.choices.items():
        if choice != settings.recipe.options[option]["default"]:
            found[option] = choice
    for target, change in settings.patches[len(default.patches) :]:  # those of the command line come last
        where = f"verbs.{target.removeprefix('verb:')}" if target.startswith("verb:") else f"steps.{target}"
        values = {"config": change["config"]} if "config" in change else change.get("with") or {}
        found |= {f"{where}.{key}": value for key, value in values.items()}
    return found


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            found |= _differences(old, value, f"{prefix}{key}.")
        elif old != value or key not in before:
            found[f"{prefix}{key}"] = value
    return found | {f"{prefix}{key}": None for key in before if key not in after}


def _seeds(step: Planned) -> dict[str, Any]:
    """The verb's own seed, and every seed that the step sets."""
    key = _SEEDS.get(step.verb.split()[0], "seed")
    # as given first: the composed configuration has seeds made equal for checking
    found = {key: step.composed.get(key)} if key else {}
    found |= {name: value for name, value in step.values.items() if name.rpartition(".")[2] == "seed"}
    return {name: value for name, value in found.items() if value is not None}
