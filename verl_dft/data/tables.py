"""Reading jsonl, jsonl.gz and parquet files into plain records, with errors that name file, row and column."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from verl_dft.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
PART = 4096
"""Records that are read, checked and written at a time; only so many are Python objects together."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_records(path: str | Path, compact: Collection[str] = ()) -> list[dict[str, Any]]:
    """All records of a file, by its suffix: ``.jsonl``, ``.jsonl.gz``, ``.json`` (a list) or ``.parquet``.

    Args:
        compact: columns of numbers for each token. From parquet their values are ``array.array``, which need 4 or 8
            bytes a number where a list needs 36.

    Raises:
        InputError: the file is missing, empty, of another kind or damaged, or has what JSON lets pass and nothing can
            use (a name given twice, half of a surrogate pair); names the file and the row.
    """
    return [record for part in read_parts(path, compact) for record in part]


def read_parts(path: str | Path, compact: Collection[str] = ()) -> Iterator[list[dict[str, Any]]]:
    """The same records in order, in lists of at most 4,096 (a ``.json`` file in one list), none of them empty.

    Raises:
        InputError: as :func:`read_records`, each when its part is reached.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {kind}; give a .jsonl, .jsonl.gz or .parquet file")
    suffixes = "".join(path.suffixes[-2:]).lower()
    if suffixes.endswith(".parquet"):
        parts = _parquet_parts(path, compact)
    elif suffixes.endswith((".jsonl", ".jsonl.gz")):
        parts = in_parts(_jsonl_records(path))
    elif suffixes.endswith(".json"):
        parts = iter([_read_json(path)])
    else:
        raise InputError(f"{path} is of an unknown kind; give a .jsonl, .jsonl.gz or .parquet file")
    empty = True
    for part in parts:
        if part:
            empty = False
            yield part
    if empty:
        raise InputError(f"{path} holds no rows; give a file with at least one")


def in_parts(items: Iterable[T]) -> Iterator[list[T]]:
    """``items`` in lists of at most 4,096, in order, each made when it is asked for."""
    iterator = iter(items)
    while part := list(islice(iterator, PART)):
        yield part


def need_columns(
    path: str | Path, records: Sequence[Mapping[str, Any]], names: Sequence[str], hint: str = "", first: int = 0
) -> None:
    """Raise :class:`InputError` for the first record without one of ``names`` (a null counts as present).

    ``first``: row of the file that the first of ``records`` is.
    """
    for index, record in enumerate(records, first):
        for name in names:
            if name not in record:
                have = ", ".join(sorted(map(str, record))) or "none"
                advice = hint or "add it or rename one of them"
                raise InputError(f"{path}: row {index}: no column {name!r} (columns: {have}); {advice}")


def columns_of(path: str | Path) -> frozenset[str]:
    """Columns of a parquet file, or of the first record of another. Raises InputError as :func:`read_parts`."""
    path = Path(path)
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return frozenset(pq.read_schema(path).names)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} cannot be read as parquet: {' '.join(str(error).split())[:200]}") from None
    return frozenset(next(read_parts(path))[0])


def write_parquet(table: pa.Table, file: IO[bytes]) -> None:
    """Write a table with a checksum for each page; without, a flipped bit on the disk often changes a value unseen."""
    import pyarrow.parquet as pq

    pq.write_table(table, file, write_page_checksum=True)


def write_in_parts(parts: Iterable[pa.Table], schema: pa.Schema, file: IO[bytes]) -> None:
    """The same of a table that is made part by part, so that it is never whole in memory."""
    import pyarrow.parquet as pq

    with pq.ParquetWriter(file, schema, write_page_checksum=True) as writer:
        for part in parts:
            writer.write_table(part)


def json_line(record: Mapping[str, Any]) -> str:
    """One line of a jsonl file, newline included."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_parquet(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Some or all columns of a parquet file, its checksums verified.

    Raises:
        InputError: the file is missing, damaged, or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=columns and list(columns), page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if missing := [name for name in columns or () if name not in table.column_names]:
        raise InputError(f"{path} lacks the column(s) {', '.join(missing)}; make it again")
    return table


def unreadable(path: str | Path, error: Exception) -> InputError:
    """What to raise for a parquet file that ``error`` was raised for."""
    why = " ".join(str(error).split())[:200]
    return InputError(f"{path} cannot be read as parquet: {why}; make it again, or take a copy of it")


def _parquet_parts(path: Path, compact: Collection[str]) -> Iterator[list[dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=PART):
                yield records_of(pa.Table.from_batches([batch]), compact)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: bad UTF-8, bad dates
        raise unreadable(path, error) from None


def records_of(table: pa.Table, compact: Collection[str] = ()) -> list[dict[str, Any]]:
    """The rows of a table as :func:`read_records` gives them."""
    short = [name for name in compact if name in table.column_names and _is_compact(table[name])]
    records = table.drop_columns(short).to_pylist() if short else table.to_pylist()
    for name in short:
        for record, values in zip(records, _arrays(table[name]), strict=True):
            record[name] = values
    return records


_CODES = {"int32": "i", "int64": "q", "float": "f", "double": "d"}
"""Arrow's types as those of ``array.array``."""


def _is_compact(column: pa.ChunkedArray) -> bool:
    import pyarrow as pa

    kind = column.type
    if not (pa.types.is_list(kind) and str(kind.value_type) in _CODES):
        return False
    return not any(chunk.flatten().null_count for chunk in column.chunks)


def _arrays(column: pa.ChunkedArray) -> Iterator[array[Any] | None]:
    """The lists of a column, None for a missing one."""
    code = _CODES[str(column.type.value_type)]
    for chunk in column.chunks:
        values, end = chunk.flatten().to_numpy(), 0
        for length in chunk.value_lengths().to_pylist():
            start, end = end, end + (length or 0)
            yield None if length is None else array(code, values[start:end].tobytes())


def _jsonl_records(path: Path) -> Iterator[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:  # Windows writes a mark at the start
            # not splitlines(): JSON strings may hold U+2028, which is not the end of a record
            for number, line in enumerate(file):
                if line.strip():
                    yield _parse(path, number, line)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    record = _loads(line, f"{path}: line {number + 1}")
    if not isinstance(record, dict):
        raise InputError(f'{path}: line {number + 1} must be a JSON object, e.g. {{"problem": …}}')
    return record


def _loads(text: str, where: str) -> Any:
    """A JSON text. Raises InputError for what is none, and for what would be lost or be of no use without a word."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise InputError(f"{where} is not JSON: {error.msg} ({at})") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply") from None
    except ValueError as error:  # a name that is there twice; a number of thousands of digits
        raise InputError(f"{where}: {str(error).partition('; use sys.')[0]}") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(f"{where} has half of a surrogate pair in a text; mend the text") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice in one object; keep one")
    return value


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    records = _loads(text, str(path))
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{path} must hold a list of objects")
    return records
