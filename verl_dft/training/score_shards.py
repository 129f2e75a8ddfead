"""Scored values shard by shard.

A shard is a fixed set of rows of like length, scored alone and written atomically; a run that was killed scores the
missing ones, and ends with the bytes it would have had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from verl_dft.failpoints import failpoint
from verl_dft.files import atomic_write, writing
from verl_dft.training.checked_array import read_array, write_array
from verl_dft.training.score_rows import ScoreRows, check_values

if TYPE_CHECKING:
    from torch import Tensor


def shards_of(rows: ScoreRows, shard_size: int) -> list[np.ndarray]:
    """Row numbers of each shard: longest rows first, so that a shard's are of like length and memory runs out early."""
    order = np.argsort(-rows.lengths, kind="stable")
    return [order[start : start + shard_size] for start in range(0, len(order), shard_size)]


class ShardStore:
    """The stored values of one set of rows: a file per shard (``.npy``, then its CRC-32), whole or not there.

    Args:
        folder: of the shards.
        num_values: values per token.
    """

    def __init__(self, folder: Path, rows: ScoreRows, shard_size: int, num_values: int) -> None:
        self.folder, self.rows, self.num_values = folder, rows, num_values
        self.shards = shards_of(rows, shard_size)

    def path(self, number: int) -> Path:
        """File of a shard."""
        return self.folder / f"{number:06d}.npy"

    def read(self, number: int) -> np.ndarray | None:
        """[k, tokens of the shard's rows, one after the other], or None where it is missing or damaged."""
        values = read_array(self.path(number))
        if values is None:
            return None
        tokens = int(self.rows.responses[self.shards[number]].sum())
        return values if values.shape == (self.num_values, tokens) and values.dtype == np.float32 else None

    def missing(self) -> list[int]:
        """Shards that are still to be scored."""
        return [number for number in range(len(self.shards)) if self.read(number) is None]

    def write(self, number: int, values: Sequence[np.ndarray]) -> None:
        """Store a shard. Raises InputError for values that are no log-probs."""
        check_values(self.rows, dict(zip(self.shards[number].tolist(), values, strict=True)))
        failpoint("score.before_write")
        with writing(self.folder), atomic_write(self.path(number), "wb") as file:
            write_array(file, np.concatenate(values, axis=1))
            failpoint("score.before_rename")
        failpoint("score.after_write")

    def values(self) -> np.ndarray:
        """[k, scored tokens] float32 of all rows, in their order."""
        ends = np.cumsum(self.rows.responses)
        whole = np.empty((self.num_values, int(ends[-1])), dtype=np.float32)
        for number, members in enumerate(self.shards):
            stored, at = self.read(number), 0
            assert stored is not None, f"shard {self.path(number)} is missing"
            for row in members:
                count = int(self.rows.responses[row])
                whole[:, ends[row] - count : ends[row]] = stored[:, at : at + count]
                at += count
        return whole


def score_missing(
    stores: dict[str, ShardStore],
    missing: dict[str, list[int]],
    score: Callable[[Sequence[dict[str, Tensor]]], list[np.ndarray]],
    is_first_rank: bool = True,
) -> None:
    """Score what is missing; the first rank stores it.

    Args:
        stores: name -> the values of a set of rows.
        missing: name -> shards to score, the same on every rank.
        score: [k, tokens] of each item, on the first rank.
    """
    total = sum(int(store.rows.lengths.sum()) for store in stores.values())
    todo = sum(int(stores[name].rows.lengths[stores[name].shards[n]].sum()) for name in missing for n in missing[name])
    bar = tqdm(
        total=total, initial=total - todo, desc="scoring", unit="tok", unit_scale=True, disable=not is_first_rank
    )
    with bar:
        for name, numbers in missing.items():
            rows, shards = stores[name].rows, stores[name].shards
            for number in numbers:
                values = score([rows[int(row)] for row in shards[number]])
                if is_first_rank:
                    stores[name].write(number, values)
                bar.update(int(rows.lengths[shards[number]].sum()))
