r"""Whether two structures are equal: one recursion, with the values at the leaves left to a rule.

The leaf rule decides equality of single values. In the calling process it knows strings, words and numbers and raises
:class:`Undecided` for anything else; in a worker it goes on to math-verify. So the two can never disagree on structure.

``lenient`` is the second opinion, the Qwen2.5-Math harness's known leniencies (the evaluation of DFT): numbers within a
relative 1e-4, a factor of 100 either way, and brackets of tuples and intervals ignored.
"""

import re
from collections.abc import Sequence
from typing import Protocol

from verl_dft.grading.normalize import squeeze
from verl_dft.grading.structure import Node, as_interval, flat, is_name, leaf, plain_name, read, split


class Leaf(Protocol):
    """Decides single values; ``rule`` names what decided the last one."""

    rule: str

    def __call__(self, answer: str, gold: str, lenient: bool) -> bool:
        """Whether two tidied texts are equal; may raise :class:`Undecided`."""
        ...


class Undecided(Exception):
    """The cheap rules cannot tell; a worker has to."""


def same(a: Node, g: Node, rule: Leaf, lenient: bool) -> bool:
    """Whether ``a`` equals the gold ``g``."""
    if squeeze(a.text) == squeeze(g.text):
        return True
    if "approximate" in (a.kind, g.kind):
        return any(
            same(x, y, rule, lenient)
            for x in (a.parts if a.kind == "approximate" else (a,))
            for y in (g.parts if g.kind == "approximate" else (g,))
        )
    if g.kind not in ("relation", "leaf") and a.kind == "relation" and (values := _values((a,))):
        a = values[0]
    compare = {
        "leaf": _same_leaf, "relation": _same_relation, "tuple": _same_tuple, "list": _same_list, "set": _same_set,
        "union": _same_union, "matrix": _same_matrix,
    }[g.kind]  # fmt: skip
    return compare(a, g, rule, lenient)


def _same_leaf(a: Node, g: Node, rule: Leaf, lenient: bool) -> bool:
    if a.kind == "relation" and set(a.marks) == {"="}:
        values = a.parts[1:] if is_name(a.parts[0].text) else a.parts
        return all(rule(part.text, g.text, lenient) for part in values)
    if a.kind in ("set", "list") and len(_distinct(a.parts)) == 1:
        return same(a.parts[0], g, rule, lenient)
    return (a.kind == "leaf" or _needs_algebra(a, g)) and rule(a.text, g.text, lenient)


def _needs_algebra(a: Node, g: Node) -> bool:
    r"""A value in which sets or matrices are computed with, against a plain one: ``2 A``, ``R \setminus {5}``."""
    computed = (a if a.kind == "leaf" else g).text
    return {a.kind, g.kind} in ({"leaf", "matrix"}, {"leaf", "union"}) and (
        r"\begin" in computed or r"\setminus" in computed
    )


def _same_relation(a: Node, g: Node, rule: Leaf, lenient: bool) -> bool:
    if set(g.marks) != {"="}:
        if g.marks == ("!=",) and a.kind == "relation" and a.marks == ("!=",):
            return rule(a.parts[-1].text, g.parts[-1].text, lenient)
        x, y = as_interval(a), as_interval(g)
        if x is not None and y is not None:
            return same(x, y, rule, lenient)
        if g.marks == ("!=",) and is_name(g.parts[0].text):
            return _same_union(a, g, rule, lenient)
        return a.kind == "relation" and rule(a.text, g.text, lenient)
    named = is_name(g.parts[0].text)
    value = read(g.parts[-1].text)
    if a.kind != "relation":
        return same(a, value, rule, lenient) if named or a.kind == "leaf" else False
    if set(a.marks) != {"="}:
        return False
    if named and is_name(a.parts[0].text):
        a = _same_argument(a, g)
        x, y = plain_name(a.parts[0].text), plain_name(g.parts[0].text)
        if x is None or y is None or x == y:
            return same(read(a.parts[-1].text), value, rule, lenient)
        return False
    # A chain of three or more is a derivation: its last value counts, and was compared if the gold names it.
    return len(a.parts) == len(g.parts) == 2 and rule(a.text, g.text, lenient)


_FUNCTION = re.compile(r"\s?([A-Za-z]) ?\( ?([a-z]) ?\)\s?")


def _same_argument(a: Node, g: Node) -> Node:
    """``f(n) = n + 1`` with the argument called what the gold calls it."""
    answer, gold = _FUNCTION.fullmatch(a.parts[0].text), _FUNCTION.fullmatch(g.parts[0].text)
    if not answer or not gold or answer[1] != gold[1] or answer[2] == gold[2] or gold[2] in a.parts[-1].text:
        return a
    renamed = re.sub(rf"(?<![\\A-Za-z]){answer[2]}(?![A-Za-z])", gold[2], a.parts[-1].text)
    return read(f"{g.parts[0].text}={renamed}")


def _ordered(a: Sequence[Node], g: Sequence[Node], rule: Leaf, lenient: bool) -> bool:
    return len(a) == len(g) and all(same(x, y, rule, lenient) for x, y in zip(a, g, strict=True))


