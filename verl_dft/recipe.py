"""``verl-dft recipe list|show|run``: the steps of a recipe, each once, continued where they were left.

The format of recipes, and what a run writes: docs/recipes.md.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.files import atomic_write, write_json
from verl_dft.recipes.estimate import estimates
from verl_dft.recipes.load import load_recipe
from verl_dft.recipes.plan import Planned, plan
from verl_dft.recipes.record import run_facts, step_facts
from verl_dft.recipes.settings import Settings, settings_of
from verl_dft.recipes.show import commands, figures, listing, page
from verl_dft.recipes.verbs import files_of
from verl_dft.redact import redacted_values
from verl_dft.step_server import KINDS
from verl_dft.steps import Step, StepError, StepRunner

ACTIONS = ("list", "show", "run")
_LARGE = 100 << 20
"""Bytes of a file above which its content is not looked at to see whether it changed."""


def main(argv: Sequence[str]) -> int:
    """Run ``verl-dft recipe ACTION``. Returns 0 done, 1 a step failed.

    Raises:
        InputError: an unknown recipe or key, or a step whose configuration its verb refuses.
    """
    action, rest = (argv[0], list(argv[1:])) if argv else ("", [])
    if action not in ACTIONS:
        raise InputError(f"verl-dft recipe needs one of {', '.join(ACTIONS)}, got {action or 'nothing'!r}")
    if action == "list":
        print(listing())
        return 0
    if not rest or "=" in rest[0] or rest[0].startswith("-"):
        raise InputError(f"verl-dft recipe {action} needs a name; see verl-dft recipe list")
    dry_run = "--dry-run" in rest
    settings = settings_of(load_recipe(rest[0]), [item for item in rest[1:] if item != "--dry-run"])
    steps = plan(settings)
    if action == "show":
        print(page(settings, steps))
        return 0
    if dry_run:
        print(commands(settings, _unique(steps), estimates(_unique(steps), settings.estimate)))
        return 0
    return run(settings, steps)


def run(settings: Settings, planned: Sequence[Planned]) -> int:
    """Run what is not done yet, and show the evaluations' figures. Returns 0, or 1 where a step failed."""
    _check_machine(settings)
    steps = _unique(planned)
    env = {**settings.env, "VERL_DFT_HARDWARE": settings.hardware} if settings.hardware else settings.env
    runner = StepRunner(settings.root, settings.at_once, env, track_code=False, share=_may_share(settings))
    print(f"{settings.recipe.name}, scale={settings.scale}: {len(steps)} steps, in {settings.root}", flush=True)
    facts = run_facts(settings)  # of the recipe as it is now: its file may be edited while this runs

    def begin() -> None:
        _forget(settings, runner, planned)
        write_run(settings, planned, {}, facts)

    try:
        records = runner.run([_step(step, steps) for step in steps], begin)
    except StepError as error:
        print(f"error: {error}\n{runner.tail()}", file=sys.stderr)
        return 1
    folder = write_run(settings, planned, records, facts)
    if table := figures(steps):
        print(f"\n{table}\n")
    print(f"done: {folder}/run.json, and there a link to the folder of each step")
    return 0


def _unique(steps: Sequence[Planned]) -> list[Planned]:
    """Without steps that are the same as an earlier one under another name."""
    first: dict[Path, Planned] = {}
    for step in steps:
        first.setdefault(step.folder, step).used.update(step.used)
    return list(first.values())


def _id(step: Planned) -> str:
    """The step's name in the runner's records: the same in every recipe of an output folder."""
    return f"{step.verb.split()[0]}-{step.key}"


def _step(step: Planned, steps: Sequence[Planned]) -> Step:
    """What the runner runs."""
    by_folder = {str(other.folder): _id(other) for other in steps}
    text = "\0".join(step.command[:-1])
    needs = tuple(name for folder, name in by_folder.items() if folder in text)
    trains = step.verb in ("train", "rl")
    return Step(
        _id(step),
        (sys.executable, "-m", "verl_dft.cli", *step.command),
        step.folder,
        files_of(step.verb, step.folder, step.outputs, step.used),
        _inputs(step),
        needs,
        partial(_progress, step.folder, step.composed.get("trainer.total_training_steps")) if trains else None,
        step.name,
        step.command if step.verb in KINDS else (),
    )


def _progress(folder: Path, total: int | None) -> str:
    """How far a training is, from its metrics file."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            done = sum(b"train/loss" in line or b"critic/rewards/mean" in line for line in file)
    except OSError:
        return "starting"
    return f"step {done}/{total}" if total else f"step {done}"


def _inputs(step: Planned) -> tuple[Path, ...]:
    """Files from outside of the run: data files and models in folders here, but for large weights."""
    found: list[Path] = []
    for value in step.values.values():
        for item in value if isinstance(value, list) else [value]:
            path = Path(item) if isinstance(item, str) and "/" in item and len(item) < 4096 else None
            if path is None or str(step.folder.parent.parent) in str(path) or not path.exists():
                continue
            found += [path] if path.is_file() else sorted(path.glob("*.safetensors")) + sorted(path.glob("config.json"))
    return tuple(path for path in found if path.stat().st_size < _LARGE)


def _may_share(settings: Settings) -> bool:
    """Not with a GPU: CUDA does not outlive a fork, and an engine that waits would keep the memory of trainings."""
    from verl_dft.training.configure import has_accelerator

    return settings.share and not has_accelerator()


def _check_machine(settings: Settings) -> None:
    from verl_dft.training.configure import has_accelerator

    if settings.hardware == "gpu" and not has_accelerator() and not os.environ.get("RAY_ADDRESS"):
        raise InputError(
            f"scale={settings.scale} is for machines with GPUs, and there is none here; --dry-run prints its commands, "
            "hardware=cpu tries all the same"
        )


def _forget(settings: Settings, runner: StepRunner, planned: Sequence[Planned]) -> None:
    """Have the steps named by ``redo=`` run anew; what depends on them follows, because their outputs change."""
    for name in settings.redo:
        chosen = [step for step in planned if name in (step.name, step.step, "all")]
        if not chosen:
            raise InputError(f"redo={name}: no such step; they are {', '.join(step.name for step in planned)}")
        for step in chosen:
            (runner.records / f"{_id(step)}.json").unlink(missing_ok=True)


def write_run(
    settings: Settings, planned: Sequence[Planned], records: Mapping[str, dict[str, Any]], facts: dict[str, Any]
) -> Path:
    """``<root>/by_name/RECIPE/SCALE/``: ``run.json`` and a link to each step's folder. Returns that folder.

    Written before the first step too, without ``records``: a run that was killed says what it was to do, and the
    runner's own records (``record`` of each step) how far it came.

    Args:
        facts: of :func:`verl_dft.recipes.record.run_facts`.
    """
    folder = settings.root / "by_name" / settings.recipe.name / settings.scale
    folder.mkdir(parents=True, exist_ok=True)
    for step in planned:
        link = folder / step.name
        if link.is_symlink():
            link.unlink()
        link.symlink_to(os.path.relpath(step.folder, folder), target_is_directory=True)
    steps = [step_facts(step, _id(step), settings, records.get(_id(step), {})) for step in planned]
    write_json(folder / "run.json", redacted_values({**facts, "steps": steps}))
    table = figures(planned) if records else ""
    if table:
        with atomic_write(folder / "figures.txt") as file:
            file.write(table + "\n")
    else:
        (folder / "figures.txt").unlink(missing_ok=True)
    return folder
