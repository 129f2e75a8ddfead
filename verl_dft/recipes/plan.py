"""From a recipe to commands: loops unrolled, references resolved, every step with a key and a folder of its own.

A step's key is a hash of its verb, its configuration as the verb composes it, and its command line, in which what
earlier steps make stands by their keys. So equal steps of different recipes are one, and a change anywhere before a
step changes its key.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.paths import recipes_dir
from verl_dft.recipes.load import nearest
from verl_dft.recipes.references import Reference, parse_reference, select_field
from verl_dft.recipes.settings import Settings, changes_of
from verl_dft.recipes.values import filled, override
from verl_dft.recipes.verbs import Composed, check_step, outputs_of

Arm = dict[str, tuple[str, Any]]
"""Loop variable -> (name of the arm, its value: what the list holds, or a mapping of fields)."""


@dataclass
class Planned:
    """One command of a run."""

    name: str
    step: str
    verb: str
    arm: Arm
    command: tuple[str, ...]
    """What follows ``verl-dft``, ``output_dir`` included."""
    values: dict[str, Any]
    """The overrides as values, without ``output_dir``."""
    composed: Composed
    key: str
    folder: Path
    outputs: dict[str, Any]
    needs: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    """Names of outputs that other steps read."""


def plan(settings: Settings) -> list[Planned]:
    """The commands of a recipe, those that others need before them.

    Raises:
        InputError: a reference that leads nowhere, a loop that needs itself, or a configuration that the step's verb
            refuses.
    """
    planner = _Planner(settings)
    for variable, names in settings.keep.items():
        planner.check_names(variable, names)
    for step in planner.steps:
        for arm in planner.arms[step]:
            planner.planned(step, arm)
    # a figure of arms that are all left out has nothing to draw
    found = [one for one in planner.done.values() if one.values.get("runs") != {}]
    if not found:
        raise InputError(f"{settings.recipe.name}: nothing is left to run at scale={settings.scale}")
    return found


class _Planner:
    def __init__(self, settings: Settings) -> None:
        self.settings, self.recipe = settings, settings.recipe
        self.steps = {
            name: step
            for name, step in self.recipe.steps.items()
            if settings.scale in (step.get("scales") or [settings.scale])
        }
        self.all_names: dict[str, list[str]] = {}
        self.arms = {name: self._arms(name, step) for name, step in self.steps.items()}
        self.done: dict[tuple[str, ...], Planned] = {}
        self.under_way: list[tuple[str, ...]] = []

    def check_names(self, variable: str, names: list[str]) -> None:
        valid = self.all_names.get(variable, [])
        for name in names:
            if name not in valid:
                raise InputError(f"{variable}={name}: no such arm{nearest(name, valid)}")

    # ---- loops ----

    def _arms(self, name: str, step: Mapping[str, Any]) -> list[Arm]:
        """Every combination of the step's loop variables that ``only`` and the command line keep."""
        only = dict(step.get("only") or {})
        for change in changes_of(self.settings, name, step["verb"]):
            only |= change.get("only") or {}
        arms: list[Arm] = [{}]
        for variable, over in (step.get("for") or {}).items():
            arms = [{**arm, variable: value} for arm in arms for value in self._values(name, variable, over, arm)]
        for variable in only:
            if variable not in (step.get("for") or {}):
                raise InputError(f"{self._at(name)}.only: {variable!r} is no loop variable of this step")
        return [arm for arm in arms if self._kept(arm, only) and self._kept(arm, self.settings.keep)]

    def _values(self, name: str, variable: str, over: Any, arm: Arm) -> list[tuple[str, Any]]:
        over = f"${{{over}}}" if isinstance(over, str) and over in self.settings.keys else over
        if isinstance(over, str) and over.startswith("${") and over.endswith("}"):
            # an arm's fields keep their references, which are looked up for the step that uses them
            over = self._raw(over[2:-1].strip(), arm, self._at(name))
        if not isinstance(over, list | dict):
            raise InputError(f"{self._at(name)}.for.{variable} must be a list or a mapping of arms, not {over!r}")
        if isinstance(over, dict) and not all(isinstance(fields, dict | None) for fields in over.values()):
            raise InputError(f"{self._at(name)}.for.{variable}: an arm of a mapping has fields, NAME: {{KEY: VALUE}}")
        pairs = [(str(key), fields or {}) for key, fields in over.items()] if isinstance(over, dict) else []
        pairs = pairs or [(str(value), value) for value in over]
        self.all_names.setdefault(variable, []).extend(key for key, _ in pairs)
        return pairs

    @staticmethod
    def _kept(arm: Arm, filters: Mapping[str, Any]) -> bool:
        def names(value: Any) -> list[str]:
            return [str(item) for item in (value if isinstance(value, list) else [value])]

        return all(arm[variable][0] in names(keep) for variable, keep in filters.items() if variable in arm)

    # ---- references ----

    def _at(self, step: str) -> str:
        return f"{self.recipe.path.name}: steps.{step}"

    def _raw(self, text: str, arm: Arm, where: str) -> Any:
        """A key, or a field of an arm, with the references in it as they are."""
        name, _, rest = text.partition(".")
        if name not in arm and name not in self.settings.keys:
            raise InputError(f"{where}: ${{{text}}} names nothing{nearest(name, [*arm, *self.settings.keys])}")
        value = select_field(arm[name][1] if name in arm else self.settings.keys[name], rest, text, where)
        if isinstance(value, str) and value.startswith("${") and value.endswith("}"):
            return self._raw(value[2:-1].strip(), arm, where)
        return value

    def _lookup(self, text: str, arm: Arm, where: str, needs: list[str]) -> Any:
        """What ``${text}`` stands for. Steps whose outputs it names go to ``needs``."""
        if text.startswith(("steps.", "all.", "each.")):
            return self._outputs(text, arm, where, needs)
        name, _, rest = text.removesuffix("?").partition(".")
        builtin = {"scale": self.settings.scale, **self.settings.choices}
        inner = arm
        if name in arm:
            arm_name, value = arm[name]
            base = value if rest or not isinstance(value, dict) else arm_name
            inner = {variable: other for variable, other in arm.items() if variable != name}
        elif name in self.settings.keys or name in builtin:
            base = self.settings.keys.get(name, builtin.get(name))
        else:
            valid = [*arm, *self.settings.keys, *builtin, "steps.…", "all.…", "each.…"]
            raise InputError(f"{where}: ${{{text}}} names nothing{nearest(name, valid)}")
        value = select_field(base, rest, text, where)
        if isinstance(value, str) and value.strip() == f"${{{text}}}":
            raise InputError(f"{where}: ${{{text}}} stands for itself")
        return filled(value, lambda other: self._lookup(other, inner, where, needs))

    # ---- steps ----

    def planned(self, step: str, arm: Arm) -> Planned:
        """The step for an arm, and before it whatever it needs."""
        identity = (step, *(arm_name for arm_name, _ in arm.values()))
        if identity in self.done:
            return self.done[identity]
        if identity in self.under_way:
            raise InputError(f"{self._at(step)} needs itself: {' <- '.join(part[0] for part in self.under_way)}")
        self.under_way.append(identity)
        made = self._make(step, arm)
        self.under_way.pop()
        self.done[identity] = made
        return made

    def _make(self, step: str, arm: Arm) -> Planned:
        written, where = self.steps[step], self._at(step)
        needs: list[str] = []

        def lookup(text: str) -> Any:
            return self._lookup(text, arm, where, needs)

        for name in written.get("after") or ():
            needs += [self.planned(name, other).name for other in self._agreeing(Reference("all", name, {}, ""), arm)]
        verb, config = written["verb"], written.get("config")
        values = _merged([{"with": written.get("with"), "drop": written.get("drop")}], lookup, where)
        for change in changes_of(self.settings, step, verb, filled(values.get("objective"), lookup)):
            config = change.get("config", config)
            values = _merged([change], lookup, where, values)
        values = filled(values, lookup)  # last: what was dropped or overridden is no need of this step
        if "output_dir" in values:
            raise InputError(f"{where}: output_dir is not the recipe's to set: every step has a folder of its own")
        values = {key: _shipped(value) for key, value in values.items()}
        if isinstance(values.get("runs"), dict):  # of an analysis
            values["runs"] = {label: paths for label, paths in values["runs"].items() if paths != {}}
        arguments = [str(filled(item, lookup)) for item in written.get("args") or ()]
        arguments += ["--config-name", str(filled(config, lookup))] if config else []
        arguments += [override(key, value) for key, value in values.items()]
        name = "-".join([step, *(arm_name.replace("/", "_") for arm_name, _ in arm.values())])
        composed = check_step(verb, arguments, self.settings, f"{self.recipe.name}: step {name}")
        key = self._hash([verb, arguments, composed.plain])
        folder = self.settings.root / verb.split()[0] / key
        outputs = outputs_of(verb, folder, composed, values) | {
            output: folder / file for output, file in (written.get("outputs") or {}).items()
        }
        command = (*verb.split(), *arguments, override("output_dir", str(folder)))
        needs = list(dict.fromkeys(needs))
        return Planned(name, step, verb, arm, command, values, composed, key, folder, outputs, needs)

    def _hash(self, parts: Any) -> str:
        text = json.dumps(parts, sort_keys=True, default=str)
        text = text.replace(f"{self.settings.root}/", "ROOT/").replace(f"{recipes_dir()}/", "RECIPES/")
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _outputs(self, text: str, arm: Arm, where: str, needs: list[str]) -> Any:
        """What ``${steps.…}``, ``${all.…}`` and ``${each.…}`` stand for; the steps go to ``needs``."""
        reference, at = parse_reference(text, where), f"{where}: ${{{text}}}"
        if reference.step not in self.recipe.steps:
            raise InputError(f"{at}: there is no such step{nearest(reference.step, self.recipe.steps)}")
        if reference.step not in self.steps:
            raise InputError(f"{at}: that step is not run at scale={self.settings.scale}")
        variables = list(self.steps[reference.step].get("for") or {})
        for variable in reference.select:
            if variable not in variables:
                raise InputError(f"{at}: {reference.step} has no loop over {variable!r}{nearest(variable, variables)}")
            if not any(reference.allows(variable, name) for name in self.all_names[variable]):
                raise InputError(f"{at}: no such arm{nearest(reference.select[variable], self.all_names[variable])}")
        found = [self.planned(reference.step, other) for other in self._agreeing(reference, arm)]
        if not found and reference.kind != "each":
            raise InputError(f"{at} is no step; are its arms left out?")
        if reference.kind == "steps" and len(found) > 1:
            what = ", ".join(one.name for one in found)
            raise InputError(f"{at} must be one step, it is {what}; name it: steps.NAME[VARIABLE=ARM].…")
        values = [self._output(one, reference.output, at, needs) for one in found]
        if reference.kind != "each":
            return values if reference.kind == "all" else values[0]
        free = [v for v in variables if not reference.fixes(v) and (v in reference.select or v not in arm)]
        if not free:
            raise InputError(f"{at}: no loop variable is left that could name its entries; write steps.…")
        return _by_arm([one.arm[free[0]][0] for one in found], values, single=len(free) == 1)

    @staticmethod
    def _output(one: Planned, output: str, at: str, needs: list[str]) -> Any:
        if output not in one.outputs:
            raise InputError(f"{at}: {one.verb} has no output {output!r}{nearest(output, one.outputs)}")
        one.used.add(output)
        needs.append(one.name)
        value = one.outputs[output]
        return [str(path) for path in value] if isinstance(value, list) else str(value)

    def _agreeing(self, reference: Reference, arm: Arm) -> Iterator[Arm]:
        """Arms of a step that the reference allows, with this arm's values of the other variables that both have."""
        for other in self.arms[reference.step]:
            shared = [v for v in other if v in arm and v not in reference.select]
            if all(reference.allows(v, name) for v, (name, _) in other.items()) and all(
                other[v][0] == arm[v][0] for v in shared
            ):
                yield other


