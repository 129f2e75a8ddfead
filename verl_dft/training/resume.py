"""Which checkpoint a run starts from. Imports no verl: the command asks before anything is loaded."""

import json
import re
import shutil
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from verl_dft.errors import InputError
from verl_dft.failpoints import failpoint

MARKER = "complete.json"
_FOLDER = re.compile(r"global_step_(\d+)$")
_RANK = re.compile(r"_rank_(\d+)\.pt$")
_READERS = 8
"""Files that are read at a time."""


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


def resume_point(
    folder: str | Path, *, mode: str, given: str | Path | None, world_size: int, thorough: bool = False
) -> Checkpoint | None:
    """The newest whole checkpoint of a run, else the one it was told to start from, else None.

    Args:
        folder: the run's own checkpoints. All were made by the same configuration, ``given`` included.
        mode: ``trainer.resume_mode``: ``auto`` and ``resume_path`` (which needs ``given``), or ``disable``.
        given: ``trainer.resume_from_path``. It outranks own checkpoints that are not later: those were made under
            ``disable`` and are no continuation of it.
        world_size: ranks of this run.
        thorough: read every file of it (:func:`damaged_file`); else the caller does, before it is loaded.

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
            step = _marker(start)["step"]
            found = found if found and found.step > step else Checkpoint(start, step)
        elif found is None:  # with checkpoints of its own the run needs it no more
            what = f"is not a whole checkpoint (no {MARKER} in it)" if start.is_dir() else "does not exist"
            raise InputError(f"trainer.resume_from_path={given} {what}; give a checkpoints/global_step_N folder")
    if found and (saved := _marker(found.path)["world_size"]) != world_size:
        raise InputError(
            f"{found.path} was saved by {saved} rank(s), this run has {world_size}; use the same number, or start "
            "from the exported model in another output_dir"
        )
    if found and (file := damaged_file(found.path, thorough)):
        raise InputError(damage(file, found, completed_steps(folder)))
    return found


def damaged_file(path: Path, thorough: bool = False, rank: int | None = None) -> Path | None:
    """A file of weights or states below ``path`` that was cut off.

    Args:
        thorough: read the files, and find one whose checksum is wrong too: torch and safetensors look at none, and take
            a turned bit for another weight.
        rank: the files of this rank alone, and with 0 those of none.
    """
    files = [file for file in sorted(path.rglob("*")) if file.suffix in (".pt", ".pth", ".safetensors")]
    if rank is not None:
        files = [file for file in files if _reader(file) == rank]
    sums = _marker(path)["crc32"]
    with ThreadPoolExecutor(_READERS) as pool:
        whole = pool.map(lambda file: _is_whole(file, thorough, sums.get(file.relative_to(path).as_posix())), files)
        return next((file for file, ok in zip(files, whole, strict=True) if not ok), None)


def checksums(path: Path) -> dict[str, int]:
    """For a marker's ``crc32``: of the files below ``path`` whose format has none, by name."""
    return {file.relative_to(path).as_posix(): _crc32(file) for file in sorted(path.rglob("*.safetensors"))}


def damage(file: Path, point: Checkpoint, own: list[int]) -> str:
    """What to do about a damaged file of the checkpoint ``point``, where a run has those of steps ``own``."""
    earlier = [step for step in own if step < point.step]
    then = f"goes on from step {earlier[-1]}" if earlier else "starts over"
    if point.step not in own:
        then = "needs another trainer.resume_from_path"
    return f"{file} is damaged; delete {point.path} and run the same command again: it {then}"


def _reader(file: Path) -> int:
    match = _RANK.search(file.name)
    return int(match[1]) if match else 0


def _is_whole(file: Path, thorough: bool, checksum: int | None) -> bool:
    try:
        if file.suffix == ".safetensors":
            return _is_whole_safetensors(file) and (not thorough or checksum in (None, _crc32(file)))
        with zipfile.ZipFile(file) as archive:  # what torch.save writes; the list of its parts is at its end
            return not thorough or archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError):
        return False


def _crc32(file: Path) -> int:
    found = 0
    with open(file, "rb") as stream:
        while part := stream.read(1 << 20):
            found = zlib.crc32(part, found)
    return found


def _is_whole_safetensors(file: Path) -> bool:
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        tensors = json.loads(stream.read(min(length, file.stat().st_size)))
    ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
    return file.stat().st_size == 8 + length + max(ends, default=0)


def _marker(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / MARKER).read_bytes())
        return {"step": int(found["step"]), "world_size": int(found["world_size"]), "crc32": found.get("crc32", {})}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path / MARKER} is damaged; delete {path} and run the same command again") from None
