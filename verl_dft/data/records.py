"""The two records that flow between the steps: a problem and a training row, with their files and their validation.

Units: ``advantage`` and ``reward`` are dimensionless, log-probabilities are in nats. Rows of a file are counted from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_dft.data import tables
from verl_dft.data.row_checks import PER_TOKEN, check_row, text_of
from verl_dft.data.spool import Spool
from verl_dft.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass
class Problem:
    """A question with its reference answer. ``answer`` is ``""`` where the source has none (a proof)."""

    id: str
    problem: str
    answer: str
    solution: str | None = None
    teacher_solutions: list[str] | None = None
    source: str = ""
    level: int | None = None


@dataclass
class Row:
    """One training conversation; the last assistant turn is what is trained on.

    With ``response_ids`` the last assistant message may be absent: the ids are the response. The two per-token columns
    then hold one value per id (value 0 belongs to the first response token).
    """

    messages: list[dict[str, str]]
    problem_id: str
    origin: str
    response_ids: list[int] | None = None
    group_id: str | None = None
    reward: float | None = None
    advantage: float | None = None
    ref_logp: list[float] | None = None
    behavior_logp: list[float] | None = None
    finish_reason: str | None = None
    """Why generation ended: ``stop`` (by itself; also meant by None) or e.g. ``length`` (cut off: no end token)."""


def row_schema() -> pa.Schema:
    """Parquet schema of training rows."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema(
        [
            ("messages", pa.list_(message)),
            ("problem_id", pa.string()),
            ("origin", pa.string()),
            ("response_ids", pa.list_(pa.int32())),
            ("group_id", pa.string()),
            ("reward", pa.float32()),
            ("advantage", pa.float32()),
            ("ref_logp", pa.list_(pa.float32())),
            ("behavior_logp", pa.list_(pa.float32())),
            ("finish_reason", pa.string()),
        ]
    )


def read_problems(path: str | Path) -> list[Problem]:
    """Problems of a jsonl, jsonl.gz or parquet file.

    Raises:
        InputError: missing file, missing column or an empty problem, naming file, row and column.
    """
    records = tables.read_records(path)
    tables.need_columns(path, records, ("id", "problem", "answer"))
    known = {f.name for f in fields(Problem)}
    problems, seen = [], {}
    for index, record in enumerate(records):
        where = f"{path}: row {index}"
        values = {key: value for key, value in record.items() if key in known and value is not None}
        for key in ("id", "problem", "answer", "solution", "source"):
            values[key] = text_of(where, key, values.get(key))
        for key in ("id", "problem"):
            if not values[key].strip():
                raise InputError(f"{where}: column {key!r} is empty; give every problem a text and an id")
        values["solution"] = values["solution"] if record.get("solution") is not None else None
        if values["id"] in seen:
            raise InputError(
                f"{where}: id {values['id']!r} was already used in row {seen[values['id']]}; make ids unique"
            )
        seen[values["id"]] = index
        if "level" in values and type(values["level"]) is not int:
            raise InputError(f"{where}: column 'level' is {values['level']!r}; it must be a whole number")
        teachers = values.get("teacher_solutions")
        if teachers is not None and not (isinstance(teachers, list) and all(isinstance(t, str) for t in teachers)):
            raise InputError(f"{where}: column 'teacher_solutions' must be a list of texts")
        problems.append(Problem(**values))
    return problems


def write_problems(path: str | Path, problems: Sequence[Problem]) -> None:
    """Write problems as jsonl, leaving out fields without a value."""
    from verl_dft.files import atomic_write

    with atomic_write(path) as file:
        for problem in problems:
            record = {f.name: getattr(problem, f.name) for f in fields(problem)}
            file.write(tables.json_line({k: v for k, v in record.items() if v is not None}))


def write_rows(path: str | Path, rows: Iterable[Row], **facts: Any) -> Path:
    """Write rows as parquet with a manifest beside it (``facts`` go there; see ``verl_dft.files.write_manifest``).

    The rows are taken one by one and are never all in memory. A column without any value is left out, so that a file's
    schema says what it can provide.

    Raises:
        InputError: a row that training would refuse (see :func:`read_rows`).
    """
    with row_spool(path) as spool:
        spool.add(rows)
        return spool.write(**facts)


def row_spool(path: str | Path) -> Spool[Row]:
    """What :func:`write_rows` writes through, for rows that come bit by bit. ``add`` raises its InputError."""
    names = [f.name for f in fields(Row)]

    def to_table(rows: list[Row], first: int) -> pa.Table:
        return check_rows(str(path), [{name: getattr(row, name) for name in names} for row in rows], first)

    return Spool(path, row_schema(), to_table, drop_empty=True)


def read_rows(paths: str | Path | Sequence[str | Path]) -> pa.Table:
    """Training rows of jsonl, jsonl.gz or parquet files, one after the other, validated.

    Only ``messages`` is demanded: ``problem_id`` defaults to file name and row, ``origin`` to ``expert``. Columns that
    are not part of a row are ignored.

    Raises:
        InputError: missing file or column; a conversation without a final assistant turn; an empty response;
            a per-token column whose length differs from ``response_ids``. The message names file, row and column.
    """
    import pyarrow as pa

    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise InputError("no row files were given; set data.train_files or data.source")
    return pa.concat_tables([read_row_file(path) for path in paths])


def read_row_file(path: str | Path) -> pa.Table:
    """:func:`read_rows` of one file."""
    import pyarrow as pa

    checked: list[pa.Table] = []
    first = 0
    for records in tables.read_parts(path, compact=("response_ids", *PER_TOKEN)):
        tables.need_columns(path, records, ("messages",), first=first)
        checked.append(check_rows(str(path), records, first))
        first += len(records)
    return pa.concat_tables(checked)


def check_rows(where: str, records: Sequence[Mapping[str, Any]], first: int = 0) -> pa.Table:
    """Rows as a table of :func:`row_schema`.

    Args:
        where: the file's name, for messages.
        first: row of the file that the first of ``records`` is.

    Raises:
        InputError: see :func:`read_rows`.
    """
    import pyarrow as pa

    stem = Path(where).name.split(".")[0]
    checked = [check_row(f"{where}: row {i}", f"{stem}/{i}", record) for i, record in enumerate(records, first)]
    columns = {}
    for field in row_schema():
        try:
            columns[field.name] = pa.array([row.get(field.name) for row in checked], type=field.type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            detail = " ".join(str(error).split())[:160]
            row = first + _first_bad([row.get(field.name) for row in checked], field.type)
            raise InputError(f"{where}: row {row}: column {field.name!r} must be {field.type}: {detail}") from None
    return pa.table(columns, schema=row_schema())


def _first_bad(values: Sequence[Any], kind: pa.DataType) -> int:
    """Index of the first value that is not of this type."""
    import pyarrow as pa

    for index, value in enumerate(values):
        try:
            pa.array([value], type=kind)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            return index
    raise AssertionError("every value is of the type")
