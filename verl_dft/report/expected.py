"""What a paper states for its tables and figures: ``recipes/PAPER/expected.yaml``.

The file of a paper::

    paper: dft                                  # the folder's name
    title: …
    arxiv: "2508.05629"
    blocks:
      table1:                                   # a table or figure; a table with two metrics is two blocks
        source: Table 1; Sec. 4.1.2             # where the values stand
        metric: avg@16                          # what they are
        unit: "%"
        settings: temperature 1.0               # optional
        columns: [math500, avg]                 # benchmarks, or what else the columns are
        values: {MODEL: {METHOD: [43.76, 18.01]}}   # null: no number is stated, for a row or a cell
        empty: the curves are a picture         # why there are nulls; there if and only if there are
        differences:                            # stated in the text: METHOD minus AGAINST
          - {model: …, method: dft, against: base, column: avg, value: 15.66}   # contradicts: where cells say otherwise
        statements:                             # other numbers of the text
          - {what: …, value: 120, unit: steps}
    contradictions: [...]                       # of the paper with itself, one text each
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from verl_dft.errors import InputError

FILE = "expected.yaml"
_BLOCK = {"source", "metric", "unit", "columns", "values"}
_OPTIONAL = {"settings", "empty", "differences", "statements"}
_DIFFERENCE = {"model", "method", "against", "column", "value"}


@dataclass(frozen=True)
class Difference:
    """A difference that the text states: ``method`` minus ``against``, in the block's unit."""

    model: str
    method: str
    against: str
    column: str
    value: float
    contradicts: str | None = None
    """What the table says instead, where it disagrees."""


@dataclass(frozen=True)
class Statement:
    """A number, a list of numbers or of words that the text states about a table or figure."""

    what: str
    value: Any
    unit: str | None = None


@dataclass(frozen=True)
class Cell:
    """One value: ``value`` is None where the paper's text has none."""

    block: str
    model: str
    method: str
    column: str
    value: float | None


@dataclass(frozen=True)
class Block:
    """A table or figure. ``values[model][method]`` has a value (or None) per column, in the order of ``columns``."""

    name: str
    source: str
    metric: str
    unit: str
    columns: tuple[str, ...]
    values: Mapping[str, Mapping[str, tuple[float | None, ...]]]
    settings: str | None = None
    empty: str | None = None
    differences: tuple[Difference, ...] = ()
    statements: tuple[Statement, ...] = ()

    def value(self, model: str, method: str, column: str) -> float | None:
        """The stated value, None where the text has none.

        Raises:
            InputError: no such model, method or column in this block.
        """
        rows = _pick(self.values, model, "model", self.name)
        row = _pick(rows, method, "method", f"{self.name} of {model}")
        return _pick(dict(zip(self.columns, row, strict=True)), column, "column", self.name)

    def cells(self) -> Iterator[Cell]:
        """All cells, row by row."""
        for model, rows in self.values.items():
            for method, row in rows.items():
                for column, value in zip(self.columns, row, strict=True):
                    yield Cell(self.name, model, method, column, value)


@dataclass(frozen=True)
class Expected:
    """All that a paper's file states."""

    paper: str
    title: str
    arxiv: str
    blocks: Mapping[str, Block]
    contradictions: tuple[str, ...] = field(default=())

    def block(self, name: str) -> Block:
        """The block called ``name``. Raises InputError naming those that there are."""
        return _pick(self.blocks, name, "table or figure", self.paper)


def load_expected(path: Path) -> Expected:
    """Read and check a paper's file.

    Args:
        path: the file, or the folder with ``expected.yaml`` in it.

    Raises:
        InputError: missing file, broken YAML, a key that is missing, unknown or of the wrong kind, a row that does not
            fit its columns, nulls without ``empty`` (or the reverse), a difference of cells that are not there, or one
            that disagrees with its cells without saying so.
    """
    path = path / FILE if path.is_dir() else path
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    _keys(raw, {"paper", "title", "arxiv", "blocks"}, {"contradictions"}, f"{path}")
    if not isinstance(raw["blocks"], dict) or not raw["blocks"]:
        raise InputError(f"{path}: blocks must be a mapping of tables and figures")
    blocks = {str(name): _block(str(name), block, f"{path}, {name}") for name, block in raw["blocks"].items()}
    texts = raw.get("contradictions") or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{path}: contradictions must be a list of texts; quote those with a colon in them")
    return Expected(str(raw["paper"]), str(raw["title"]), str(raw["arxiv"]), blocks, tuple(t.strip() for t in texts))


