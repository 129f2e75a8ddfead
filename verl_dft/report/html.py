"""Pages that stand alone: no script, style sheet or image outside the file. Everything given is escaped here."""

import base64
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from verl_dft.report.tables import Table

NUMBER = re.compile(r"[-+±]? ?\d[\d.,]*(?:$|[ %])")
"""How a cell with a number begins; a name that begins with a digit is none."""
_LONG = 60
"""Characters above which a cell of a table with marks may break its line."""
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
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title>'
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


def table(data: Table, marks: Mapping[str, str] | None = None) -> str:
    """A table; empty cells stay empty.

    ``marks``: a cell's text -> class of the page's style. With them long cells have the class ``wide``, and columns of
    words the class ``text``.
    """
    words = [marks is not None and not any(NUMBER.match(row[i]) for row in data.rows) for i in range(len(data.header))]
    kinds = [["text"] if is_text else [] for is_text in words]
    head = "".join(_cell("th", cell, kind) for cell, kind in zip(data.header, kinds, strict=True))
    rows = []
    for row in data.rows:
        classes = [_classes(cell, marks, is_text) for cell, is_text in zip(row, words, strict=True)]
        rows.append(f"<tr>{''.join(_cell('td', cell, kinds) for cell, kinds in zip(row, classes, strict=True))}</tr>")
    body = "\n".join(rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _classes(text: str, marks: Mapping[str, str] | None, is_text: bool) -> list[str]:
    if marks is None:
        return []
    found = [marks[text]] if text in marks else ["wide"] if len(text) > _LONG else []
    return [*found, "text"] if is_text else found


def _cell(tag: str, text: str, kinds: list[str]) -> str:
    kind = f' class="{escape(" ".join(kinds), quote=True)}"' if kinds else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"


def image(path: str | Path, text: str) -> str:
    """A PNG put into the page itself; ``text`` says what it shows."""
    encoded = base64.b64encode(Path(path).read_bytes()).decode()
    return f'<img alt="{escape(text, quote=True)}" src="data:image/png;base64,{encoded}">'


def facts(values: Mapping[str, Any]) -> str:
    """Names and values, one below the other."""
    items = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in values.items())
    return f"<dl>{items}</dl>"
