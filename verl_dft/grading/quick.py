r"""The rules for single values that need no computer algebra system: equal strings, exact numbers, words, units.

Nothing here evaluates an expression, so no input can make it slow: patterns are linear and numbers are bounded.
"""

import re
from fractions import Fraction

from verl_dft.grading.arithmetic import surely_different
from verl_dft.grading.compare import Undecided
from verl_dft.grading.judge import Verdict, gold_type, judge
from verl_dft.grading.normalize import squeeze, tidy, words
from verl_dft.grading.numbers import Number, as_float, lenient_same, parse_number, same_number
from verl_dft.grading.units import strip_unit, units_differ

_BASE = re.compile(r"\(?(\d[\dA-Fa-f]*)\)?_\{?\(?(\d{1,2})\)?\}?")
_CONSTANT = re.compile(r"\+ ?[CcKk](?:_\{?[01]\}?)?$")
_RATIO = re.compile(r"(-?[\d.]+):(-?[\d.]+)(?::(-?[\d.]+))?")


class QuickLeaf:
    """A leaf rule; ``rule`` names what decided last. Raises ``Undecided`` for what takes algebra."""

    rule = ""

    def __call__(self, answer: str, gold: str, lenient: bool) -> bool:
        """Whether two tidied single values are equal."""
        equal, self.rule = _decide(answer, gold, lenient)
        return self.undecided(answer, gold, lenient) if equal is None else equal

    def undecided(self, answer: str, gold: str, lenient: bool) -> bool:
        """What to do about a pair that the quick rules cannot decide."""
        raise Undecided


def _decide(answer: str, gold: str, lenient: bool) -> tuple[bool | None, str]:
    a, g = squeeze(answer), squeeze(gold)
    if a == g:
        return True, "string"
    if _BASE.fullmatch(a) or _BASE.fullmatch(g):
        return _same_base(a, g), "base"
    answer_value, answer_unit = strip_unit(answer, letters=True)
    gold_value, gold_unit = strip_unit(gold)
    if units_differ(answer_unit, gold_unit):
        return False, "unit"
    a, g = squeeze(answer_value), squeeze(gold_value)
    if a == g:
        return True, "string"
    gold_number = parse_number(g)
    if gold_number is not None:
        answer_number = parse_number(a)
        if answer_number is not None:
            return _same(answer_number, gold_number, lenient), "number"
    elif gold_type(gold) == "text":
        return words(answer) == words(gold), "text"
    same_shape = _same_shape(a, g)
    if same_shape is None and surely_different(a, g, lenient):
        return False, "value"
    return same_shape, "form"


def _same(answer: Number, gold: Number, lenient: bool) -> bool:
    return same_number(answer, gold) or (lenient and lenient_same(as_float(answer), as_float(gold)))


def _same_base(a: str, g: str) -> bool | None:
    """``101_2``: digits and base agree; digits alone are taken to be in the base that the problem names."""
    answer, gold = _BASE.fullmatch(a), _BASE.fullmatch(g)
    if answer and gold:
        return answer.groups() == gold.groups()
    other = a if gold else g
    if not re.fullmatch(r"[\dA-Fa-f]+", other):
        return None
    return other == (answer or gold)[1]  # type: ignore[index]


def _same_shape(a: str, g: str) -> bool | None:
    """Antiderivatives up to the name of their constant, and ratios part by part; None for anything else."""
    if _CONSTANT.search(g) and _CONSTANT.search(a) and _CONSTANT.sub("", a) == _CONSTANT.sub("", g):
        return True
    answer, gold = _RATIO.fullmatch(a), _RATIO.fullmatch(g)
    if answer and gold:
        pairs = zip(answer.groups(), gold.groups(), strict=True)
        return all(x == y or (x and y and parse_number(x) == parse_number(y)) for x, y in pairs)
    return None


def quick_judge(answer: str, gold: str, answer_type: str = "auto") -> Verdict | None:
    """The verdict by the cheap rules alone, or None where math-verify has to be asked."""
    try:
        return judge(answer, gold, answer_type, QuickLeaf())
    except Undecided:
        return None


def within(answer: str, gold: str, tolerance: float) -> bool:
    """Whether both are plain numbers, units apart, that differ by no more than ``tolerance``."""
    a, g = (parse_number(squeeze(strip_unit(tidy(text))[0])) for text in (answer[:1000], gold))
    return a is not None and g is not None and abs(a.value - g.value) <= Fraction(str(tolerance))
