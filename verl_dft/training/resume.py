"""Which checkpoint a run starts from. Imports no verl: the command asks before anything is loaded."""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from verl_dft.errors import InputError

MARKER = "complete.json"
_FOLDER = re.compile(r"global_step_(\d+)$")


class Checkpoint(NamedTuple):
    """A whole checkpoint and the step after which it was saved."""

    path: Path
    step: int


def completed_steps(folder: str | Path) -> list[int]:
    """Steps of the whole checkpoints in ``folder``, in rising order."""
    found = [
        int(match[1])
        for path in Path(folder).glob("global_step_*")
        if (match := _FOLDER.search(path.name)) and (path / MARKER).is_file()
    ]
    return sorted(found)


def checkpoint_path(folder: str | Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return Path(folder) / f"global_step_{step}"


def forget_old(folder: str | Path, keep: int | None) -> None:
    """Delete all whole checkpoints in ``folder`` but the ``keep`` newest; None or less than 1: keep all."""
    if not keep or keep < 1:
        return
    for step in completed_steps(folder)[:-keep]:
        path = checkpoint_path(folder, step)
        (path / MARKER).unlink()  # first: a half-deleted folder must not count
        shutil.rmtree(path, ignore_errors=True)


def resume_point(folder: str | Path, *, mode: str, given: str | Path | None, world_size: int) -> Checkpoint | None:
    """The newest whole checkpoint of a run, else the one it was told to start from, else None.

    Args:
        folder: the run's own checkpoints. All were made by the same configuration, ``given`` included.
        mode: ``trainer.resume_mode``: ``auto`` and ``resume_path`` (which needs ``given``), or ``disable``.
        given: ``trainer.resume_from_path``. It outranks own checkpoints that are not later: those were made under
            ``disable`` and are no continuation of it.
        world_size: ranks of this run.

    Raises:
        InputError: ``given`` is needed and not a whole checkpoint, or other ranks saved what would be loaded.
    """
    if mode == "disable":
        return None
    own = [Checkpoint(checkpoint_path(folder, step), step) for step in completed_steps(folder)[-1:]]
    found = own[0] if own else None
    if given is not None:
        start = Path(given).absolute()  # a Ray worker's working directory is another
        if (start / MARKER).is_file():
            step = int(_marker(start)["step"])
            found = found if found and found.step > step else Checkpoint(start, step)
        elif found is None:  # with checkpoints of its own the run needs it no more
            what = f"is not a whole checkpoint (no {MARKER} in it)" if start.is_dir() else "does not exist"
            raise InputError(f"trainer.resume_from_path={given} {what}; give a checkpoints/global_step_N folder")
    if found and (saved := _marker(found.path)["world_size"]) != world_size:
        raise InputError(
            f"{found.path} was saved by {saved} rank(s), this run has {world_size}; use the same number, or start "
            "from the exported model in another output_dir"
        )
    return found


def _marker(path: Path) -> dict[str, int]:
    return json.loads((path / MARKER).read_text(encoding="utf-8"))
