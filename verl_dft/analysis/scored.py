"""Reading what ``verl-dft score`` wrote: log-probs, KL and token ids of rows, as flat arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from verl_dft.data.records import PER_TOKEN
from verl_dft.data.tables import read_parquet
from verl_dft.errors import InputError


@dataclass(frozen=True)
class ScoredFile:
    """Rows of one model, T tokens in all.

    Attributes:
        path: the parquet file.
        problems, origins: [rows].
        ids: [T] token ids of the responses, one row after the other.
        starts: [rows + 1] where each row begins in them.
        values: [T] float64, the column that was asked for.
    """

    path: Path
    problems: list[str]
    origins: list[str]
    ids: np.ndarray
    starts: np.ndarray
    values: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """[rows] tokens of each row."""
        return np.diff(self.starts)

    def sums(self, per_token: np.ndarray) -> np.ndarray:
        """[rows] float64: sums over each row's tokens of a [T] array."""
        return np.add.reduceat(per_token.astype(np.float64), self.starts[:-1])


def scored_path(path: Path) -> Path:
    """The rows of a ``verl-dft score`` folder, or the parquet file itself. Raises InputError where there are none."""
    file = path / "rows.parquet" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".parquet":
        raise InputError(f"{file} does not exist or is no parquet file; give the output_dir of verl-dft score")
    return file


def read_scored(path: Path, column: str | None = None) -> ScoredFile:
    """Read a file.

    Args:
        path: a folder of ``verl-dft score``, or its ``rows.parquet``.
        column: of log-probs or KL; None: the column that the manifest beside the file names, else the log-probs there.

    Raises:
        InputError: no such file or column; a row without values, or with another number of them than of tokens.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = scored_path(path)
    try:
        have = pq.read_schema(file).names
        column = column or _logp_column(file, have)
        for name in ("problem_id", "origin", "response_ids", column):
            if name not in have:
                raise InputError(f"{file}: no column {name!r} (columns: {', '.join(have)}); {_how(name)}")
        table = read_parquet(file, ["problem_id", "origin", "response_ids", column]).combine_chunks()
        ids, starts = _flat(table["response_ids"], file, "response_ids")
        values, value_starts = _flat(table[column], file, column)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if len(starts) < 2:
        raise InputError(f"{file} holds no rows; score some")
    wrong = np.diff(value_starts) != np.diff(starts)
    if wrong.any() or not np.diff(starts).all():
        row = int((wrong | (np.diff(starts) == 0)).argmax())
        raise InputError(
            f"{file}: row {row}: {np.diff(value_starts)[row]} values in column {column!r} for {np.diff(starts)[row]} "
            "tokens in response_ids; every token needs one; score again"
        )
    if not np.isfinite(values).all():
        raise InputError(f"{file}: column {column!r} has values that are not numbers; score again, in precision=fp32")
    names = [table[name].to_pylist() for name in ("problem_id", "origin")]
    return ScoredFile(file, names[0], names[1], ids, starts, values.astype(np.float64))


def check_same_rows(files: Mapping[str, ScoredFile]) -> None:
    """Raise InputError unless all files have the same rows, token by token: else differences are of texts, too."""
    (first, a), *others = files.items()
    for label, b in others:
        if len(a.problems) != len(b.problems):
            where = f"{len(a.problems)} and {len(b.problems)} rows"
        elif differing := [i for i, (x, y) in enumerate(zip(a.problems, b.problems, strict=True)) if x != y]:
            where = f"problem_id of row {differing[0]}"
        elif not np.array_equal(a.starts, b.starts):
            where = f"lengths of response_ids, first in row {int((a.counts != b.counts).argmax())}"
        elif not np.array_equal(a.ids, b.ids):
            row = int(np.searchsorted(a.starts, (a.ids != b.ids).argmax(), side="right")) - 1
            where = f"response_ids of row {row}"
        else:
            continue
        raise InputError(
            f"{first} ({a.path}) and {label} ({b.path}) have different rows ({where}); score the same file with both"
        )


def read_json(path: Path, how: str = "give the output_dir of verl-dft score") -> dict[str, Any]:
    """A JSON object. Raises InputError where it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; {how}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({' '.join(str(error).split())[:120]}); {how}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a JSON object; {how}")
    return found


def _logp_column(file: Path, have: Sequence[str]) -> str:
    """The column that the scoring wrote; its manifest says which, where rows came with another."""
    manifest = Path(f"{file}.manifest.json")
    named = read_json(manifest).get("column") if manifest.is_file() else None
    found = [named] if named in have else [name for name in PER_TOKEN if name in have]
    if len(found) != 1:
        has = f"both {' and '.join(found)}" if found else "no column of log-probs"
        raise InputError(
            f"{file} has {has} (columns: {', '.join(have)}); name one of {', '.join(PER_TOKEN)} as column=…"
        )
    return str(found[0])


def _how(column: str) -> str:
    return "score with kl=true reference.path=FOLDER" if column.startswith("kl_") else "score the rows: verl-dft score"


def _flat(column: Any, file: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow as pa

    array = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    if not pa.types.is_list(array.type) and not pa.types.is_large_list(array.type):
        raise InputError(f"{file}: column {name!r} holds {array.type} where a list for each row belongs")
    if array.null_count:
        row = array.is_null().to_pylist().index(True)
        raise InputError(f"{file}: row {row}: column {name!r} is empty; score the rows: verl-dft score")
    lengths = array.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    return array.flatten().to_numpy(zero_copy_only=False), np.concatenate([[0], np.cumsum(lengths)])
