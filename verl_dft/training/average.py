"""An exponential moving average of the trained weights, sharded as they are, and a way to score rows with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from verl.utils.device import get_torch_device

from verl_dft.errors import InputError
from verl_dft.failpoints import failpoint


def _local(parameter: Tensor) -> Tensor:
    data = parameter.detach()
    return data.to_local() if isinstance(data, DTensor) else data


class WeightAverage:
    """Each rank averages its own shard: ``average = decay * average + (1 - decay) * weights`` after every step.

    Args:
        module: the trained module; only parameters with a gradient are averaged.
        decay: in [0, 1).
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        get_torch_device().synchronize()  # verl moves offloaded weights to the host asynchronously
        self.weights = [p for p in module.parameters() if p.requires_grad]
        self.average = [_local(p).float().clone() for p in self.weights]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        get_torch_device().synchronize()
        for average, weight in zip(self.average, self.weights, strict=True):
            average.lerp_(_local(weight).to(average), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """For the length of the block the module holds the average."""
        with torch.no_grad():
            kept = [_local(weight).clone() for weight in self.weights]
            for weight, average in zip(self.weights, self.average, strict=True):
                _local(weight).copy_(average)
            self._forget_gathered()
            try:
                yield
            finally:
                for weight, own in zip(self.weights, kept, strict=True):
                    _local(weight).copy_(own)
                self._forget_gathered()

    def _forget_gathered(self) -> None:
        """Drop whole weights that FSDP keeps from a forward pass (engine.reshard_after_forward=false): they are old."""
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def save(self, folder: str | Path) -> None:
        """Write this rank's shard beside verl's."""
        failpoint("average.before_save")
        torch.save(self.average, self._file(folder))

    def load(self, folder: str | Path) -> None:
        """Read this rank's shard. Raises InputError where the checkpoint was saved without an average."""
        file = self._file(folder)
        if not file.is_file():
            raise InputError(f"{file} is missing: the checkpoint was saved by a run without a moving average")
        for average, saved in zip(self.average, torch.load(file, map_location="cpu", weights_only=True), strict=True):
            average.copy_(saved)

    def _file(self, folder: str | Path) -> Path:
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        return Path(folder) / f"average_world_size_{world}_rank_{rank}.pt"
