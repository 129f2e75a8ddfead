"""Encoded rows as the arrays of a dataset's folder, written part by part."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from verl_dft.data.encode import Encoded, EncodedRow, RowNames
from verl_dft.data.row_checks import PER_TOKEN
from verl_dft.errors import InputError
from verl_dft.files import write_json
from verl_dft.origins import ORIGINS

if TYPE_CHECKING:
    import pyarrow as pa

_OUTSIDE = {"ref_logp": 0.0, "behavior_logp": np.nan}
"""Value of a per-token column where a row stores none."""


class GrowingArray:
    """A one-dimensional .npy file that grows; whole when the block that it is used in ends."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self._file, self._dtype, self._length = open(path, "wb"), np.dtype(dtype), 0
        self._header()
        self._start = self._file.tell()

    def __enter__(self) -> GrowingArray:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                self._header()
                # numpy leaves room in the header for any length
                assert self._file.tell() == self._start

    def append(self, values: np.ndarray) -> None:
        """Add ``values`` [n] at the end."""
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._length += len(values)

    def _header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        given = {"descr": descr, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, given)


@dataclass
class Fit:
    """What becomes of rows over ``max_length`` (see ``verl_dft.data.dataset.load_dataset``), with what was counted."""

    max_length: int
    overlong: str
    names: RowNames
    counts: Counter[str] = field(default_factory=Counter)
    shortest: int | None = None

    def cut(self, index: int, row: EncodedRow) -> EncodedRow | None:
        """The row as it stays; None where it does not. Raises InputError under ``error``."""
        length = len(row.prompt) + len(row.response)
        self.shortest = length if self.shortest is None else min(self.shortest, length)
        self.counts["rows_read"] += 1
        if length > self.max_length:
            if self.overlong == "error":
                raise InputError(
                    f"{self.names(index)}: {length} tokens (prompt {len(row.prompt)}, response {len(row.response)}) "
                    f"exceed data.max_length={self.max_length}; raise it, or set data.overlong=drop or truncate"
                )
            room = self.max_length - len(row.prompt)
            if self.overlong == "drop" or room < 1:
                self.counts["rows_dropped_overlong"] += 1
                self.counts["rows_dropped_long_prompt"] += room < 1
                return None
            row = EncodedRow(row.prompt, row.response[:room], False, row.stored)
            self.counts["rows_truncated"] += 1
        self.counts["rows_kept"] += 1
        return row

    def report(self) -> dict[str, int]:
        """The counts. Raises InputError where no row stays."""
        if not self.counts["rows_kept"]:
            raise InputError(
                f"{', '.join(self.names.files)}: all {self.counts['rows_read']} rows are longer than "
                f"data.max_length={self.max_length} (the shortest has {self.shortest} tokens); raise it, or set "
                "data.overlong=truncate"
            )
        names = ("rows_read", "rows_kept", "rows_dropped_overlong", "rows_dropped_long_prompt", "rows_truncated")
        return {name: self.counts[name] for name in names}


def write_arrays(
    folder: Path, parts: Iterable[Encoded], fit: Fit, table: pa.Table, columns: Sequence[str], report: dict[str, int]
) -> None:
    """Write the arrays that ``verl_dft.data.dataset.RowDataset`` reads, and ``meta.json`` with the report.

    Args:
        parts: the rows of ``table``, encoded, in order. Only one part is held at a time.
        columns: of ``table``, written beside the tokens.
        report: counts to add to.

    Raises:
        InputError: what ``fit`` raises.
    """
    kept, prompts, responses, counts = _write_tokens(folder, parts, fit, table, columns)
    report = fit.report() | report
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(prompts + responses)]).astype(np.int64))
    np.save(folder / "prompt_lens.npy", prompts)
    _write_row_columns(folder, table, kept, columns)
    report |= {"num_tokens": int(prompts.sum() + responses.sum()), "num_trained_tokens": int(responses.sum())}
    report |= dict.fromkeys(("end_tokens_appended", "end_tokens_without_value", "rows_cut_off"), 0) | counts
    write_json(folder / "meta.json", {"report": report, "columns": list(columns)})


def _write_tokens(
    folder: Path, parts: Iterable[Encoded], fit: Fit, table: pa.Table, columns: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Counter[str]]:
    """Write what is one value for a token: ``tokens.npy`` and the per-token columns.

    Returns:
        Of the rows that stay: index, prompt length (int32), response length [num_rows] int64; and the encoder's counts.
    """
    kept, prompts, responses = array("q"), array("i"), array("q")
    counts: Counter[str] = Counter()
    first = 0
    with ExitStack() as files:
        tokens = files.enter_context(GrowingArray(folder / "tokens.npy", np.int32))
        flat = {
            name: files.enter_context(GrowingArray(folder / f"{name}.npy", np.float32))
            for name in columns
            if name in PER_TOKEN
        }
        for part in parts:
            found = [(i, row) for i, one in enumerate(part.rows) if (row := fit.cut(first + i, one)) is not None]
            at, rows = np.array([i for i, _ in found], dtype=np.int64), [row for _, row in found]
            for row in rows:
                tokens.append(row.prompt)
                tokens.append(row.response)
            for name, file in flat.items():
                values = table[name].slice(first, len(part.rows)).take(at)
                counts[f"rows_without_{name}"] += values.null_count
                file.append(_per_token(name, values, rows))
            kept.extend((first + at).tolist())
            prompts.extend(len(row.prompt) for row in rows)
            responses.extend(len(row.response) for row in rows)
            counts["end_tokens_appended"] += sum(row.end_appended for row in rows)
            counts["end_tokens_without_value"] += sum(row.end_appended and row.stored for row in rows)
            counts.update(part.counts)
            first += len(part.rows)
    return np.array(kept), np.array(prompts), np.array(responses), counts


def _write_row_columns(folder: Path, table: pa.Table, kept: np.ndarray, columns: Sequence[str]) -> None:
    """What is one value for a row, of the rows ``kept`` [num_rows]."""
    groups = table["group_id"].combine_chunks().dictionary_encode().indices.take(kept)
    np.save(folder / "groups.npy", groups.fill_null(-1).to_numpy().astype(np.int64))
    for name in columns:
        if name == "origin":
            codes = np.array([ORIGINS.index(value) for value in table[name].take(kept).to_pylist()], dtype=np.float32)
            np.save(folder / "origin.npy", codes)
        elif name not in PER_TOKEN:
            np.save(folder / f"{name}.npy", table[name].take(kept).to_numpy().astype(np.float32))


def _per_token(name: str, values: Any, rows: Sequence[EncodedRow]) -> np.ndarray:
    """[tokens of the rows] float32, value of token t at position t."""
    flat = np.full(sum(len(row.prompt) + len(row.response) for row in rows), _OUTSIDE[name], dtype=np.float32)
    start = 0
    for row, value in zip(rows, values, strict=True):
        start += len(row.prompt)
        if value.is_valid:
            stored = value.values.to_numpy(zero_copy_only=False)[: len(row.response)]
            flat[start : start + len(stored)] = stored
        start += len(row.response)
    return flat
