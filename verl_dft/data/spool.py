"""Rows on their way to a parquet file: taken one after the other, kept on the disk, written when all are known."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from verl_dft.data import tables

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")


class Spool(Generic[T]):
    """Items of a file to come, as Arrow tables of 4,096 in a temporary file without a name beside it.

    The temporary file is made when the first part is full. It goes with the block that the spool is used in, and with
    the process whatever becomes of it.

    Args:
        path: the parquet file to come.
        schema: its columns.
        to_table: a table of ``schema`` from a part's items and the row that the first of them will be.
        drop_empty: leave out the columns that have no value in the whole file.
    """

    def __init__(
        self,
        path: str | Path,
        schema: pa.Schema,
        to_table: Callable[[list[T], int], pa.Table],
        drop_empty: bool = False,
    ) -> None:
        self.path = Path(path)
        self._schema, self._to_table, self._drop_empty = schema, to_table, drop_empty
        self._waiting: list[T] = []
        self._num_stored = 0
        self._filled: set[str] = set()
        self._file: Any = None
        self._writer: Any = None

    def __enter__(self) -> Spool[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return self._num_stored + len(self._waiting)

    def add(self, items: Iterable[T]) -> None:
        """Take items, of which no more than a part's are held. Raises what ``to_table`` raises."""
        for item in items:
            self._waiting.append(item)
            if len(self._waiting) >= tables.PART:
                self._store()

    def write(self, **facts: Any) -> Path:
        """Write everything to ``path``, with a manifest beside it (``facts`` go there)."""
        from verl_dft.files import atomic_write, sha256_file, write_manifest

        if self._waiting:
            self._store()
        names = [n for n in self._schema.names if n in self._filled or not self._drop_empty or not self._num_stored]
        schema = self._schema.empty_table().select(names).schema
        with atomic_write(self.path, "wb") as file:
            tables.write_in_parts((part.select(names) for part in self._parts()), schema, file)
        write_manifest(self.path, num_rows=self._num_stored, rows_sha256=sha256_file(self.path), **facts)
        return self.path

    def _store(self) -> None:
        import pyarrow as pa

        table = self._to_table(self._waiting, self._num_stored)
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.path.parent)
            self._writer = pa.ipc.new_stream(self._file, self._schema)
        self._writer.write_table(table)
        self._filled |= {name for name in table.column_names if table[name].null_count < table.num_rows}
        self._num_stored += table.num_rows
        self._waiting = []

    def _parts(self) -> Iterator[pa.Table]:
        import pyarrow as pa

        if self._file is None:
            return
        self._writer.close()
        self._file.seek(0)
        for batch in pa.ipc.open_stream(self._file):
            yield pa.Table.from_batches([batch])
