r"""What kind of answer a gold asks for, and whether an extracted answer equals it.

Letters and words are compared here; everything else goes through :mod:`verl_dft.grading.compare`.
"""

import functools
import re
from typing import NamedTuple

from verl_dft.grading.compare import Leaf, same
from verl_dft.grading.normalize import squeeze, tidy, words
from verl_dft.grading.structure import Node, leaf, read

# Above this an answer is not one: no gold of any benchmark comes near, and patterns would only burn time on it.
_MAX_ANSWER_CHARS = 10_000


class Verdict(NamedTuple):
    """Strict equality, equality under the Qwen harness's leniencies, and the rule that decided the strict one."""

    equal: bool
    qwen: bool
    rule: str


_LETTER = re.compile(r"\(?([A-Za-z])\)?")
_LETTER_WITH_TEXT = re.compile(
    r"\(([A-Za-z])\)|([A-Za-z])\s?[.):](?!\d)|(?:option|choice|answer)\s?:?\s?\(?([A-Za-z])\)?(?![A-Za-z])",
    re.IGNORECASE,
)
_WRAPPER = re.compile(r"\\(?:text|mathrm|textbf|mathbf|boxed)\s*\{|[{}*$]")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z(])")
_TEXT_GROUP = re.compile(
    r"\\(?:text|mathrm)\s?\{[^{}]*[A-Za-z]{2,}[^{}]*\}|\\(?:text|mathrm)\s?\{\s?\(?[A-Z]\)?[.:]?\s?\}"
)
_CLOCK = re.compile(r"\s*\d{1,2}:\d\d\s*(?:[ap]\.?\s?m\.?)?\s*", re.IGNORECASE)
_MATHEMATICS = re.compile(r"\\(?!text|mathrm)[A-Za-z]+|[\d=<>^+*/|(\[]")
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc log ln exp max min gcd lcm mod arcsin arccos arctan det dim and or".split()
)
_YES_NO = re.compile(r"(yes|no|true|false)\s?[,.;:]", re.IGNORECASE)
_FIGURES = re.compile(r"-?\d+(?:, ?-?\d+)+")
_NAMED = re.compile(r"[A-Za-z]\w{0,20}\s*=\s*")
_WORD_FIRST = re.compile(r"\s*[A-Za-z]{3,}\s")
_VALUE_FIRST = re.compile(r"[-+.$\\(]{0,3}\d")


@functools.lru_cache(maxsize=8192)
def gold_type(gold: str) -> str:
    r"""``choice``, ``text``, ``multi`` or ``latex``: what a gold answer is, by its look.

    Words must not reach the algebra system, which reads them as products of symbols, so that any anagram would pass.
    """
    if re.fullmatch(r"\(?[A-Z]\)?", _WRAPPER.sub("", gold).strip()):
        return "choice"
    text = tidy(gold)
    if _CLOCK.fullmatch(words_kept(gold)) or _is_text(text, gold):
        return "text"
    return "multi" if read(text).kind == "list" else "latex"


def words_kept(text: str) -> str:
    """``text`` without the commands that wrap words."""
    return _WRAPPER.sub("", text)


def _is_text(text: str, raw: str) -> bool:
    plain = words_kept(raw).strip()
    found = [word for word in _WORD.findall(plain) if word.casefold() not in _FUNCTIONS]
    if not _MATHEMATICS.search(plain):
        long_word = any(len(word) >= 3 for word in found)
        return bool(found) and (long_word or plain.casefold() == "no" or bool(_TEXT_GROUP.search(raw)))
    # Prose with formulas in it. A value with a unit, and "x = 2 or x = 3", are not prose.
    long_words = sum(len(word) >= 3 for word in found)
    return long_words >= 5 or (long_words >= 2 and bool(_WORD_FIRST.match(plain)))


def judge(answer: str, gold: str, answer_type: str, leaf_rule: Leaf) -> Verdict:
    """Compare an extracted ``answer`` with ``gold``.

    Args:
        answer_type: ``auto``, ``number``, ``latex``, ``choice``, ``text`` or ``multi``.
        leaf_rule: decides single values; may raise :class:`Undecided`, which is passed on.
    """
    if answer.strip() == gold.strip():
        return Verdict(True, True, "string")
    if len(answer) > max(_MAX_ANSWER_CHARS, 2 * len(gold)):
        return Verdict(False, False, "too_long")
    a, g = tidy(answer), tidy(gold)
    if squeeze(a) == squeeze(g):
        return Verdict(True, True, "string")
    kind = gold_type(gold) if answer_type in ("auto", "latex", "number", "multi") else answer_type
    if kind == "choice":
        return _both(letter(answer) == letter(gold), "choice")
    if kind == "text":
        equal = _same_words(answer, gold)
        # "No solution" and "all real numbers" have other spellings in symbols, and "3 apples" is a number.
        mathematical = read(g).kind in ("set", "tuple") or _VALUE_FIRST.match(g)
        if equal or not mathematical or _CLOCK.fullmatch(words_kept(gold)):
            return _both(equal, "text")
    return _judge_structure(a, g, leaf_rule)


def _both(equal: bool, rule: str) -> Verdict:
    return Verdict(equal, equal, rule)


def letter(text: str) -> str:
    """The choice letter a text names, in upper case; a text that names none is returned in lower case."""
    text = _WRAPPER.sub("", text).strip().strip(".,:; ")
    text = text[match.end() :] if (match := _NAMED.match(text)) else text
    match = _LETTER.fullmatch(text) or _LETTER_WITH_TEXT.match(text)
    return next(group for group in match.groups() if group).upper() if match else f"no letter: {text.casefold()}"


def _same_words(answer: str, gold: str) -> bool:
    a, g = words(answer), words(gold)
    if g in ("yes", "no", "true", "false") and (match := _YES_NO.match(words_kept(answer).strip())):
        return match[1].casefold() == g
    return a == g or a.replace(" ", "") == g.replace(" ", "")


def _judge_structure(a: str, g: str, leaf_rule: Leaf) -> Verdict:
    answer, gold = read(a), read(g)
    kind = "interval" if _is_interval(gold) else gold.kind
    equal = same(answer, gold, leaf_rule, False)
    rule = (leaf_rule.rule or answer.kind) if gold.kind in ("leaf", "relation", "approximate") else kind
    if equal:
        return Verdict(True, True, rule)
    if _ambiguous_thousands(a, g) and same(_as_list(a), _as_list(g), leaf_rule, False):
        return Verdict(True, True, "list")
    return Verdict(False, same(answer, gold, leaf_rule, True), rule)


def _is_interval(node: Node) -> bool:
    return node.kind == "tuple" and (node.marks != ("(", ")") or r"\infty" in node.text)


def _ambiguous_thousands(a: str, g: str) -> bool:
    """``100,200`` is a number or two of them; where one side shows a space after the comma it is two."""
    return bool(_FIGURES.fullmatch(a) and _FIGURES.fullmatch(g)) and (", " in a) != (", " in g)


def _as_list(text: str) -> Node:
    return Node("list", text, tuple(leaf(part) for part in text.split(",")))
