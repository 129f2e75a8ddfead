"""Which rows make up which batch: a function of (seed, epoch, step) alone.

verl's samplers ignore ``trainer.seed``, and its data loader loses its place when a run stops at an epoch's end. Here
nothing is remembered: step s of epoch e takes the same rows on 1 rank, on 2, under Ray, and after a resume.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

from verl_dft.errors import InputError


class StepBatchSampler(Sampler[list[int]]):
    """Yields the row indices of each step's batch: this rank's share, or all ranks' shares end to end.

    Args:
        lengths: [num_rows] tokens of each row.
        batch_size: rows of the global batch; a remainder of an epoch's permutation is left out of that epoch.
        dp_size: ranks the batch is split over.
        dp_rank: whose share; None for all shares end to end, as verl's Ray trainer dispatches them.
        seed: of the permutation.
        balance: give ranks equal work and order each share by length, so that consecutive micro-batches hold rows of
            like length; otherwise the permutation's order is kept.
        updates: mini-batches that a step is cut into, in the permutation's order; a rank's share is its part of the
            first, then of the second, and so on.
        members: [num_groups, K] row indices (see :func:`group_members`); the permutation is then of groups, so that
            the K rows of one are in the same mini-batch. Rows in none of them are never used.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        *,
        dp_size: int,
        dp_rank: int | None,
        seed: int,
        balance: bool,
        updates: int = 1,
        members: np.ndarray | None = None,
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.balance = lengths, batch_size, seed, balance
        self.dp_size, self.dp_rank, self.updates = dp_size, dp_rank, updates
        self.members = np.arange(len(lengths))[:, None] if members is None else members
        self.epoch = self.first_step = 0
        assert batch_size % (dp_size * updates) == 0 and len(self) > 0
        assert (batch_size // updates) % self.members.shape[1] == 0

    def __len__(self) -> int:
        return self.members.size // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    def start_at(self, step: int) -> None:
        """Skip the first ``step`` batches of the next iteration (once)."""
        self.first_step = step

    def __iter__(self) -> Iterator[list[int]]:
        first, self.first_step = self.first_step, 0
        for step in range(first, len(self)):
            yield self.rows(self.epoch, step)

    def rows(self, epoch: int, step: int) -> list[int]:
        """Row indices of one batch."""
        order = self.members[np.random.default_rng([self.seed, epoch]).permutation(len(self.members))].ravel()
        batch = order[step * self.batch_size : (step + 1) * self.batch_size]
        parts = [self._shares(mini) for mini in np.split(batch, self.updates)]
        shares = [[row for part in parts for row in part[rank]] for rank in range(self.dp_size)]
        return shares[self.dp_rank] if self.dp_rank is not None else [row for share in shares for row in share]

    def _shares(self, batch: np.ndarray) -> list[list[int]]:
        """Row indices of each rank's part of one mini-batch."""
        size = len(batch) // self.dp_size
        if not self.balance:
            return [batch[rank * size : (rank + 1) * size].tolist() for rank in range(self.dp_size)]
        lengths = torch.as_tensor(self.lengths[batch])
        parts = [range(len(batch))]
        if self.dp_size > 1:
            work = calculate_workload(lengths).tolist()
            parts = get_seqlen_balanced_partitions(work, k_partitions=self.dp_size, equal_size=True)
        return [[int(batch[i]) for i in sorted(part, key=lambda i: (-int(lengths[i]), i))] for part in parts]


def group_members(groups: np.ndarray, mini_batch_size: int) -> np.ndarray:
    """Row indices of every whole group, for ``StepBatchSampler(members=…)``, groups in the order of their first row.

    K is the size of the largest group. A smaller one has lost rows (dropped as over-long): it is left out.

    Args:
        groups: [num_rows] int64, which group a row belongs to; below 0: none.
        mini_batch_size: rows of an optimizer update.

    Returns:
        [num_groups, K] int64, ascending within a group.

    Raises:
        InputError: rows without a group, a group larger than the mini-batch, or a mini-batch that cuts one.
    """
    advice = "or set data.keep_groups=false"
    if len(groups) == 0 or (groups < 0).any():
        raise InputError(
            f"data.keep_groups=true, but {int((groups < 0).sum())} of {len(groups)} rows have no group_id; make them "
            f"with verl-dft groups, {advice}"
        )
    _, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    size = int(sizes.max())
    if size > mini_batch_size:
        raise InputError(
            f"a group has {size} rows and an update {mini_batch_size} (data.mini_batch_size or data.train_batch_size); "
            f"use at least {size}, {advice}"
        )
    if mini_batch_size % size:
        raise InputError(
            f"an update of {mini_batch_size} rows (data.mini_batch_size or data.train_batch_size) is no multiple of "
            f"the group size {size}; use {mini_batch_size - mini_batch_size % size}, {advice}"
        )
    rows = np.argsort(codes, kind="stable")
    members = rows[(sizes == size)[codes[rows]]].reshape(-1, size)
    return members[np.argsort(members[:, 0])]


class PaddedRows(Dataset):
    """A dataset continued with untrained copies of its first row, so that every rank gets whole micro-batches."""

    def __init__(self, rows: Dataset, multiple: int) -> None:
        self.rows, self.num_rows = rows, len(rows)  # type: ignore[arg-type]
        self.length = -(-self.num_rows // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index < self.num_rows:
            return self.rows[index]
        row = dict(self.rows[0])
        row["loss_mask"] = torch.zeros_like(row["loss_mask"])
        return row


class ValidationLoader:
    """Batches over every validation row once; verl's loop runs them, the worker's sums give the exact means.

    verl's own validation drops rows that do not fill a batch, and averages batch means.
    """

    def __init__(
        self,
        rows: Dataset,
        batch_size: int,
        *,
        dp_size: int,
        dp_rank: int | None,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        client: Callable[[], Any],
    ) -> None:
        self.rows, self.batch_size = PaddedRows(rows, batch_size), batch_size
        self.dp_size, self.dp_rank, self.client = dp_size, dp_rank, client
        self.collate = collate
        self.metrics: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size

    def _indices(self, start: int) -> list[int]:
        # every rank takes each dp_size-th row, so that the padding of the last batch is spread over the ranks
        shares = [list(range(start + rank, start + self.batch_size, self.dp_size)) for rank in range(self.dp_size)]
        return shares[self.dp_rank] if self.dp_rank is not None else [row for share in shares for row in share]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.client().reset_validation()
        for start in range(0, len(self.rows), self.batch_size):
            yield self.collate([self.rows[i] for i in self._indices(start)])
        metrics = self.client().validation_metrics()
        self.metrics = metrics[0] if isinstance(metrics, list) else metrics  # under Ray: one per rank, all equal


def train_loader(rows: Dataset, sampler: StepBatchSampler, collate: Callable, num_workers: int) -> DataLoader:
    """A plain torch loader over the sampler's batches."""
    return DataLoader(rows, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers)
