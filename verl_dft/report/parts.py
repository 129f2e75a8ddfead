"""A document as a list of parts, written as Markdown or as HTML: what a page says is said once for both."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from verl_dft.report import html
from verl_dft.report.tables import Table

STYLE = """
body{overflow-wrap:anywhere} th,td{overflow-wrap:normal} td.text,th.text{text-align:left}
td,th{font-variant-numeric:tabular-nums}
table{max-width:100%} td.wide{white-space:normal;min-width:16rem}
.reproduced,.same{color:#176b1f;font-weight:600} .off,.other-way{color:#a51d1d;font-weight:600}
.quiet{color:#666} .problem{background:#fdf3e1;border-left:4px solid #d08a1d;padding:.3rem .6rem;margin:.3rem 0}
figure{margin:1rem 0} figcaption{color:#555;font-size:.85rem} img{height:auto}
details{margin:.6rem 0} summary{cursor:pointer;padding:.35rem 0} nav ul{padding-left:1.2rem} nav a{color:#0b57a4}
@media (max-width:40rem){body{margin:1rem auto;padding:0 .7rem;font-size:16px}
h1{font-size:1.4rem} h2{font-size:1.2rem} table{font-size:.88rem} td,th{padding:.25rem .4rem}
td.text:first-child{white-space:normal;min-width:6rem}}
"""
_MARKS = {"reproduced": "reproduced", "off": "off", "same direction": "same", "other direction": "other-way",
          "not run": "quiet", "not comparable": "quiet", "no number stated": "quiet", "undecided": "quiet"}  # fmt: skip
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
HEAD = f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY, quote=True)}"><style>{STYLE}</style>'
"""For the head of a page of parts: no script, and nothing from outside."""


@dataclass(frozen=True)
class Heading:
    """``anchor``: what links within the page lead to."""

    text: str
    level: int = 2
    anchor: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph. ``kind``: ``problem``, ``quiet`` or nothing."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Items:
    """A list. ``links``: an item's text -> anchor."""

    items: Sequence[str]
    links: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """A table."""

    table: Table


@dataclass(frozen=True)
class Picture:
    """A PNG. ``name``: what it is called where it is written beside a Markdown page."""

    path: Path
    name: str
    caption: str


@dataclass(frozen=True)
class Verbatim:
    """Text as it is. ``kind``: of ``html.preformatted``."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Folded:
    """Parts that a page of HTML shows when asked; ``html_only``: Markdown leaves them out."""

    title: str
    parts: Sequence["Part"]
    html_only: bool = False


Part = Heading | Text | Items | Shown | Picture | Verbatim | Folded


def to_html(parts: Iterable[Part]) -> Iterable[str]:
    """Pieces of a page; all text is escaped."""
    for part in parts:
        if isinstance(part, Heading):
            anchor = f' id="{escape(part.anchor, quote=True)}"' if part.anchor else ""
            yield f"<h{part.level}{anchor}>{escape(part.text)}</h{part.level}>"
        elif isinstance(part, Text):
            yield html.paragraph(part.text, part.kind)
        elif isinstance(part, Items):
            yield f"<ul>{''.join(_html_item(item, part.links) for item in part.items)}</ul>"
        elif isinstance(part, Shown):
            yield html.table(part.table, _MARKS)
        elif isinstance(part, Picture):
            caption = f"<figcaption>{escape(part.caption)}</figcaption>"
            yield f"<figure>{html.image(part.path, part.caption)}{caption}</figure>"
        elif isinstance(part, Verbatim):
            yield html.preformatted(part.text, part.kind)
        else:
            inner = "\n".join(to_html(part.parts))
            yield f"<details><summary>{escape(part.title)}</summary>\n{inner}\n</details>"


def to_markdown(parts: Iterable[Part], figures: str, raised: int = 0) -> str:
    """A Markdown text; pictures are linked as ``<figures>/NAME``, headings are ``raised`` levels higher."""
    lines: list[str] = []
    for part in parts:
        if isinstance(part, Heading):
            lines += [f"{'#' * max(1, part.level - raised)} {plain_text(part.text)}", ""]
        elif isinstance(part, Text):
            lines += [f"**{plain_text(part.text)}**" if part.kind == "problem" else plain_text(part.text), ""]
        elif isinstance(part, Items):
            lines += [*(f"- {plain_text(item)}" for item in part.items), ""]
        elif isinstance(part, Shown):
            lines += [_aligned(_inert(part.table)), ""]
        elif isinstance(part, Picture):
            lines += [f"![{plain_text(part.caption)}]({figures}/{part.name})", ""]
        elif isinstance(part, Verbatim):
            fence = "`" * max(3, _longest(part.text) + 1)
            lines += [fence, part.text, fence, ""]
        elif not part.html_only:
            lines += [f"**{plain_text(part.title)}**", "", to_markdown(part.parts, figures, raised)]
    return "\n".join(lines)


def _html_item(item: str, links: Mapping[str, str]) -> str:
    text = escape(item)
    return f'<li><a href="#{escape(links[item], quote=True)}">{text}</a></li>' if item in links else f"<li>{text}</li>"


def plain_text(text: str) -> str:
    """Text that Markdown takes for text: on one line, without tags, links or images."""
    return re.sub(r"[\\<`*\[\]!]", r"\\\g<0>", " ".join(text.split()))


def _aligned(table: Table) -> str:
    """A Markdown table whose columns of words are aligned left."""
    lines = table.markdown().splitlines()
    numbers = [any(html.NUMBER.match(row[i]) for row in table.rows) for i in range(len(table.header))]
    lines[1] = f"| {' | '.join('---:' if number else '---' for number in numbers)} |"
    return "\n".join(lines)


def _inert(table: Table) -> Table:
    """A table whose cells hold no tags, links or images."""

    def cell(text: str) -> str:
        return text.replace("<", "&lt;").replace("[", "&#91;").replace("]", "&#93;")  # a backslash is escaped later

    return Table([cell(text) for text in table.header], [[cell(text) for text in row] for row in table.rows])


def _longest(text: str) -> int:
    """Length of the longest run of backquotes."""
    return max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