def method_of(step: str, arms: Mapping[str, str]) -> str:
    """The METHOD that a recipe's step stands for in ``values``.

    Args:
        step: the step's name in the recipe.
        arms: its loop variables and the names of their arms.

    Returns:
        the arms but ``model``'s, joined by ``-``; of a step without them its name, less ``evaluate_`` or ``score_``.
    """
    names = [name for variable, name in arms.items() if variable != "model"]
    return "-".join(names) or step.removeprefix("evaluate_").removeprefix("score_")


def _block(name: str, raw: Any, where: str) -> Block:
    _keys(raw, _BLOCK, _OPTIONAL, where)
    columns = raw["columns"]
    if not isinstance(columns, list) or not columns or len(set(map(str, columns))) < len(columns):
        raise InputError(f"{where}: columns must be a list of different names")
    if not isinstance(raw["values"], dict) or not all(isinstance(rows, dict) for rows in raw["values"].values()):
        raise InputError(f"{where}: values must be MODEL: METHOD: list")
    values = {
        str(model): {
            str(method): _row(row, len(columns), f"{where}, {model}, {method}") for method, row in rows.items()
        }
        for model, rows in raw["values"].items()
    }
    has_nulls = any(value is None for rows in values.values() for row in rows.values() for value in row)
    if has_nulls != bool(raw.get("empty")):
        raise InputError(f"{where}: `empty` must say why values are null, and be left out where none is")
    block = Block(
        name, str(raw["source"]), str(raw["metric"]), str(raw["unit"]), tuple(map(str, columns)), values,
        raw.get("settings"), raw.get("empty"),
        tuple(_difference(item, f"{where}, differences") for item in raw.get("differences") or ()),
        tuple(_statement(item, f"{where}, statements") for item in raw.get("statements") or ()),
    )  # fmt: skip
    for difference in block.differences:
        _check_difference(block, difference, where)
    return block


def _row(raw: Any, length: int, where: str) -> tuple[float | None, ...]:
    if raw is None:
        return (None,) * length
    if not isinstance(raw, list) or len(raw) != length:
        raise InputError(f"{where}: must be null or a list of {length} values, one per column")
    return tuple(None if value is None else _number(value, where) for value in raw)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {value!r} is not a number")
    return float(value)


def _difference(raw: Any, where: str) -> Difference:
    _keys(raw, _DIFFERENCE, {"contradicts"}, where)
    return Difference(**{**raw, "value": _number(raw["value"], where)})


def _statement(raw: Any, where: str) -> Statement:
    _keys(raw, {"what", "value"}, {"unit"}, where)
    return Statement(**raw)


def _check_difference(block: Block, stated: Difference, where: str) -> None:
    """A stated difference is that of its cells, to the rounding of two decimals, or says that it is not."""
    cells = [block.value(stated.model, method, stated.column) for method in (stated.method, stated.against)]
    what = f"{where}: {stated.method} minus {stated.against} of {stated.model} on {stated.column}"
    if cells[0] is None or cells[1] is None:
        raise InputError(f"{what} is of a cell without a value; put it under statements")
    agrees = abs(cells[0] - cells[1] - stated.value) < 0.0051
    if agrees == bool(stated.contradicts):
        raise InputError(f"{what} is {cells[0] - cells[1]:.2f} by its cells and {stated.value} as stated; "
                         "`contradicts` must say so where they differ, and only there")  # fmt: skip


def _keys(raw: Any, needed: set[str], optional: set[str], where: str) -> None:
    if not isinstance(raw, dict):
        raise InputError(f"{where}: must be a mapping with {', '.join(sorted(needed))}")
    missing, unknown = sorted(needed - set(raw)), sorted(set(map(str, raw)) - needed - optional)
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"has unknown keys: {', '.join(unknown)}"
        raise InputError(f"{where}: {problem}; keys are {', '.join(sorted(needed | optional))}")


def _pick(mapping: Mapping[str, Any], key: str, what: str, where: str) -> Any:
    if key not in mapping:
        raise InputError(f"no {what} {key!r} in {where}; there is {', '.join(mapping)}")
    return mapping[key]
