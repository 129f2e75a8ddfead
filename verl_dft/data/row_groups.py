"""A parquet file's rows by number, read from the disk when they are used."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_dft.data import tables
from verl_dft.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

_LARGEST = 4
"""Parts that a row group may be long, to be read as a whole for one of its rows."""
_KEPT_GROUPS, _KEPT_BLOCKS = 2, 8
_BLOCK = 32
"""Rows that become Python objects together: a row alone costs as much as ten."""
_PATIENCE = 4
"""Times that a file is decoded for the order its rows are asked for, before all of it is kept."""


class RowGroups:
    """Rows of a parquet file as records (see ``verl_dft.data.tables.read_records``).

    Of the row groups decoded the last two are kept, so that going through the rows in order decodes each once. Where
    rows are asked for in an order that decodes the file again and again, it is kept as Arrow tables from then on.

    Raises:
        InputError: the file cannot be read; when a row is asked for: it was changed since this was made.
    """

    def __init__(self, path: Path, compact: Collection[str] = ()) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self._compact = path, tuple(compact)
        self._state = _state(path)
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise tables.unreadable(path, error) from None
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._ends = list(accumulate(sizes))
        self.small = max(sizes, default=0) <= _LARGEST * tables.PART
        """Whether the row groups are small enough to be read one at a time."""
        self.num_decoded = 0
        """Row groups decoded so far, each as often as it was."""
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], list[dict[str, Any]]] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Row ``row``, counted from 0, which must exist."""
        assert 0 <= row < len(self), row
        number = bisect_right(self._ends, row)
        start = self._ends[number - 1] if number else 0
        block, at = divmod(row - start, _BLOCK)
        key = (number, block)
        if key in self._blocks:
            self._blocks.move_to_end(key)
        else:
            found = self._group(number).slice(block * _BLOCK, _BLOCK)
            _keep(self._blocks, key, tables.records_of(found, self._compact), _KEPT_BLOCKS)
        return self._blocks[key][at]

    def _group(self, number: int) -> pa.Table:
        if number in self._groups:
            self._groups.move_to_end(number)
        else:
            lost = self.num_decoded > _PATIENCE * len(self._ends)
            _keep(self._groups, number, self._decode(number), len(self._ends) if lost else _KEPT_GROUPS)
        return self._groups[number]

    def _decode(self, number: int) -> pa.Table:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.num_decoded += 1
        if _state(self.path) != self._state:
            raise InputError(f"{self.path} was changed or removed while it was read; run the same command again")
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                return file.read_row_group(number)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise tables.unreadable(self.path, error) from None


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    while len(kept) >= most:
        kept.popitem(last=False)
    kept[key] = value


def _state(path: Path) -> tuple[int, int] | None:
    """What changes when a file does; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
