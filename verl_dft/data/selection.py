"""Which rows of the files are used, and which columns they can provide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from verl_dft.data.encode import RowNames
from verl_dft.data.records import read_row_file
from verl_dft.data.row_checks import BUILDERS
from verl_dft.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = (*BUILDERS, "origin")
"""What rows can bring along beside their tokens."""


def present_columns(files: str | Path | Sequence[str | Path]) -> frozenset[str]:
    """Which of ``advantage``, ``ref_logp`` and ``behavior_logp`` these rows can provide to ``load_dataset``."""
    table, names = read_table([Path(f) for f in ([files] if isinstance(files, str | Path) else files)], None)
    found = set()
    for name in BUILDERS:
        try:
            check_columns(table, names, [name])
        except InputError:
            continue
        found.add(name)
    return frozenset(found)


def has_column(files: Sequence[str | Path], name: str, max_rows: int, origins: Sequence[str] | None) -> bool:
    """Whether the selected rows have a value in column ``name``: all of them, or none.

    Raises:
        InputError: some have one and others have none, as a job that did not finish leaves them.
    """
    table, names = read_table([Path(f) for f in files], max_rows if max_rows > 0 else None)
    table, names, _ = of_origins(table, names, origins)
    missing = table[name].is_null().to_numpy()
    if missing.any() and not missing.all():
        row = names(int(missing.argmax()))
        raise InputError(f"{row}: no value in column {name!r}, which other rows have; fill it or drop the column")
    return not missing.any()


def read_table(paths: Sequence[Path], max_rows: int | None) -> tuple[pa.Table, RowNames]:
    """The rows of the files, one after the other, and how to name one in a message."""
    import pyarrow as pa

    tables = [read_row_file(path) for path in paths]
    names = RowNames(tuple(map(str, paths)), tuple(table.num_rows for table in tables))
    table = pa.concat_tables(tables)
    return (table if max_rows is None else table.slice(0, max_rows)), names


def of_origins(table: pa.Table, names: RowNames, origins: Sequence[str] | None) -> tuple[pa.Table, RowNames, int]:
    """The rows of these origins, and how many others there were."""
    if not origins:
        return table, names, 0
    keep = [i for i, origin in enumerate(table["origin"].to_pylist()) if origin in origins]
    if not keep:
        raise InputError(f"{', '.join(names.files)}: no row has an origin of data.origins={list(origins)}")
    return table.take(keep), replace(names, picked=tuple(keep)), table.num_rows - len(keep)


def check_columns(table: pa.Table, names: RowNames, columns: Sequence[str]) -> None:
    """Raise :class:`InputError` for a column in which a value is missing that training needs."""
    for name in columns:
        missing = table[name].is_null().to_numpy()
        # a missing behaviour log-prob means "unknown" (an expert's text), but a file without any was not made for this
        if missing.all() if name == "behavior_logp" else missing.any():
            row = names(int(missing.argmax()))
            raise InputError(
                f"{row}: no value in column {name!r}, which the objective needs; make it with {BUILDERS[name]}"
            )
