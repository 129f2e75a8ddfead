"""Rows as tensors: one tokenised, memory-mapped dataset for every trainer path."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from verl_dft.data.cache import cache_key, cached_dir, tokenizer_fingerprint
from verl_dft.data.encode import Encoded, EncodedRow, RowNames, encode_rows
from verl_dft.data.records import PER_TOKEN
from verl_dft.data.selection import COLUMNS, check_columns, of_origins, read_table
from verl_dft.errors import InputError
from verl_dft.files import sha256_file, write_json
from verl_dft.origins import ORIGINS

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

OVERLONG = ("drop", "truncate", "error")
_OUTSIDE = {"ref_logp": 0.0, "behavior_logp": np.nan}
"""Value of a per-token column where a row stores none."""


class RowDataset(Dataset[dict[str, torch.Tensor]]):
    """Token ids, the mask of trained tokens and the columns asked for, read from memory-mapped arrays.

    Attributes:
        lengths: [num_rows] int64, tokens of prompt and response.
        groups: [num_rows] int64, equal for rows of the same ``group_id``; -1 for rows without one.
        report: counts of what was read, kept, dropped, cut and appended (see :func:`load_dataset`).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        self.report: dict[str, Any] = meta["report"]
        self.columns: tuple[str, ...] = tuple(meta["columns"])
        self.added: dict[str, Path] = {}
        self._open()

    def _open(self) -> None:
        self._offsets = np.load(self.folder / "offsets.npy")
        self._prompt_lens = np.load(self.folder / "prompt_lens.npy")
        self._tokens = np.load(self.folder / "tokens.npy", mmap_mode="r")
        self._values = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in self.columns}
        self._values |= {name: np.load(file, mmap_mode="r") for name, file in self.added.items()}
        self.lengths = np.diff(self._offsets)
        self.groups = np.load(self.folder / "groups.npy")

    def add_column(self, name: str, file: str | Path) -> None:
        """Serve a per-token column from ``file`` (.npy, [total tokens] float32, as :meth:`flat` lays them out)."""
        self.added[name] = Path(file)
        self._open()
        assert self._values[name].shape == (int(self._offsets[-1]),)

    def flat(self, index: int) -> slice:
        """Where row ``index`` lies in an array over all tokens."""
        return slice(int(self._offsets[index]), int(self._offsets[index + 1]))

    def __getstate__(self) -> dict[str, Any]:
        # a pickled memory map would carry its whole file into every data-loader worker
        return {name: getattr(self, name) for name in ("folder", "report", "columns", "added")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._prompt_lens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Row ``index``, T tokens long.

        Returns:
            ``input_ids``, ``position_ids`` [T] int64; ``loss_mask`` [T] int64, 1 on the response, end token included
            (never at position 0); ``advantage``, ``origin`` [1] float32; ``ref_logp``, ``behavior_logp`` [T] float32,
            nats, the value of token t at position t, 0 or NaN respectively where the row stores none.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        loss_mask = torch.zeros(end - start, dtype=torch.int64)
        loss_mask[int(self._prompt_lens[index]) :] = 1
        item = {
            "input_ids": torch.from_numpy(self._tokens[start:end].astype(np.int64)),
            "position_ids": torch.arange(end - start),
            "loss_mask": loss_mask,
        }
        for name, values in self._values.items():
            part = values[start:end] if name in PER_TOKEN else values[index : index + 1]
            item[name] = torch.from_numpy(np.array(part))
        return item


def load_dataset(
    files: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlong: str = "drop",
    columns: Collection[str] = (),
    max_rows: int | None = None,
    origins: Sequence[str] | None = None,
    cache_dir: str | Path,
    num_proc: int | None = None,
) -> RowDataset:
    """Training rows as tensors, tokenised once and kept in ``cache_dir``.

    Args:
        files: row files (``verl_dft.data.records``), jsonl or parquet.
        tokenizer: with a chat template; see ``verl_dft.data.template`` for how the response is found.
        max_length: most tokens of a row, prompt and response together.
        overlong: for longer rows, ``drop`` them, ``truncate`` the response, or ``error``. A truncated response gets
            no end token, since the text does not end there; a row whose prompt alone fills ``max_length`` is dropped
            under ``truncate`` too.
        columns: of ``advantage``, ``ref_logp``, ``behavior_logp``, ``origin``; every row must have the first two.
        max_rows: read only that many rows, from the start (None or a negative number: all).
        origins: keep only rows written by these (of ``verl_dft.origins.ORIGINS``); None keeps all.
        num_proc: processes for tokenising; None uses the machine's cores where the rows are many.

    The report counts ``rows_read, rows_other_origins, rows_kept, rows_dropped_overlong`` (of them
    ``rows_dropped_long_prompt``), ``rows_truncated, num_tokens, num_trained_tokens, end_tokens_appended`` (the template
    or the stored ids had none),
    ``end_tokens_without_value`` (appended to stored ids), ``rows_cut_off`` (stored ids of an unfinished generation),
    ``rows_without_<column>`` and the special cases of ``verl_dft.data.template``.

    Raises:
        InputError: bad files or rows, a column without values, a row over ``max_length`` under ``error``, no row left,
            a tokenizer without chat template.
    """
    paths = [Path(f).expanduser() for f in ([files] if isinstance(files, str | Path) else files)]
    columns = sorted(columns)
    _check_options(paths, max_length, overlong, columns, max_rows)
    for origin in origins or ():
        if origin not in ORIGINS:
            raise InputError(f"data.origins has {origin!r}; use some of {', '.join(ORIGINS)}")
    max_rows = None if max_rows is None or max_rows < 0 else max_rows
    key = cache_key(
        {
            "files": [sha256_file(path) for path in paths],
            # names stand in problem ids and messages, not in the arrays
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "max_length": max_length,
            "overlong": overlong,
            "columns": columns,
            "max_rows": max_rows,
            **({"origins": sorted(origins)} if origins else {}),
        }
    )

    def build(folder: Path) -> None:
        table, names = read_table(paths, max_rows)
        table, names, others = of_origins(table, names, origins)
        check_columns(table, names, columns)
        encoded = encode_rows(table, tokenizer, names, num_proc)
        kept, report = _fit(encoded, names, max_length, overlong)
        _write(folder, encoded, kept, table, columns, report | {"rows_other_origins": others})

    return RowDataset(cached_dir(cache_dir, key, build))


def _check_options(
    paths: Sequence[Path], max_length: int, overlong: str, columns: Sequence[str], max_rows: int | None
) -> None:
    if not paths:
        raise InputError("no row files were given; set data.train_files or data.source")
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path} does not exist; give a .jsonl, .jsonl.gz or .parquet file of rows")
    if overlong not in OVERLONG:
        raise InputError(f"data.overlong is {overlong!r}; use one of {', '.join(OVERLONG)}")
    if max_length < 2:
        raise InputError(f"data.max_length is {max_length}; a prompt and a response need at least 2 tokens")
    if max_rows == 0:
        raise InputError("max_rows is 0; ask for at least one row, or -1 for all")
    for name in columns:
        if name not in COLUMNS:
            raise InputError(f"no column {name!r}; training rows can have {', '.join(COLUMNS)}")


