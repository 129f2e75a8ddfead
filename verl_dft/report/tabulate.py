"""Tables of a run's report: ours, the paper's, both with their status, differences, statements."""

from collections.abc import Mapping, Sequence

from verl_dft.report.beside import STATUSES, Cell
from verl_dft.report.differences import Pair
from verl_dft.report.expected import Block
from verl_dft.report.measured import Measured
from verl_dft.report.numbers import Columns, Number, columns_of, number_of
from verl_dft.report.tables import Table

NONE = "–"


def compared(cells: Sequence[Cell], unit: str) -> Table:
    """A line for each cell that this run has a number of."""
    header = ["model", "method", "column", f"paper ({unit})", "ours (95% interval)", "difference", "allowed", "status"]
    rows = [[cell.model, cell.method, cell.column, _paper(cell.paper), cell.ours.text() if cell.ours else NONE,
             _signed(cell.difference), f"± {_plain(cell.allowed)}" if cell.allowed is not None else "", cell.status,
             cell.why] for cell in cells]  # fmt: skip
    return _without_empty(Table([*header, "why"], rows))


def papers_values(block: Block, cells: Sequence[Cell]) -> Table:
    """The paper's rows as they stand there, with the status of each row's cells."""
    by_row: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        by_row.setdefault((cell.model, cell.method), []).append(cell)
    rows = []
    for (model, method), row in by_row.items():
        found = [status for status in STATUSES if any(cell.status == status for cell in row)]
        rows.append([model, method, *(_paper(cell.paper) for cell in row), ", ".join(found)])
    return Table(["model", "method", *block.columns, "status"], rows)


def ours(measured: Measured, kind: str, block: Block | None) -> Table:
    """All numbers of one kind, a row for each model and method; where there is a block, the paper's beside them.

    An average is over all benchmarks of the run: a row of fewer has none.
    The paper's are rows of their own where it has the same columns, else columns: its averages by model, or of one
    model all.
    """
    arms = measured[kind]
    measured_columns = columns_of(arms)
    columns = [*measured_columns, "avg"] if kind == "evaluation" and len(measured_columns) > 1 else measured_columns
    shared = block is not None and bool(set(block.columns) & set(columns))
    stated = [] if shared or block is None else _beside(block)
    beside = [(name, column) for name, column in stated if any(
        _value(block, name, method, column) is not None for method in block.values[name])]  # fmt: skip
    header = ["model", "method", *(column if about(measured, kind) else _title(arms, column) for column in columns)]
    header += [f"paper: {model} {column}" for model, column in beside]
    rows = []
    for (model, method), seeds in sorted(arms.items(), key=lambda item: _order(block, item[0][1])):
        numbers = [number_of(seeds, column, measured_columns) for column in columns]
        values = [_paper(_value(block, paper, method, column)) if block else "" for paper, column in beside]
        steps = ", ".join(dict.fromkeys(step for number in numbers if number for step in number.steps))
        rows.append([model or NONE, method, *(_text(number) for number in numbers), *values, steps])
    for model, methods in (block.values if shared and block else {}).items():
        for method in methods:
            values = [_value(block, model, method, column) for column in columns]
            if any(value is not None for value in values):
                rows.append([f"paper: {model}", method, *map(_paper, values), ""])
    if all(row[0] == NONE for row in rows):  # a recipe of one model
        header, rows = header[1:], [row[1:] for row in rows]
    return Table([*header, "from step"], rows)


def differences(found: Sequence[Pair], at_paper: bool) -> Table:
    """Method minus method, as stated and as measured."""
    names = [[pair.model] if at_paper else [] for pair in found]
    header = [*(["model"] if at_paper else []), "method", "minus", "column", "paper", "ours (95% interval)"]
    header += ["allowed", "status", "note"] if at_paper else ["direction", "note"]
    rows = []
    for name, pair in zip(names, found, strict=True):
        note = "; ".join(part for part in ("from its cells" if pair.derived else "", pair.why) if part)
        row = [*name, pair.method, pair.against, pair.column, _list(pair.stated), _difference(pair.ours)]
        row += [f"± {_plain(pair.allowed)}" if pair.allowed is not None else ""] if at_paper else []
        rows.append([*row, pair.status, note])
    return _without_empty(Table(header, rows))


def statements(block: Block) -> Table:
    """Other numbers of the text, which no rule here compares."""
    rows = []
    for one in block.statements:
        values = one.value if isinstance(one.value, list) else [one.value]
        value = ", ".join(repr(value) if isinstance(value, str) else f"{value}" for value in values)
        rows.append([one.what, f"{value} {one.unit}" if one.unit else value, "not comparable"])
    return Table(["the text also states", "paper", "status"], rows)


def count(cells: Sequence[Cell]) -> dict[str, int]:
    """Cells by status."""
    return {status: sum(cell.status == status for cell in cells) for status in STATUSES}


# ---- cells ----


def _beside(block: Block) -> list[tuple[str, str]]:
    if "avg" in block.columns:
        return [(model, "avg") for model in block.values]
    return [(model, column) for model in block.values for column in block.columns] if len(block.values) == 1 else []


def _value(block: Block | None, model: str, method: str, column: str) -> float | None:
    if block is None or method not in block.values[model] or column not in block.columns:
        return None
    return block.value(model, method, column)


def _order(block: Block | None, method: str) -> int:
    methods = list(dict.fromkeys(name for rows in block.values.values() for name in rows)) if block else []
    return methods.index(method) if method in methods else len(methods)


def about(measured: Measured, kind: str) -> str:
    """What all numbers of a kind are: ``avg@16, %``; empty where they differ."""
    numbers = [number for seeds in measured[kind].values() for found in seeds.values() for number in found.values()]
    said = {(number.metric, number.unit) for number in numbers}
    return ", ".join(part for part in said.pop() if part) if len(said) == 1 else ""


def _title(arms: Mapping[tuple[str, str], Mapping[str, Columns]], column: str) -> str:
    """``loss: train/loss at the last step (nats)``, as the numbers of the column say."""
    numbers = [found[column] for seeds in arms.values() for found in seeds.values() if column in found]
    metrics = " or ".join(dict.fromkeys(number.metric for number in numbers))
    units = " or ".join(dict.fromkeys(number.unit for number in numbers if number.unit))
    return f"{column}: {metrics}{f' ({units})' if units else ''}" if metrics else column


def _text(number: Number | None) -> str:
    if number is None:
        return NONE
    return number.text() + (f", {number.over}" if "seeds" in number.over else "")


def _difference(number: Number | None) -> str:
    if number is None:
        return NONE
    ends = f" ({number.low:+.1f} to {number.high:+.1f})" if number.low is not None and number.high is not None else ""
    return f"{number.value:+.1f}{ends}" + (f", {number.over}" if "seeds" in number.over else "")


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.2f}" for value in values)


def _paper(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+,.2f}"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _without_empty(table: Table) -> Table:
    """Without columns that say nothing."""
    keep = [index for index in range(len(table.header)) if not table.rows or any(row[index] for row in table.rows)]
    return Table([table.header[i] for i in keep], [[row[i] for i in keep] for row in table.rows])
