"""Runs of recipes as they lie on the disk: ``run.json``, the records of its steps, and whether their files still hold.

Nothing here stops at a run that is incomplete: what is wrong is a line in ``problems``, and the rest can be read.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.files import sha256_file

FILE = "run.json"
READ = ("result.json", "statistics.json", "metrics.jsonl", ".md", ".png", "samples.parquet")
"""Ends of names of outputs that a report takes something from: their content must be what the step's record says."""
DONE = "done"


@dataclass(frozen=True)
class RunStep:
    """A step of a run. ``state``: ``done``, or in a few words why nothing is taken from it."""

    name: str
    step: str
    verb: str
    arm: Mapping[str, str]
    folder: Path
    results: tuple[Path, ...]
    seeds: Mapping[str, Any]
    record: Mapping[str, Any]
    state: str

    @property
    def done(self) -> bool:
        return self.state == DONE

    @property
    def seed(self) -> str:
        """The arm of the loop variable ``seed``: repetitions of the same; empty where there is none."""
        return self.arm.get("seed", "")

    @property
    def arms(self) -> dict[str, str]:
        """Loop variables and arms, but for the seed."""
        return {variable: name for variable, name in self.arm.items() if variable != "seed"}


@dataclass(frozen=True)
class Run:
    """A recipe's run at one scale. ``root``: the ``output_dir``; ``facts``: run.json without its steps."""

    root: Path
    folder: Path
    recipe: str
    scale: str
    facts: Mapping[str, Any]
    steps: tuple[RunStep, ...]
    problems: list[str] = field(default_factory=list)
    """What is missing or damaged, a line each."""
    notes: list[str] = field(default_factory=list)
    """What to know about it though nothing is missing."""
    number: int = 1
    """Above 1 for further runs of the same recipe and scale, in other output folders."""
    same_slug: int = 1
    """Above 1 for further runs whose names are the same in a file's name."""

    @property
    def name(self) -> str:
        return f"{self.recipe} at scale={self.scale}" + (f", run {self.number}" if self.number > 1 else "")

    @property
    def slug(self) -> str:
        """A name for files and anchors."""
        return file_name(f"{self.recipe}-{self.scale}") + (f"--{self.same_slug}" if self.same_slug > 1 else "")

    def relative(self, path: Path | str) -> str:
        """A path as seen from the output folder."""
        return str(Path(path).relative_to(self.root)) if Path(path).is_relative_to(self.root) else str(path)


def file_name(text: str) -> str:
    """``text`` as a part of a file's name: what separates folders, or ends a link, becomes ``-``."""
    return re.sub(r"[^\w.,=-]+", "-", text)


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """The folders with a ``run.json`` that ``paths`` name: themselves, the file, or all below an ``output_dir``.

    Raises:
        InputError: a path that does not exist, or has no run.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path} does not exist; give a run's folder, its {FILE}, or an output_dir of recipes")
        if path.name == FILE and path.is_file():
            path = path.parent
        below = [path / FILE] if (path / FILE).is_file() else sorted((path / "by_name").rglob(FILE))
        if not below:
            raise InputError(f"{path} holds no {FILE} and no by_name/; give the output_dir of verl-dft recipe run")
        found |= dict.fromkeys(file.parent.absolute() for file in below)
    return list(found)


def read_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        InputError: ``run.json`` is damaged, or lies where no run writes it.
    """
    path = folder / FILE
    root = next((parent.parent for parent in folder.parents if parent.name == "by_name"), None)
    if root is None:
        raise InputError(f"{path} is not below by_name/ of an output_dir, so its steps cannot be found")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        recipe, scale, listed = str(facts["recipe"]), str(facts["scale"]), list(facts.pop("steps"))
        steps = tuple(_step(root, step) for step in listed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({_short(error)}); run the recipe again, which reuses its steps") from None
    problems = [f"{step.name}: {step.state}" for step in steps if not step.done]
    if not steps:
        problems.append("the run has no steps")
    return Run(root, folder, recipe, scale, facts, steps, problems, _notes(facts))


def read_json(path: Path) -> Any:
    """A JSON file. Raises InputError, a line, where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({_short(error)})") from None


def _step(root: Path, raw: Mapping[str, Any]) -> RunStep:
    folder = root / str(raw["folder"])
    file = root / str(raw.get("record") or f"steps/{str(raw['verb']).split()[0]}-{folder.name}.json")
    results = tuple(root / str(path) for path in raw.get("results") or ())
    arm = {str(variable): str(name) for variable, name in (raw.get("arm") or {}).items()}
    inside = Path(os.path.normpath(root))
    outside = [path for path in (folder, file, *results) if not Path(os.path.normpath(path)).is_relative_to(inside)]
    if outside:
        record, results, state = {}, (), f"{outside[0]} is not below the output folder, so nothing is taken from it"
    else:
        record = _record(file)
        state = _state(record, folder, root, file)
    return RunStep(
        str(raw["name"]), str(raw["step"]), str(raw["verb"]), arm, folder, results,
        raw.get("seeds") or {}, record, state,
    )  # fmt: skip


def _record(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return record if isinstance(record, dict) else {"status": "damaged"}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        return {"status": "damaged"}


def _state(record: Mapping[str, Any], folder: Path, root: Path, file: Path) -> str:
    if record.get("status") == "damaged":
        return f"its record {file.relative_to(root)} is damaged"
    if not record:
        return "not run yet"
    if record.get("status") != "done":
        return f"started, not finished; its log: logs/{file.stem}.log"
    return next(_broken(record, folder, root), DONE)


def _broken(record: Mapping[str, Any], folder: Path, root: Path) -> Iterator[str]:
    """What is wrong with the files of a step that was done."""
    outputs = record.get("outputs")
    for written, digest in (outputs if isinstance(outputs, dict) else {}).items():
        # the folder may have been moved since: what counts is the part below the step's own
        below = written.rpartition(f"/{folder.relative_to(root)}/")[2]
        path = folder / below
        if not path.is_file():
            yield f"{path.relative_to(root)} is missing"
        elif path.name.endswith(READ) and sha256_file(path) != digest:
            yield f"{path.relative_to(root)} is not the file that the step wrote: its hash has changed"


def _notes(facts: Mapping[str, Any]) -> list[str]:
    notes = [f"set on the command line: {key}={value}" for key, value in (facts.get("changed") or {}).items()]
    notes += [f"only {variable}={','.join(map(str, names))}" for variable, names in (facts.get("keep") or {}).items()]
    path, digest = facts.get("recipe_path"), facts.get("recipe_sha256")
    if path and digest and Path(path).is_file() and sha256_file(path) != digest:
        notes.append(f"the recipe's file {Path(path).name} has changed since this run")
    return notes


def _short(error: Exception) -> str:
    what = f"{type(error).__name__}: " if isinstance(error, KeyError) else ""
    return " ".join(f"{what}{error}".split())[:120]
