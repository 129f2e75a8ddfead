"""Which checkpoint a run starts from. Imports no verl: the command asks before anything is loaded."""

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

from verl_dft.errors import InputError
from verl_dft.failpoints import failpoint

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
        failpoint("checkpoint.forgetting")
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
        InputError: ``given`` is needed and not a whole checkpoint, other ranks saved what would be loaded, or a file
            of it was cut off.
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
    if found and (file := damaged_file(found.path)):
        raise InputError(damage(file, found, completed_steps(folder)))
    return found


def damaged_file(path: Path, thorough: bool = False) -> Path | None:
    """A file of weights or states below ``path`` that was cut off; with ``thorough`` also one with a wrong checksum."""
    for file in sorted([*path.rglob("*.pt"), *path.rglob("*.safetensors")]):
        try:
            if file.suffix == ".safetensors":
                whole = _is_whole_safetensors(file)
            else:
                with zipfile.ZipFile(file) as archive:  # what torch.save writes; the list of its parts is at its end
                    whole = not thorough or archive.testzip() is None
        except (zipfile.BadZipFile, OSError, ValueError):
            whole = False
        if not whole:
            return file
    return None


def damage(file: Path, point: Checkpoint, own: list[int]) -> str:
    """What to do about a damaged file of the checkpoint ``point``, where a run has those of steps ``own``."""
    earlier = [step for step in own if step < point.step]
    then = f"goes on from step {earlier[-1]}" if earlier else "starts over"
    if point.step not in own:
        then = "needs another trainer.resume_from_path"
    return f"{file} is damaged; delete {point.path} and run the same command again: it {then}"


def _is_whole_safetensors(file: Path) -> bool:
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        tensors = json.loads(stream.read(min(length, file.stat().st_size)))
    ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
    return file.stat().st_size == 8 + length + max(ends, default=0)


def _marker(path: Path) -> dict[str, int]:
    return json.loads((path / MARKER).read_text(encoding="utf-8"))