def _by_arm(names: Sequence[str], values: Sequence[Any], single: bool) -> dict[str, Any]:
    """Arm -> output; unless ``single``, arm -> the list of the outputs that share it."""
    found: dict[str, list[Any]] = {}
    for name, value in zip(names, values, strict=True):
        found.setdefault(name, []).append(value)
    return {name: of_arm[0] for name, of_arm in found.items()} if single else dict(found)


def _merged(changes: Any, lookup: Any, where: str, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Overrides of ``with`` and ``drop`` on top of those before, their references as they are written."""
    values = dict(before or {})
    for change in changes:
        for key in change.get("drop") or ():
            values.pop(key, None)
        layers = change.get("with") or []
        for layer in layers if isinstance(layers, list) else [layers]:
            # a key without a value may be a reference that stands for several
            as_written = isinstance(layer, dict) and None not in layer.values()
            found = layer if as_written else filled(layer, lookup) if layer else {}
            if found is None:  # ${arm.field?} of an arm without it
                continue
            if not isinstance(found, dict):
                raise InputError(f"{where}.with must be a mapping, or a list of mappings; {layer!r} is none")
            values |= found
    return values


def _shipped(value: Any) -> Any:
    """``recipes/NAME`` as the path of what is shipped under that name, wherever the package lies."""
    if isinstance(value, list):
        return [_shipped(item) for item in value]
    if isinstance(value, dict):
        return {key: _shipped(item) for key, item in value.items()}
    if isinstance(value, str) and value.startswith("recipes/"):
        path = recipes_dir() / value.removeprefix("recipes/")
        return str(path) if path.exists() else value
    return value
