"""Checkpoints that count only when whole: a marker is written after every rank has finished.

verl moves its tracker before the other ranks' files are written, and with ``max_ckpt_to_keep`` deletes the old
checkpoint before the new one exists. Here a folder without a marker is as if it were not there.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from verl.utils.checkpoint import CheckpointHandler, OrchestrationMode

from verl_dft.errors import InputError
from verl_dft.failpoints import failpoint
from verl_dft.files import write_json

MARKER = "complete.json"
_FOLDER = re.compile(r"global_step_(\d+)$")


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


class MarkedCheckpoints(CheckpointHandler):
    """verl's handler with a marker per checkpoint; the place in the data needs no state (see ``batches``)."""

    def __init__(self, *args: Any, world_size: int, facts: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.world_size, self.facts = world_size, facts

    def save_checkpoint(self, step: int) -> None:
        """Save on all ranks, then mark; older checkpoints beyond ``max_ckpt_to_keep`` go last."""
        path = checkpoint_path(self.default_local_dir, step)
        if step in completed_steps(self.default_local_dir):  # a resumed run whose last step was already saved
            return
        if self.rank == 0 and path.exists():
            shutil.rmtree(path)  # left by a run that died while saving
        self._barrier()
        # returns after a barrier of all ranks, and under Ray after every worker has answered
        self.engine.save_checkpoint(local_path=str(path), global_step=step, max_ckpt_to_keep=None)
        self._barrier()
        failpoint("checkpoint.before_marker")
        if self.rank == 0:
            write_json(path / MARKER, {"step": step, "world_size": self.world_size, **self.facts})
            self._forget_old()
        self._barrier()
        failpoint("checkpoint.after_marker")

    def load_checkpoint(self) -> int:
        """Load the newest whole checkpoint (or ``resume_from_path``); returns its step, 0 for none."""
        path = self._resume_path()
        self._agree(path)
        self._drop_later(path)
        if path is None:
            return 0
        marker = json.loads((path / MARKER).read_text())
        if marker["world_size"] != self.world_size:
            raise InputError(
                f"{path} was saved by {marker['world_size']} rank(s), this run has {self.world_size}; use the same "
                "number, or start from the exported model in another output_dir"
            )
        if self.rank == 0:
            print(f"resuming after step {marker['step']} from {path}", flush=True)
        self.engine.load_checkpoint(str(path))
        return int(marker["step"])

    def _resume_path(self) -> Path | None:
        if self.resume_mode == "disable":
            return None
        if self.resume_from_path is not None:
            path = Path(self.resume_from_path)
            if not (path / MARKER).is_file():
                raise InputError(f"trainer.resume_from_path={path} is not a whole checkpoint (no {MARKER} in it)")
            return path
        steps = completed_steps(self.default_local_dir)
        return checkpoint_path(self.default_local_dir, steps[-1]) if steps else None

    def _drop_later(self, path: Path | None) -> None:
        """Whole checkpoints beyond the one resumed from are another history and must not be taken for this run."""
        first = int(_FOLDER.search(path.name)[1]) if path is not None and _FOLDER.search(path.name) else 0
        if self.rank == 0:
            for step in completed_steps(self.default_local_dir):
                if step > first:
                    (checkpoint_path(self.default_local_dir, step) / MARKER).unlink()
        self._barrier()

    def _agree(self, path: Path | None) -> None:
        if self.mode != OrchestrationMode.SPMD:
            return
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, path and path.name)
        if len(set(found)) > 1:
            raise InputError(
                f"ranks see different checkpoints in {self.default_local_dir} ({', '.join(map(str, found))}); "
                "output_dir must lie on a file system that all nodes share"
            )

    def _forget_old(self) -> None:
        if not self.max_ckpt_to_keep or self.max_ckpt_to_keep < 1:
            return
        for step in completed_steps(self.default_local_dir)[: -self.max_ckpt_to_keep]:
            path = checkpoint_path(self.default_local_dir, step)
            (path / MARKER).unlink()  # first: a half-deleted folder must not count
            shutil.rmtree(path, ignore_errors=True)

    def _barrier(self) -> None:
        if self.mode == OrchestrationMode.SPMD:
            torch.distributed.barrier()
