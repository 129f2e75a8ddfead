"""The sample: what a model answered to a problem, with its verdict. One row of ``samples.parquet``.

``verl-dft sample`` and ``verl-dft evaluate`` write the same file; the builders read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.grading.pool import VERDICTS

_PART = 4096
"""Samples of a row group."""
_NEEDED = ("problem_id", "index", "response", "finish_reason", "grade")


@dataclass(frozen=True)
class Sample:
    """A graded response.

    ``index`` counts the samples of one problem and prompt; ``token_ids`` (the end token included where there is one)
    and ``logp`` (nats, one per token, of the model at temperature 1) are None where the source does not tell;
    ``grade`` is the grader's verdict, ``qwen`` the lenient one, ``answer`` what was extracted, ``rule`` what decided.
    """

    problem_id: str
    index: int
    response: str
    finish_reason: str
    grade: str
    problem: str = ""
    gold: str = ""
    seed: int = 0
    model: str = ""
    prompt_name: str = ""
    token_ids: Sequence[int] | None = None
    num_tokens: int = 0
    logp: Sequence[float] | None = None
    qwen: str = ""
    answer: str | None = None
    rule: str = ""
    detail: str = ""

    @property
    def correct(self) -> bool:
        """Whether the strict verdict is ``correct``."""
        return self.grade == "correct"


def write_samples(path: str | Path, samples: Sequence[Sample]) -> None:
    """Samples as parquet, atomically; ``logp`` is left out where no sample has it."""
    import pyarrow as pa

    from verl_dft.data.tables import write_in_parts
    from verl_dft.files import atomic_write

    names = [field.name for field in fields(Sample)]
    if all(sample.logp is None for sample in samples):
        names.remove("logp")
    special = {"token_ids": pa.list_(pa.int64()), "logp": pa.list_(pa.float64())}
    special |= dict.fromkeys(("index", "seed", "num_tokens"), pa.int64())
    schema = pa.schema([(name, special.get(name, pa.string())) for name in names])

    def part(start: int) -> pa.Table:
        chosen = samples[start : start + _PART]
        return pa.table([[_storable(getattr(one, name)) for one in chosen] for name in names], schema=schema)

    with atomic_write(path, "wb") as file:
        write_in_parts(map(part, range(0, len(samples), _PART)), schema, file)


def read_samples(paths: str | Path | Sequence[str | Path]) -> list[Sample]:
    """Samples of one or several files (or of folders that hold ``samples.parquet``), one after the other.

    Raises:
        InputError: missing file or column, unknown verdict, or the same problem, prompt and index twice.
    """
    from verl_dft.data import tables

    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    known = {field.name for field in fields(Sample)}
    samples: list[Sample] = []
    seen: dict[tuple[Any, ...], str] = {}
    for path in map(_file, paths):
        records = tables.read_records(path, compact=("token_ids", "logp"))
        tables.need_columns(path, records, _NEEDED)
        for row, record in enumerate(records):
            where = f"{path}: row {row}"
            if record["grade"] not in VERDICTS:
                raise InputError(f"{where}: grade is {record['grade']!r}; use one of {', '.join(VERDICTS)}")
            sample = _checked(where, {key: value for key, value in record.items() if key in known})
            key = (sample.problem_id, sample.model, sample.prompt_name, sample.index)
            if key in seen:
                raise InputError(f"{where}: sample {sample.index} of problem {sample.problem_id} is also {seen[key]}")
            seen[key] = where
            samples.append(sample)
    return samples


def _storable(value: Any) -> Any:
    """A text without lone surrogates, which have no form in a file; they become U+FFFD."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value


def _checked(where: str, record: dict[str, Any]) -> Sample:
    """A sample of the right types; a null stands for what a column's default is. Raises InputError."""
    for name in _NEEDED:
        wanted = int if name == "index" else str
        if not isinstance(record[name], wanted) or isinstance(record[name], bool):
            kind = "a whole number" if wanted is int else "text"
            raise InputError(f"{where}: column {name!r} is {record[name]!r}; it must be {kind}")
    return Sample(**{name: value for name, value in record.items() if value is not None})


def _file(path: str | Path) -> Path:
    path = Path(path).expanduser()
    return path / "samples.parquet" if path.is_dir() else path
