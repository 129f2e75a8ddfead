"""Batch order: a function of (seed, epoch, step), the same for any number of ranks; validation covers every row."""

import numpy as np
import pytest
import torch

from verl_dft.training.batches import PaddedRows, StepBatchSampler, ValidationLoader

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
