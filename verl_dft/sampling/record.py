"""The sample: what a model answered to a problem, with its verdict. One row of ``samples.parquet``.

``verl-dft sample`` and ``verl-dft evaluate`` write the same file; the builders read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_dft.data.lazy import LazySequence
from verl_dft.errors import InputError
from verl_dft.grading.pool import VERDICTS

if TYPE_CHECKING:
    import pyarrow as pa

    from verl_dft.data.row_groups import RowGroups

_COMPACT = ("token_ids", "logp")
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


_FIELDS = frozenset(field.name for field in fields(Sample))


def write_samples(path: str | Path, samples: Sequence[Sample], with_logp: bool = True) -> None:
    """Samples as parquet, atomically, in row groups of 4,096.

    Args:
        samples: gone through once, in order, no more than a row group's at a time.
        with_logp: whether the file has the column ``logp``; without it no sample may have log-probs.
    """
    import pyarrow as pa

    from verl_dft.data.tables import in_parts, write_in_parts
    from verl_dft.files import atomic_write

    names = [field.name for field in fields(Sample) if with_logp or field.name != "logp"]
    special = {"token_ids": pa.list_(pa.int64()), "logp": pa.list_(pa.float64())}
    special |= dict.fromkeys(("index", "seed", "num_tokens"), pa.int64())
    schema = pa.schema([(name, special.get(name, pa.string())) for name in names])

    def table(part: Sequence[Sample]) -> pa.Table:
        assert with_logp or all(sample.logp is None for sample in part), "log-probs would be lost"
        return pa.table([[_storable(getattr(one, name)) for one in part] for name in names], schema=schema)

    with atomic_write(path, "wb") as file:
        write_in_parts(map(table, in_parts(samples)), schema, file)


class StoredSamples(LazySequence[Sample]):
    """Samples in their files, one file after the other: each is read when it is used, and made anew each time.

    Attributes:
        problem_ids: of each sample.
    """

    def __init__(self) -> None:
        self.problem_ids: list[str] = []
        self._files: list[tuple[int, Path, RowGroups | list[Sample]]] = []
        """With the number of the file's first sample."""

    def add(self, path: Path, samples: RowGroups | list[Sample], problem_ids: Sequence[str]) -> None:
        """The samples of one more file."""
        self._files.append((len(self), path, samples))
        self.problem_ids += problem_ids

    def __len__(self) -> int:
        return len(self.problem_ids)

    def item(self, index: int) -> Sample:
        first, _, samples = next(file for file in reversed(self._files) if file[0] <= index)
        found = samples[index - first]
        return found if isinstance(found, Sample) else _sample(found)

    def place(self, index: int) -> str:
        """File and row of a sample, for messages."""
        first, path, _ = next(file for file in reversed(self._files) if file[0] <= index)
        return f"{path}: row {index - first}"


def read_samples(paths: str | Path | Sequence[str | Path]) -> StoredSamples:
    """Samples of one or several files (or of folders that hold ``samples.parquet``), one after the other.

    All are checked here; only an index stays in memory, and texts, ids and log-probs are read when a sample is used. A
    file that is no parquet, or that has row groups of more than 16,384, is kept in memory instead.

    Raises:
        InputError: missing file or column, unknown verdict, or the same problem, prompt and index twice. Later, where
            a sample is used: its file was changed meanwhile.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    found, seen = StoredSamples(), _Seen({}, {})
    for path in map(_file, paths):
        _add_file(found, path, seen)
    return found


@dataclass
class _Seen:
    """What samples were read, to find one that is there twice, and the texts that many of them share."""

    numbers: dict[tuple[Any, ...], int]
    texts: dict[str, str]


def _add_file(found: StoredSamples, path: Path, seen: _Seen) -> None:
    """Check a file's samples and add them."""
    from verl_dft.data import tables

    groups, held, problem_ids = _row_groups(path), [], []
    for records in tables.read_parts(path, compact=_COMPACT):
        tables.need_columns(path, records, _NEEDED, first=len(problem_ids))
        for record in records:
            where = f"{path}: row {len(problem_ids)}"
            if record["grade"] not in VERDICTS:
                raise InputError(f"{where}: grade is {record['grade']!r}; use one of {', '.join(VERDICTS)}")
            _check(where, record)
            sample = _sample(record)
            problem_id, model, prompt = (
                seen.texts.setdefault(text, text) for text in (sample.problem_id, sample.model, sample.prompt_name)
            )
            key, number = (problem_id, model, prompt, sample.index), len(found) + len(problem_ids)
            if (earlier := seen.numbers.setdefault(key, number)) != number:
                there = found.place(earlier) if earlier < len(found) else f"{path}: row {earlier - len(found)}"
                raise InputError(f"{where}: sample {sample.index} of problem {sample.problem_id} is also {there}")
            problem_ids.append(problem_id)
            if groups is None:
                held.append(sample)
    found.add(path, held if groups is None else groups, problem_ids)


def _row_groups(path: Path) -> RowGroups | None:
    """A parquet file's row groups where they can be read one at a time."""
    from verl_dft.data.row_groups import RowGroups

    if path.suffix.lower() != ".parquet" or not path.is_file():
        return None
    groups = RowGroups(path, _COMPACT)
    return groups if groups.small else None


def _storable(value: Any) -> Any:
    """A text without lone surrogates, which have no form in a file; they become U+FFFD."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value


def _check(where: str, record: dict[str, Any]) -> None:
    """Raise InputError for a needed column of another type."""
    for name in _NEEDED:
        wanted = int if name == "index" else str
        if not isinstance(record[name], wanted) or isinstance(record[name], bool):
            kind = "a whole number" if wanted is int else "text"
            raise InputError(f"{where}: column {name!r} is {record[name]!r}; it must be {kind}")


def _sample(record: dict[str, Any]) -> Sample:
    """A sample of a checked record; a null stands for what a column's default is."""
    return Sample(**{name: value for name, value in record.items() if name in _FIELDS and value is not None})


def _file(path: str | Path) -> Path:
    path = Path(path).expanduser()
    return path / "samples.parquet" if path.is_dir() else path
