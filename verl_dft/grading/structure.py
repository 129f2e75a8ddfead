r"""What an answer is made of: a tuple, an interval, a set, a list, a matrix, an equation, or a single value.

``read`` turns a tidied text into a :class:`Node`. It looks only at brackets, separators and relation signs, so it is
linear in the text, evaluates nothing, and reads anything: what it does not know is a single value.
"""

import re
from dataclasses import dataclass

from verl_dft.grading.normalize import squeeze, unwrap

_MAX_DEPTH = 12
_MAX_PARTS = 400

_TOKEN = re.compile(r"\\[{}]|\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPEN_TOKENS = frozenset(["(", "[", "{", r"\{", r"\langle", r"\begin", r"\lfloor", r"\lceil"])
_CLOSE_TOKENS = frozenset([")", "]", "}", r"\}", r"\rangle", r"\end", r"\rfloor", r"\rceil"])
_WORD_SEPARATOR = re.compile(
    r"\\text ?\{ ?,? ?(?:or|and) ?\}|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])|;|或|和|与", re.IGNORECASE
)
_RELATIONS = {"=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\in": "in", r"\approx": "~"}
_MATRIX = re.compile(r"\\begin\{(pmatrix|bmatrix|Bmatrix|vmatrix|matrix|smallmatrix|array)\}(?:\{[lcr| ]*\})?")
_SET_BUILDER = re.compile(r"\s?[A-Za-z](?:\s?\\in\s?\\mathbb\{[RN]\})?\s?(?:\||:|\\text\{ ?such that ?\})")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?%?")
_REALS = re.compile(
    r"\\mathbb\{? ?R\}?|R|all(?: ?real)? ?numbers|all ?reals?|\\text\{ ?all real numbers\.? ?\}|x\\in\\mathbb\{R\}"
)
_NOTHING = re.compile(
    r"\\emptyset|\\\{ ?\\\}|(?:\\text\{ ?)?(?:(?:there (?:are|is) )?no (?:real )?solutions?|(?:the )?empty set)\.? ?\}?"
)
# ]a,b[ is how some write (a,b).
_FRENCH = re.compile(r"([\[\]])([^\[\]]+)([\[\]])")
# What may follow a family of solutions: "where k is an integer", "k \in \mathbb{Z}".
_PARAMETER = re.compile(
    r"[,;]? ?\(?(?:\\text ?\{)? ?(?:,? ?(?:where|for|with|any|all|every|each|some|and)){0,3} ?\}? ?"
    r"(?:[a-z] ?\\in ?\\mathbb\{? ?[ZN] ?\}?(?:\^\+)?|(?:integers?|whole numbers?) [a-z]"
    r"|[a-z] (?:is|are|an|any| ){1,3} ?integers?) ?\}?\)?$"
)


@dataclass(frozen=True)
class Node:
    """A part of an answer.

    ``kind``: leaf, list, tuple, set, union, matrix (rows are ``list``), relation, interval is a tuple with two parts.
    ``marks``: the two brackets of a tuple, the delimiter of a matrix, the signs of a relation. ``text``: as tidied.
    """

    kind: str
    text: str
    parts: tuple["Node", ...] = ()
    marks: tuple[str, ...] = ()


def leaf(text: str) -> Node:
    """A single value."""
    return Node("leaf", unwrap(text.strip()))


def interval(left: str, low: str, high: str, right: str) -> Node:
    """The interval between two texts; ``left`` and ``right`` are its brackets."""
    return Node("tuple", f"{left}{low},{high}{right}", (leaf(low), leaf(high)), (left, right))


def read(text: str, depth: int = 0) -> Node:
    """The structure of a tidied ``text``."""
    text = unwrap(text.strip())
    if depth > _MAX_DEPTH:
        return Node("leaf", text)
    text = _PARAMETER.sub("", text)
    if (match := _FRENCH.fullmatch(text)) and (match[1] == "]" or match[3] == "["):
        text = f"{'(' if match[1] == ']' else '['}{match[2]}{')' if match[3] == '[' else ']'}"
    if _REALS.fullmatch(text):
        return interval("(", r"-\infty", r"\infty", ")")
    if _NOTHING.fullmatch(text):
        return Node("set", text)
    if not _THOUSANDS.fullmatch(text):
        parts = split(_WORD_SEPARATOR.sub(",", text), ",")
        if 1 < len(parts) <= _MAX_PARTS:
            nodes = [read(part, depth + 1) for part in parts if part.strip(" .\\")]
            flat = [inner for node in nodes for inner in (node.parts if node.kind == "list" else (node,))]
            return Node("list", text, tuple(flat)) if len(flat) != 1 else flat[0]
    if r"\pm" in text or r"\mp" in text:
        return _plus_minus(text, depth)
    return _relation(text, depth) or _union(text, depth) or _bracketed(text, depth) or Node("leaf", text)


def split(text: str, *separators: str) -> list[str]:
    """``text`` cut at the top-level ``separators``: not within any kind of bracket."""
    if not any(separator in text for separator in separators):
        return [text]
    parts, start, depth = [], 0, 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _OPEN_TOKENS:
            depth += 1
        elif token in _CLOSE_TOKENS:
            depth -= 1
        elif depth <= 0 and token in separators:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def _plus_minus(text: str, depth: int) -> Node:
    upper = text.replace(r"\pm", "+").replace(r"\mp", "-")
    lower = text.replace(r"\pm", "-").replace(r"\mp", "+")
    values = [re.sub(r"(^|[=(,\[{])\s*\+ ?", r"\1", sign) for sign in (upper, lower)]
    return Node("list", text, tuple(read(value, depth + 1) for value in values))


def _relation(text: str, depth: int) -> Node | None:
    sides = split(text, *_RELATIONS)
    if not 1 < len(sides) <= 6:
        return None
    signs, position = [], 0
    for side in sides[:-1]:
        position += len(side)
        token = _TOKEN.match(text, position)
        assert token
        signs.append(_RELATIONS[token[0]])
        position = token.end()
    if signs == ["in"]:
        return read(sides[1], depth + 1)
    if "~" in signs or "in" in signs:
        kept = [part for part in split(text, r"\approx") if part.strip()]
        return Node("approximate", text, tuple(read(part, depth + 1) for part in kept)) if "in" not in signs else None
    return Node("relation", text, tuple(leaf(side) for side in sides), tuple(signs))


def _union(text: str, depth: int) -> Node | None:
    text = re.sub(r"(?<=[)\]}]) ?U ?(?=[(\[\\])", r"\\cup ", text)
    parts = split(text, r"\cup")
    return Node("union", text, tuple(read(part, depth + 1) for part in parts)) if len(parts) > 1 else None


def _bracketed(text: str, depth: int) -> Node | None:
    """A matrix, set, tuple or interval, if the first bracket closes at the end of ``text``."""
    if match := _MATRIX.match(text.removeprefix("(").removeprefix("[").lstrip()):
        return _matrix(text, match)
    for opening, closing, kind in ((r"\{", r"\}", "set"), (r"\langle", r"\rangle", "tuple")):
        if text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            if builder := _SET_BUILDER.match(inner):
                return read(inner[builder.end() :], depth + 1)
            parts = split(inner, ",", ";")
            marks = ("(", ")") if kind == "tuple" else ()
            return Node(kind, text, tuple(n for p in parts for n in _members(read(p, depth + 1), kind)), marks)
    if text[:1] not in tuple("([") or text[-1:] not in tuple(")]") or _first_closing(text) != len(text) - 1:
        return None
    parts = split(text[1:-1], ",", ";")
    if len(parts) < 2:
        return (
            read(text[1:-1], depth + 1)
            if (text[0], text[-1]) in (("(", ")"), ("[", "]")) and text[1:-1].strip()
            else None
        )
    return Node("tuple", text, tuple(read(part, depth + 1) for part in parts), (text[0], text[-1]))


def _members(node: Node, kind: str) -> tuple[Node, ...]:
    return node.parts if node.kind == "list" and kind == "set" else (node,)


def _first_closing(text: str) -> int:
    depth = 0
    for match in _TOKEN.finditer(text):
        depth += (match[0] in _OPEN_TOKENS) - (match[0] in _CLOSE_TOKENS)
        if depth <= 0:
            return match.start()
    return -1


def _matrix(text: str, begin: re.Match[str]) -> Node | None:
    body = text.lstrip("([ ")
    end = rf"\end{{{begin[1]}}}"
    close = body.find(end)
    if close < 0 or body[close + len(end) :].strip(" )]"):
        return None
    delimiter = "|" if begin[1] == "vmatrix" else "("
    rows = [row for row in body[begin.end() : close].replace(r"\hline", "").split("\\\\") if row.strip()]
    read_rows = (Node("list", row, tuple(read(cell) for cell in row.split("&"))) for row in rows)
    return Node("matrix", text, tuple(read_rows), (delimiter,))


_PLAIN_NAME = re.compile(r"[A-Za-z]|\\[A-Za-z]+")
_NAME_ARGUMENT = re.compile(
    r"_\{[^{}]*\}|_\w|\^\{-1\}|\^\{\(\w\)\}|'|\([^()]{1,20}\)|\\(?:text|overline|vec|hat|angle|triangle) ?|[{} ]|\|"
)
_POINT = re.compile(r"\s?\( ?[A-Za-z](?: ?, ?[A-Za-z]){1,4} ?\)\s?")
_NOT_NAMES = re.compile(
    r"[\d+*/<>=^,.!%-]|\\(?:sqrt|frac|pi|cdot|times|infty|int|sum|lim|log|ln|sin|cos|tan|binom|begin)"
)


def is_name(text: str) -> bool:
    r"""Whether ``text`` only names what follows an equals sign: ``x``, ``f(x)``, ``\text{Area}``, ``a_1``, ``AB``."""
    if _POINT.fullmatch(text):
        return True
    rest = _NAME_ARGUMENT.sub("", text[:80])
    return len(text) <= 60 and bool(rest) and not _NOT_NAMES.search(rest) and not rest.isspace()


def plain_name(text: str) -> str | None:
    """The single letter or command that ``text`` is, or None."""
    name = squeeze(text)
    return name if _PLAIN_NAME.fullmatch(re.sub(r"_\{?\w\}?$", "", name)) else None


_CONSTANT = re.compile(r"e|\\pi|[a-d]")


def as_interval(node: Node) -> Node | None:
    r"""The interval that an inequality in one name describes: ``1 < x \le 2``, ``x > 3``; None for anything else."""
    if node.kind == "tuple" and len(node.parts) == 2:
        return node
    if node.kind != "relation" or not set(node.marks) <= {"<", "<=", ">", ">="} or len({s[0] for s in node.marks}) != 1:
        return None
    sides, signs = [part.text for part in node.parts], list(node.marks)
    if signs[0][0] == ">":
        sides, signs = sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    brackets = ["[" if sign == "<=" else "(" for sign in signs], ["]" if sign == "<=" else ")" for sign in signs]
    if len(sides) == 3 and is_name(sides[1]):
        return interval(brackets[0][0], sides[0], sides[2], brackets[1][1])
    if len(sides) == 2 and is_name(sides[0]) and not (is_name(sides[1]) and _CONSTANT.fullmatch(sides[0].strip())):
        return interval("(", r"-\infty", sides[1], brackets[1][0])
    if len(sides) == 2 and is_name(sides[1]):
        return interval(brackets[0][0], sides[0], r"\infty", ")")
    return None


def flat(node: Node) -> tuple[Node, ...]:
    """The intervals and points a union, or a list of inequalities, is made of; ``x \ne a`` is two intervals."""
    parts = node.parts if node.kind in ("union", "list") else (node,)
    out: list[Node] = []
    for part in parts:
        if part.kind in ("union", "set") or (part is not node and part.kind == "list"):
            out += [leaf_ for inner in part.parts for leaf_ in flat(inner)]
        elif part.kind == "relation" and part.marks == ("!=",) and is_name(part.parts[0].text):
            point = part.parts[1].text
            out += [interval("(", r"-\infty", point, ")"), interval("(", point, r"\infty", ")")]
        else:
            out.append(as_interval(part) or part)
    return tuple(out)