def _unordered(a: Sequence[Node], g: Sequence[Node], rule: Leaf, lenient: bool) -> bool:
    """Equal as sets: repeats on either side count once."""
    a, g = _distinct(a), _distinct(g)
    for exact in (True, False):  # equal strings first, so that what remains is short
        for gold in list(g):
            for answer in a:
                if squeeze(answer.text) == squeeze(gold.text) if exact else same(answer, gold, rule, lenient):
                    a, g = [x for x in a if x is not answer], [x for x in g if x is not gold]
                    break
            else:
                if not exact:
                    return False
        if len(a) != len(g):
            return False
    return True


def _distinct(nodes: Sequence[Node]) -> list[Node]:
    return list({squeeze(node.text): node for node in nodes}.values())


def _values(nodes: Sequence[Node]) -> tuple[Node, ...] | None:
    """The values of ``x = 1, y = 2``, in the order of the names if these all differ; None if not of that form."""
    named = [n for n in nodes if n.kind == "relation" and n.marks == ("=",) and is_name(n.parts[0].text)]
    if len(named) != len(nodes):
        return None
    if len({squeeze(n.parts[0].text) for n in named}) == len(named):
        named = sorted(named, key=lambda n: squeeze(n.parts[0].text))
    return tuple(read(n.parts[1].text) for n in named)


def _same_tuple(a: Node, g: Node, rule: Leaf, lenient: bool) -> bool:
    if a.kind == "relation":
        a = as_interval(a) or a
    if a.kind == "tuple":
        return (lenient or a.marks == g.marks) and _ordered(a.parts, g.parts, rule, lenient)
    if a.kind == "list" and (lenient or g.marks == ("(", ")")):
        return _ordered(_values(a.parts) or a.parts, g.parts, rule, lenient)
    if a.kind == "leaf" and g.marks == ("(", ")") and a.text.count(",") == len(g.parts) - 1:  # 20,100 for (20,100)
        return _ordered([leaf(part) for part in split(a.text, ",")], g.parts, rule, lenient)
    return False


def _same_list(a: Node, g: Node, rule: Leaf, lenient: bool) -> bool:
    if a.kind == "tuple":
        if a.marks in (("(", ")"), ("[", "]")):
            return _ordered(a.parts, _values(g.parts) or g.parts, rule, lenient) or (
                _ordered(a.parts, g.parts, rule, lenient)
            )
        return False
    if a.kind not in ("list", "set"):
        if a.kind == "union" or (a.kind == "relation" and "=" not in a.marks):
            return _unordered(flat(a), flat(g), rule, lenient)
        return len(_distinct(g.parts)) == 1 and same(a, g.parts[0], rule, lenient)
    gold_values, answer_values = _values(g.parts), _values(a.parts)
    if gold_values and not answer_values and a.kind == "list" and _names_differ(g.parts):
        return _ordered(a.parts, gold_values, rule, lenient) or (
            _ordered(a.parts, [n.parts[1] for n in g.parts], rule, lenient)
        )
    if gold_values and not _names_differ(g.parts):
        return _unordered(answer_values or a.parts, gold_values, rule, lenient)
    if answer_values and not gold_values and not _names_differ(a.parts):
        return _unordered(answer_values, g.parts, rule, lenient)
    return _unordered([_plain(n, g) for n in a.parts], g.parts, rule, lenient)


def _plain(node: Node, gold: Node) -> Node:
    """``x = 3, 4`` is two values, one of them named."""
    plain_gold = all(part.kind != "relation" for part in gold.parts)
    if plain_gold and node.kind == "relation" and node.marks == ("=",) and is_name(node.parts[0].text):
        return read(node.parts[1].text)
    return node


def _names_differ(nodes: Sequence[Node]) -> bool:
    return len({squeeze(n.parts[0].text) for n in nodes}) == len(nodes) > 1


def _same_set(a: Node, g: Node, rule: Leaf, lenient: bool) -> bool:
    if a.kind in ("set", "list"):
        return _unordered(a.parts, g.parts, rule, lenient)
    return len(g.parts) == 1 and a.kind == "leaf" and same(a, g.parts[0], rule, lenient)


def _same_union(a: Node, g: Node, rule: Leaf, lenient: bool) -> bool:
    if a.kind in ("union", "list", "relation", "tuple"):
        return _unordered(flat(a), flat(g), rule, lenient)
    return _needs_algebra(a, g) and rule(a.text, g.text, lenient)


def _same_matrix(a: Node, g: Node, rule: Leaf, lenient: bool) -> bool:
    if a.kind != "matrix":
        return _needs_algebra(a, g) and rule(a.text, g.text, lenient)
    return a.marks == g.marks and _ordered_rows(a, g, rule, lenient)


def _ordered_rows(a: Node, g: Node, rule: Leaf, lenient: bool) -> bool:
    return len(a.parts) == len(g.parts) and all(
        _ordered(x.parts, y.parts, rule, lenient) for x, y in zip(a.parts, g.parts, strict=True)
    )
