"""Tables of results: one structure, written as Markdown or as aligned text (as HTML in ``html.py``)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl_dft.evaluation.metrics import paired_difference


@dataclass(frozen=True)
class Table:
    """Cells as text. The first column names the row and is aligned left, numbers stand right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows)

    def markdown(self) -> str:
        """A Markdown table; a bar in a cell is escaped."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "\n".join(f"| {' | '.join(_markdown_cell(cell) for cell in line)} |" for line in lines)

    def text(self) -> str:
        """Columns aligned with spaces, for a terminal."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        out = [_aligned(line, widths) for line in lines]
        return "\n".join([out[0], "-" * len(out[0]), *out[1:]])


def comparison_table(results: Mapping[str, Mapping[str, Any]], against: Sequence[str] = ()) -> Table:
    """avg@n with its interval, differences to the rows named in ``against``, pass@n, levels, what went wrong.

    Args:
        results: row name -> an evaluation's ``result.json``, all of the same problems and n.
        against: names of rows to subtract, problem by problem, from the rows below them.

    Raises:
        InputError: a difference is asked for between results of different problems.
    """
    n = next(iter(results.values()))["n"]
    header = ["model", f"avg@{n} %", "95% CI", *(f"minus {name} (95% CI)" for name in against), f"pass@{n} %"]
    levels = sorted({level for result in results.values() for level in result["avg_by_level"]})
    header += [f"avg@{n} % by level {levels[0]}-{levels[-1]}"] if levels else []
    header += ["no answer %", "truncated %"]
    rows, order = [], list(results)
    for index, (name, result) in enumerate(results.items()):
        row = [name, _percent(result["avg"]), _interval(result["avg_ci95"])]
        row += [difference(results[other], result) if order.index(other) < index else "" for other in against]
        row += [_percent(result["pass_at_k"][str(n)])]
        row += [" / ".join(_percent(result["avg_by_level"][level], 0) for level in levels)] if levels else []
        rows.append([*row, _percent(result["no_answer_frac"]), _percent(result["truncated_frac"])])
    return Table(header, rows)


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """``second`` minus ``first`` in percentage points with the paired interval: ``+3.1 (+1.0 to +5.2)``."""
    shares = [{problem["id"]: problem["avg"] for problem in result["per_problem"]} for result in (first, second)]
    mean, interval = paired_difference(*shares)
    return f"{100 * mean:+.1f}" + (f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})" if interval else "")


def _interval(interval: Sequence[float] | None) -> str:
    return f"{_percent(interval[0])} to {_percent(interval[1])}" if interval else "one problem"


def _percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f}"


def _markdown_cell(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
    return "  ".join(cells).rstrip()
