"""Checkpoints that count only when whole: a marker is written after every rank has finished.

verl moves its tracker before the other ranks' files are written, and with ``max_ckpt_to_keep`` deletes the old
checkpoint before the new one exists. Here a folder without a marker is as if it were not there.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from verl.utils.checkpoint import CheckpointHandler, OrchestrationMode, fsdp_checkpoint_manager

from verl_dft.errors import InputError
from verl_dft.failpoints import failpoint
from verl_dft.files import missing_files, write_json, writing
from verl_dft.training.resume import (
    MARKER,
    Checkpoint,
    checkpoint_path,
    completed_steps,
    damage,
    damaged_file,
    forget_old,
    resume_point,
)

PATIENCE_S = 30.0
"""How long a shared file system may take to show the first rank what another machine has written."""


@contextmanager
def without_lock_files() -> Iterator[None]:
    """For verl's saving: make the folder without the lock file that it leaves in the temporary folder each time."""
    original = fsdp_checkpoint_manager.local_mkdir_safe
    fsdp_checkpoint_manager.local_mkdir_safe = _make_folder
    try:
        yield
    finally:
        fsdp_checkpoint_manager.local_mkdir_safe = original


def _make_folder(path: str) -> str:
    os.makedirs(path, exist_ok=True)  # safe from several processes at once
    return path


class MarkedCheckpoints(CheckpointHandler):
    """verl's handler with a marker per checkpoint; the place in the data needs no state (see ``batches``)."""

    def __init__(self, *args: Any, world_size: int, facts: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.world_size, self.facts = world_size, facts
        self.saved_at = 0.0
        """``time.perf_counter()`` at the end of the last save."""

    def save_checkpoint(self, step: int) -> None:
        """Save on all ranks, then mark; older checkpoints beyond ``max_ckpt_to_keep`` go last."""
        path = checkpoint_path(self.default_local_dir, step)
        if step in completed_steps(self.default_local_dir):  # a resumed run whose last step was already saved
            return
        if self.rank == 0 and path.exists():
            shutil.rmtree(path)  # left by a run that died while saving
        self._barrier()
        failpoint("checkpoint.before_save")
        # returns after a barrier of all ranks, and under Ray after every worker has answered
        with writing(path):
            self.engine.save_checkpoint(local_path=str(path), global_step=step, max_ckpt_to_keep=None)
        self._barrier()
        failpoint("checkpoint.before_marker")
        if self.rank == 0:
            self._check_all_here(path)
            write_json(path / MARKER, {"step": step, "world_size": self.world_size, **self.facts})
            forget_old(self.default_local_dir, self.max_ckpt_to_keep)
        self._barrier()
        self.saved_at = time.perf_counter()
        failpoint("checkpoint.after_marker")

    def load_checkpoint(self) -> int:
        """Load what :func:`resume_point` names; returns its step, 0 for none."""
        point = resume_point(
            self.default_local_dir, mode=self.resume_mode, given=self.resume_from_path, world_size=self.world_size
        )
        self._agree(point)
        self._drop_later(point.step if point else 0)
        if point is None:
            return 0
        if self.rank == 0:
            print(f"resuming after step {point.step} from {point.path}", flush=True)
        self._check_whole(point)
        self.engine.load_checkpoint(str(point.path))
        return point.step

    def _check_whole(self, point: Checkpoint) -> None:
        """Raise :class:`InputError` on all ranks where a file is not as it was written. Each rank reads its own."""
        together = self.mode == OrchestrationMode.SPMD
        found = [damaged_file(point.path, thorough=True, rank=self.rank if together else None)]
        if together:
            mine, found = found[0], [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(found, mine)
        if file := next(filter(None, found), None):
            raise InputError(damage(file, point, completed_steps(self.default_local_dir)))

    def _check_all_here(self, path: Path) -> None:
        """Raise :class:`InputError` where a rank's part is not in ``path`` as this process sees it."""
        parts = [path / f"model_world_size_{self.world_size}_rank_{rank}.pt" for rank in range(self.world_size)]
        if missing := missing_files(parts, PATIENCE_S):
            raise InputError(
                f"checkpoint {path} lacks {missing[0].name} ({len(missing)} of {len(parts)} parts are missing): other "
                "machines wrote to disks of their own; output_dir must lie on a file system that all nodes share"
            )

    def _drop_later(self, step: int) -> None:
        """Whole checkpoints beyond the one resumed from are another history and must not be taken for this run."""
        if self.rank == 0:
            for later in completed_steps(self.default_local_dir):
                if later > step:
                    (checkpoint_path(self.default_local_dir, later) / MARKER).unlink()
        self._barrier()

    def _agree(self, point: Checkpoint | None) -> None:
        if self.mode != OrchestrationMode.SPMD:
            return
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, point and point.path.name)
        if len(set(found)) > 1:
            raise InputError(
                f"ranks see different checkpoints in {self.default_local_dir} ({', '.join(map(str, found))}); "
                "output_dir must lie on a file system that all nodes share"
            )

    def _barrier(self) -> None:
        if self.mode == OrchestrationMode.SPMD:
            torch.distributed.barrier()
