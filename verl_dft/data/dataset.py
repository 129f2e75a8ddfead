"""Rows as tensors: one tokenised, memory-mapped dataset for every trainer path."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from verl_dft.data.arrays import Fit, write_arrays
from verl_dft.data.cache import cache_key, cached_dir, tokenizer_fingerprint
from verl_dft.data.encode import encode_parts
from verl_dft.data.records import PER_TOKEN
from verl_dft.data.selection import COLUMNS, check_columns, of_origins, read_table
from verl_dft.errors import InputError
from verl_dft.files import sha256_file
from verl_dft.origins import ORIGINS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OVERLONG = ("drop", "truncate", "error")


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
        parts, fit = encode_parts(table, tokenizer, names, num_proc), Fit(max_length, overlong, names)
        write_arrays(folder, parts, fit, table, columns, {"rows_other_origins": others})

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
