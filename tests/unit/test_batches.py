"""Batch order: a function of (seed, epoch, step), the same for any number of ranks; validation covers every row."""

import numpy as np
import pytest
import torch

from verl_dft.errors import InputError
from verl_dft.training.batches import PaddedRows, StepBatchSampler, ValidationLoader, group_members

LENGTHS = np.random.default_rng(0).integers(5, 200, size=43)


def sampler(dp_size: int = 1, dp_rank: int | None = 0, seed: int = 1, balance: bool = True) -> StepBatchSampler:
    return StepBatchSampler(LENGTHS, 8, dp_size=dp_size, dp_rank=dp_rank, seed=seed, balance=balance)


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("dp_size", [2, 4])
def test_ranks_share_the_batch_of_one_rank(dp_size: int, balance: bool) -> None:
    for epoch in range(2):
        for step in range(len(sampler())):
            whole = sampler(balance=balance).rows(epoch, step)
            shares = [sampler(dp_size, rank, balance=balance).rows(epoch, step) for rank in range(dp_size)]
            assert sorted(row for share in shares for row in share) == sorted(whole)
            assert {len(share) for share in shares} == {8 // dp_size}
            ray = sampler(dp_size, None, balance=balance).rows(epoch, step)
            assert ray == [row for share in shares for row in share]


def test_an_epoch_uses_each_row_at_most_once_and_epochs_differ() -> None:
    one = sampler()
    epochs = []
    for epoch in range(3):
        one.set_epoch(epoch)
        rows = [row for batch in one for row in batch]
        assert len(rows) == len(set(rows)) == 40
        epochs.append(rows)
    assert epochs[0] != epochs[1] != epochs[2]
    assert set(epochs[0]) != set(epochs[1]), "the remainder must differ from epoch to epoch"


def test_seed_decides() -> None:
    assert sampler(seed=1).rows(0, 0) == sampler(seed=1).rows(0, 0)
    assert sorted(sampler(seed=1).rows(0, 0)) != sorted(sampler(seed=2).rows(0, 0))


def test_resuming_takes_the_steps_that_are_left_once() -> None:
    one = sampler()
    one.set_epoch(1)
    all_batches = list(one)
    one.start_at(3)
    assert list(one) == all_batches[3:]
    assert list(one) == all_batches, "the next epoch starts at its first step"


def test_balanced_shares_have_like_work_and_are_ordered_by_length() -> None:
    for step in range(5):
        shares = [sampler(2, rank).rows(0, step) for rank in range(2)]
        totals = [LENGTHS[share].sum() for share in shares]
        assert max(totals) - min(totals) < 0.5 * min(totals)
        for share in shares:
            assert list(LENGTHS[share]) == sorted(LENGTHS[share], reverse=True)


class Rows:
    """Ten rows that know their index."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([index, index]), "loss_mask": torch.tensor([0, 1])}


def test_padding_rows_are_untrained() -> None:
    padded = PaddedRows(Rows(), 4)
    assert len(padded) == 12
    assert [int(padded[i]["loss_mask"].sum()) for i in range(12)] == [1] * 10 + [0, 0]


class Client:
    """Stands for the worker: remembers the calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def reset_validation(self) -> None:
        self.calls.append("reset")

    def validation_metrics(self) -> dict[str, float]:
        self.calls.append("metrics")
        return {"nll": 1.5}


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_validation_sees_every_row_once(dp_size: int) -> None:
    seen = []
    for rank in range(dp_size):
        client = Client()
        loader = ValidationLoader(
            Rows(), 4, dp_size=dp_size, dp_rank=rank, collate=lambda rows: rows, client=lambda c=client: c
        )
        batches = list(loader)
        assert len(batches) == len(loader) == 3 and {len(batch) for batch in batches} == {4 // dp_size}
        seen += [int(row["input_ids"][0]) for batch in batches for row in batch if row["loss_mask"].sum()]
        assert client.calls == ["reset", "metrics"] and loader.metrics == {"nll": 1.5}
    assert sorted(seen) == list(range(10))


@pytest.mark.parametrize("balance", [True, False])
def test_mini_batches_hold_the_same_rows_on_any_number_of_ranks(balance: bool) -> None:
    def minis(dp_size: int) -> list[list[int]]:
        """Sorted rows of each mini-batch: the ranks' parts put together."""
        shares = [
            StepBatchSampler(LENGTHS, 16, dp_size=dp_size, dp_rank=rank, seed=1, balance=balance, updates=4).rows(0, 1)
            for rank in range(dp_size)
        ]
        size = 4 // dp_size
        return [sorted(row for share in shares for row in share[i * size : (i + 1) * size]) for i in range(4)]

    assert minis(1) == minis(2) == minis(4)
    permutation = np.random.default_rng([1, 0]).permutation(len(LENGTHS))[16:32]
    assert minis(1) == [sorted(part.tolist()) for part in permutation.reshape(4, 4)], "not sorted by length over minis"


# ---- groups ----

GROUPS = np.random.default_rng(1).permutation(np.repeat(np.arange(12), 4))[:-3]
"""12 groups of 4 rows, mixed up; up to three have lost a row or more."""
WHOLE = [group for group in range(12) if (GROUPS == group).sum() == 4]


def test_whole_groups_are_found_wherever_their_rows_lie() -> None:
    members = group_members(GROUPS, 8)
    assert members.shape == (len(WHOLE), 4) and 9 <= len(WHOLE) < 12
    assert [set(GROUPS[rows]) for rows in members] == [{GROUPS[rows[0]]} for rows in members]
    assert {int(GROUPS[rows[0]]) for rows in members} == set(WHOLE)
    assert (np.diff(members, axis=1) > 0).all() and (np.diff(members[:, 0]) > 0).all()


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize(("dp_size", "updates"), [(1, 1), (2, 1), (2, 2), (4, 2), (1, 2)])
def test_a_group_is_in_one_mini_batch_on_any_number_of_ranks(dp_size: int, updates: int, balance: bool) -> None:
    lengths = LENGTHS[np.arange(len(GROUPS)) % len(LENGTHS)]

    def mini_batches(dp_size: int, epoch: int) -> list[list[int]]:
        options = {"seed": 3, "balance": balance, "updates": updates, "members": group_members(GROUPS, 16 // updates)}
        ranks = [StepBatchSampler(lengths, 16, dp_size=dp_size, dp_rank=rank, **options) for rank in range(dp_size)]
        size, found = 16 // dp_size // updates, []
        for step in range(len(ranks[0])):
            shares = [rank.rows(epoch, step) for rank in ranks]
            found += [
                sorted(row for share in shares for row in share[i * size : (i + 1) * size]) for i in range(updates)
            ]
        return found

    for epoch in range(2):
        batches = mini_batches(dp_size, epoch)
        assert len(batches) == len(WHOLE) * 4 // 16 * updates
        for batch in batches:
            counts = np.bincount(GROUPS[batch], minlength=12)
            assert set(counts.tolist()) <= {0, 4} and counts.sum() == 16 // updates
        assert batches == mini_batches(1, epoch)
    assert mini_batches(1, 0) != mini_batches(1, 1)


def test_without_groups_the_order_is_what_it_was() -> None:
    """A run that was begun before groups could be kept together goes on with the same batches."""
    one = StepBatchSampler(LENGTHS, 8, dp_size=1, dp_rank=0, seed=1, balance=False)
    assert one.rows(2, 1) == np.random.default_rng([1, 2]).permutation(len(LENGTHS))[8:16].tolist()


@pytest.mark.parametrize(
    ("groups", "size", "message"),
    [
        (np.repeat(np.arange(3), 8), 4, "a group has 8 rows and an update 4"),
        (np.repeat(np.arange(3), 8), 12, "no multiple of the group size 8; use 8"),
        (np.array([0, 0, -1, 1, 1]), 2, "1 of 5 rows have no group_id"),
    ],
)
def test_groups_that_do_not_fit_a_batch_are_refused(groups: np.ndarray, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        group_members(groups, size)
