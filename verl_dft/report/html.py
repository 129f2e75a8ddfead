"""Pages that stand alone: no script, style sheet or image outside the file. Everything given is escaped here."""

import base64
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from verl_dft.report.tables import Table

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
td,th{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}
th{border-bottom:2px solid #888;white-space:normal;vertical-align:bottom}
pre{background:#f6f6f6;padding:.6rem;overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0}
img{max-width:100%} dt{font-weight:600;margin-top:.5rem} dd{margin:0 0 0 1rem;overflow-wrap:anywhere}
.correct{border-left:4px solid #2a2} .wrong{border-left:4px solid #c33} .other{border-left:4px solid #999}
"""


def page(title: str, parts: Iterable[str], head: str = "") -> str:
    """A whole page; ``parts`` are pieces made by the functions below, ``head`` is markup for its head."""
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style>{head}</head><body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; ``kind`` is a class of the page's style."""
    return f'<p class="{escape(kind, quote=True)}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def preformatted(text: str, kind: str = "") -> str:
    """Text with its spaces and line breaks; ``kind`` correct, wrong or other colours its edge."""
    assert kind in ("", "correct", "wrong", "other")
    return f'<pre class="{kind}">{escape(text)}</pre>' if kind else f"<pre>{escape(text)}</pre>"


def table(data: Table) -> str:
    """A table; empty cells stay empty."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in data.header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in data.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def image(path: str | Path, text: str) -> str:
    """A PNG put into the page itself; ``text`` says what it shows."""
    encoded = base64.b64encode(Path(path).read_bytes()).decode()
    return f'<img alt="{escape(text, quote=True)}" src="data:image/png;base64,{encoded}">'


def facts(values: Mapping[str, Any]) -> str:
    """Names and values, one below the other."""
    items = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in values.items())
    return f"<dl>{items}</dl>"