def _fit(encoded: Encoded, names: RowNames, max_length: int, overlong: str) -> tuple[list[int], dict[str, int]]:
    """Indices of the rows that stay, cut to ``max_length`` in place where the policy says so, and the report."""
    dropped = long_prompt = truncated = 0
    shortest, kept = None, []
    for index, row in enumerate(encoded.rows):
        length = len(row.prompt) + len(row.response)
        shortest = length if shortest is None else min(shortest, length)
        if length > max_length:
            if overlong == "error":
                raise InputError(
                    f"{names(index)}: {length} tokens (prompt {len(row.prompt)}, response {len(row.response)}) exceed "
                    f"data.max_length={max_length}; raise it, or set data.overlong=drop or truncate"
                )
            room = max_length - len(row.prompt)
            if overlong == "drop" or room < 1:
                dropped += 1
                long_prompt += room < 1
                continue
            encoded.rows[index] = EncodedRow(row.prompt, row.response[:room], False, row.stored)
            truncated += 1
        kept.append(index)
    if not kept:
        raise InputError(
            f"{', '.join(names.files)}: all {len(encoded.rows)} rows are longer than data.max_length={max_length} "
            f"(the shortest has {shortest} tokens); raise it, or set data.overlong=truncate"
        )
    report = {
        "rows_read": len(encoded.rows),
        "rows_kept": len(kept),
        "rows_dropped_overlong": dropped,
        "rows_dropped_long_prompt": long_prompt,
        "rows_truncated": truncated,
    }
    return kept, report


def _write(
    folder: Path, encoded: Encoded, kept: list[int], table: pa.Table, columns: Sequence[str], report: dict[str, int]
) -> None:
    rows = [encoded.rows[i] for i in kept]
    prompt_lens = np.array([len(row.prompt) for row in rows], dtype=np.int32)
    lengths = prompt_lens.astype(np.int64) + np.array([len(row.response) for row in rows], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    np.save(folder / "tokens.npy", np.concatenate([part for row in rows for part in (row.prompt, row.response)]))
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "prompt_lens.npy", prompt_lens)
    kept_indices = np.array(kept, dtype=np.int64)
    groups = table["group_id"].combine_chunks().dictionary_encode().indices.take(kept_indices)
    np.save(folder / "groups.npy", groups.fill_null(-1).to_numpy().astype(np.int64))
    for name in columns:
        values = table[name].take(kept)
        if name in PER_TOKEN:
            report[f"rows_without_{name}"] = values.null_count
            np.save(folder / f"{name}.npy", _per_token(name, values, rows, offsets))
        elif name == "origin":
            codes = np.array([ORIGINS.index(value) for value in values.to_pylist()], dtype=np.float32)
            np.save(folder / "origin.npy", codes)
        else:
            np.save(folder / f"{name}.npy", values.to_numpy().astype(np.float32))
    report |= {
        "num_tokens": int(lengths.sum()),
        "num_trained_tokens": int((lengths - prompt_lens).sum()),
        "end_tokens_appended": sum(row.end_appended for row in rows),
        "end_tokens_without_value": sum(row.end_appended and row.stored for row in rows),
        "rows_cut_off": 0,
        **encoded.counts,
    }
    write_json(folder / "meta.json", {"report": report, "columns": list(columns)})


def _per_token(name: str, values: pa.ChunkedArray, rows: Sequence[EncodedRow], offsets: np.ndarray) -> np.ndarray:
    """[total tokens] float32, value of token t at position t."""
    flat = np.full(int(offsets[-1]), _OUTSIDE[name], dtype=np.float32)
    for row, offset, value in zip(rows, offsets[:-1].tolist(), values, strict=True):
        if value.is_valid:
            stored = value.values.to_numpy(zero_copy_only=False)[: len(row.response)]
            start = offset + len(row.prompt)
            flat[start : start + len(stored)] = stored
    return flat
