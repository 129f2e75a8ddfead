"""The two records that flow between the steps: a problem and a training row, with their files and their validation.

Units: ``advantage`` and ``reward`` are dimensionless, log-probabilities are in nats. Rows of a file are counted from 0.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_dft.data import tables
from verl_dft.errors import InputError
from verl_dft.origins import ORIGINS

if TYPE_CHECKING:
    import pyarrow as pa

_LARGEST = 3.4e38
"""What float32 holds: larger numbers would be stored as infinite."""
PER_TOKEN = ("ref_logp", "behavior_logp")
BUILDERS = {
    "advantage": "verl-dft groups",
    "ref_logp": "verl-dft score",
    "behavior_logp": "verl-dft sample (it stores the sampler's log-probs) followed by a builder",
}
"""Which command writes a column, for the message that says it is missing."""


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


def text_of(where: str, key: str, value: Any) -> str:
    """The text of a column, in which a number stands for its digits and null for nothing. Raises InputError."""
    if value is None:
        return ""
    number = type(value) is int or (isinstance(value, float) and math.isfinite(value))
    if not number and not isinstance(value, str):
        raise InputError(f"{where}: column {key!r} is {value!r}; it must be a text or a number")
    return str(value)


def write_problems(path: str | Path, problems: Sequence[Problem]) -> None:
    """Write problems as jsonl, leaving out fields without a value."""
    from verl_dft.files import atomic_write

    with atomic_write(path) as file:
        for problem in problems:
            record = {f.name: getattr(problem, f.name) for f in fields(problem)}
            file.write(tables.json_line({k: v for k, v in record.items() if v is not None}))


def write_rows(path: str | Path, rows: Iterable[Row], **facts: Any) -> Path:
    """Write rows as parquet with a manifest beside it (``facts`` go there; see ``verl_dft.files.write_manifest``).

    Raises:
        InputError: a row that training would refuse (see :func:`read_rows`).
    """
    from verl_dft.files import atomic_write, sha256_file, write_manifest

    path = Path(path)
    table = check_rows(str(path), [{f.name: getattr(row, f.name) for f in fields(Row)} for row in rows])
    # a column without any value is left out, so that a file's schema says what it can provide
    empty = [name for name in table.column_names if table.num_rows and table[name].null_count == table.num_rows]
    with atomic_write(path, "wb") as file:
        tables.write_parquet(table.drop_columns(empty), file)
    write_manifest(path, num_rows=table.num_rows, rows_sha256=sha256_file(path), **facts)
    return path


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
    records = tables.read_records(path, compact=("response_ids", *PER_TOKEN))
    tables.need_columns(path, records, ("messages",))
    return check_rows(str(path), records)


def check_rows(where: str, records: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table of :func:`row_schema`. ``where`` is the file's name, for messages. Raises InputError."""
    import pyarrow as pa

    stem = Path(where).name.split(".")[0]
    checked = [_check_row(f"{where}: row {i}", f"{stem}/{i}", record) for i, record in enumerate(records)]
    columns = {}
    for field in row_schema():
        try:
            columns[field.name] = pa.array([row.get(field.name) for row in checked], type=field.type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            detail = " ".join(str(error).split())[:160]
            row = _first_bad([row.get(field.name) for row in checked], field.type)
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


def _check_row(where: str, default_id: str, record: Mapping[str, Any]) -> dict[str, Any]:
    row = dict(record)
    given = row.get("problem_id")
    row["problem_id"] = default_id if given is None else text_of(where, "problem_id", given)
    row["origin"] = row.get("origin") or "expert"
    if row["origin"] not in ORIGINS:
        raise InputError(f"{where}: column 'origin' is {row['origin']!r}; use one of {', '.join(ORIGINS)}")
    ids = row.get("response_ids")
    row["messages"] = _check_messages(where, row.get("messages"), has_ids=ids is not None)
    if ids is not None:
        _check_ids(where, ids)
    for name in PER_TOKEN:
        if row.get(name) is not None:
            _check_per_token(where, name, row[name], ids)
    for name in ("advantage", "reward"):
        value = row.get(name)
        if value is not None and (not _is_number(value) or math.isnan(value)):
            raise InputError(f"{where}: column {name!r} is {value!r}; it must be a finite number")
    return row


def _is_number(value: Any) -> bool:
    """A number that float32 holds, or NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > _LARGEST


def _check_ids(where: str, ids: Any) -> None:
    import numpy as np

    try:
        found = np.asarray(ids)
    except (ValueError, OverflowError):
        found = np.asarray(None)
    if found.shape == (0,):
        raise InputError(f"{where}: column 'response_ids' is empty; a response needs at least one token, drop the row")
    if found.ndim != 1 or found.dtype.kind not in "iu":  # numbers with a fraction would lose it
        raise InputError(f"{where}: column 'response_ids' must be a list of token ids, whole numbers")


def _check_messages(where: str, messages: Any, has_ids: bool) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError(f"{where}: column 'messages' must be a non-empty list of {{role, content}}")
    clean = []
    for turn, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise InputError(f"{where}: messages[{turn}] must have a 'role' and a text 'content'")
        if message.get("role") not in ("system", "user", "assistant", "tool"):
            raise InputError(
                f"{where}: messages[{turn}] has role {message.get('role')!r}; use system, user, assistant, tool"
            )
        clean.append({"role": message["role"], "content": message["content"]})
    if has_ids:
        if clean[-1]["role"] == "assistant" and len(clean) == 1:
            raise InputError(f"{where}: column 'messages' has no turn before the response; add the user's turn")
        return clean
    if clean[-1]["role"] != "assistant":
        raise InputError(f"{where}: column 'messages' must end with an assistant turn (the text to train on)")
    if not clean[-1]["content"].strip():
        raise InputError(f"{where}: column 'messages' has an empty response; drop the row or give it a text")
    if len(clean) == 1:
        raise InputError(f"{where}: column 'messages' has no turn before the response; add the user's turn")
    return clean


def _check_per_token(where: str, name: str, values: Sequence[float], ids: Sequence[int] | None) -> None:
    if ids is None:
        raise InputError(
            f"{where}: column {name!r} needs 'response_ids' beside it (a text can be tokenised in several ways); "
            f"make the rows with {BUILDERS[name]}"
        )
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise InputError(f"{where}: column {name!r} must be a list of log-probs")
    if len(values) != len(ids):
        raise InputError(
            f"{where}: column {name!r} has {len(values)} values for {len(ids)} response_ids; give one for each"
        )
    import numpy as np

    if isinstance(values, array):  # of one type
        found = np.array(values, dtype=np.float64)  # a copy
        found[np.abs(found) > _LARGEST] = math.inf
    else:
        found = np.asarray([value if _is_number(value) else math.inf for value in values], dtype=np.float64)
    # rounding may lift a log-prob a little above 0; NaN stands for "unknown" in behavior_logp only
    wrong = ~(found <= 1e-3) & ~(np.isnan(found) & (name == "behavior_logp"))
    if wrong.any():
        at = int(wrong.argmax())
        raise InputError(f"{where}: column {name!r} holds {values[at]} at position {at}; a log-prob is at most 0")
