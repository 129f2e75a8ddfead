"""Statistics as Markdown."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column names the row, the others are numbers."""
    assert all(len(row) == len(header) for row in rows)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def share(count: int, total: int) -> str:
    """A count as a percentage of ``total``."""
    return f"{100 * count / total:.1f}%" if total else ""


def names(prompts: Sequence[str]) -> str:
    """Names of prompts in a sentence."""
    return ", ".join(f"`{name}`" if name else "an unnamed prompt" for name in prompts)
