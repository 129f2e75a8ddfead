"""Comparing single values through math-verify and sympy. Slow, and able to hang or die: it runs in a worker process."""

import functools
import random
import re
from fractions import Fraction
from typing import Any

from verl_dft.grading.judge import Verdict, judge
from verl_dft.grading.normalize import squeeze
from verl_dft.grading.numbers import is_rounding, lenient_same, parse_number
from verl_dft.grading.quick import QuickLeaf
from verl_dft.grading.units import strip_unit

_E_NOTATION = re.compile(r"(?<![A-Za-z\d.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d+)(?![A-Za-z\d.])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?) ?\^ ?\\circ")
_PERCENT = re.compile(r"\\?%")
# Two constants that agree to this are equal; to less than that, only where binary floating point is involved.
_DIGITS = 50
_EQUAL, _EQUAL_FLOAT, _EQUAL_AT_POINT = 1e-40, 1e-12, 1e-9
# Values for the unknowns: the first three sets are positive, where roots, logarithms and powers are all real.
_POINTS = ((0.4, 1.9), (0.3, 0.9), (1.1, 2.7), (-1.9, -0.4), (-0.9, 2.0))
_POSITIVE_POINTS = 3


def verify(answer: str, gold: str, answer_type: str = "auto") -> Verdict:
    """Whether an extracted ``answer`` equals ``gold``, with math-verify deciding what the quick rules cannot."""
    return judge(answer, gold, answer_type, EngineLeaf())


class EngineLeaf(QuickLeaf):
    """The quick rules, then math-verify."""

    def undecided(self, answer: str, gold: str, lenient: bool) -> bool:
        """Equality of two tidied values or relations that the quick rules did not decide."""
        self.rule = "math_verify"
        a, g = _parse(_for_parser(answer)), _parse(_for_parser(gold))
        if a is None or g is None:
            self.rule = "unparsed" if a is None else "gold_unparsed"
            return False
        if _has_matrix(a) != _has_matrix(g):
            return False
        a = _same_parameter(a, g)
        if lenient:
            return _lenient(a, g)
        equal = _equal_constants(a, g, answer, gold)
        if equal is None:
            equal = _equal_at_points(a, g)
        if equal is False:
            return False
        return _math_verify(a, g) or bool(equal)


def _for_parser(text: str) -> str:
    """A tidied value without its unit, in LaTeX that math-verify reads: no e-notation, no ``%``, radians."""
    value = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", _PERCENT.sub("", strip_unit(text)[0]))
    return _E_NOTATION.sub(r"(\1 \\times 10^{\2})", value).replace("\\exp ", "\\exp")


@functools.lru_cache(maxsize=2048)
def _parse(text: str) -> Any:
    """The sympy object of one value, or None where math-verify finds none."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, I

    # No time-outs of its own: they use signal.alarm, and the pool ends a worker that takes too long.
    # Units are ours: it takes some products of letters for one.
    normalize = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    configs = (LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalize),)
    parsed = parse(rf"\boxed{{{text}}}", configs, parsing_timeout=None)
    if not parsed or isinstance(parsed[0], str):
        return None
    units = [s for s in parsed[0].free_symbols if s.name == "i"] if isinstance(parsed[0], Basic) else []
    return parsed[0].subs({unit: I for unit in units}) if units else parsed[0]


def _has_matrix(expression: Any) -> bool:
    from sympy import Basic, MatrixBase, MatrixExpr

    matrices = (MatrixBase, MatrixExpr)
    return isinstance(expression, matrices) or (isinstance(expression, Basic) and expression.has(*matrices))


def _same_parameter(a: Any, g: Any) -> Any:
    """A family of angles, ``pi/6 + 2 k pi``, with its integer called what the gold calls it."""
    from sympy import Basic, pi

    if not isinstance(a, Basic) or not isinstance(g, Basic) or not a.has(pi) or not g.has(pi):
        return a
    ours, theirs = a.free_symbols - g.free_symbols, g.free_symbols - a.free_symbols
    if len(ours) == len(theirs) == 1 and {s.name for s in ours | theirs} <= {"k", "m", "n"}:
        return a.subs(ours.pop(), theirs.pop())
    return a


def _math_verify(a: Any, g: Any) -> bool:
    from math_verify import verify as math_verify

    return bool(math_verify(g, a, allow_set_relation_comp=True, timeout_seconds=None))


def _constant(expression: Any) -> Any:
    """The value as a sympy number with 50 digits, or None if it is not a finite number."""
    if getattr(expression, "free_symbols", True) or not getattr(expression, "is_commutative", False):
        return None
    try:
        value = expression.evalf(_DIGITS)
        if not value.is_number or not value.is_finite:
            value = expression.doit().evalf(_DIGITS)
        return value if value.is_number and value.is_finite else None
    except (AttributeError, TypeError, ValueError, ArithmeticError):
        return None


def _relative_difference(a: Any, g: Any) -> float:
    scale = max(abs(a), abs(g))
    return float(abs(a - g) / scale) if scale else 0.0


def _equal_constants(a: Any, g: Any, answer: str, gold: str) -> bool | None:
    """Equality of two numbers; None where one of them is not one."""
    from sympy import Float

    x, y = _constant(a), _constant(g)
    if x is None or y is None:
        return None
    difference = _relative_difference(x, y)
    if difference <= (_EQUAL_FLOAT if a.has(Float) or g.has(Float) else _EQUAL):
        return True
    for text, exact in ((answer, y), (gold, x)):
        decimal = parse_number(squeeze(strip_unit(text)[0]))
        if decimal and exact.is_real and is_rounding(decimal, Fraction(str(exact))):
            return True
    return False


def _lenient(a: Any, g: Any) -> bool:
    x, y = _constant(a), _constant(g)
    if x is None or y is None or not x.is_real or not y.is_real:
        return False
    return lenient_same(float(x), float(y))


def _equal_at_points(a: Any, g: Any) -> bool | None:
    """Equality of two expressions or equations at random values of their unknowns.

    False: they differ at a positive point, so nothing can make them equal. True: they agree at every point at which
    both have a value. None: cannot tell.
    """
    from sympy import Eq, Expr

    if isinstance(a, Eq) and isinstance(g, Eq):
        return _proportional(a.lhs - a.rhs, g.lhs - g.rhs)
    if not isinstance(a, Expr) or not isinstance(g, Expr):
        return None
    symbols = sorted(a.free_symbols | g.free_symbols, key=str)
    values = [(_value(a, point), _value(g, point)) for point in _points(symbols)]
    differ = [None if None in pair else _relative_difference(*pair) > _EQUAL_AT_POINT for pair in values]
    if any(differ[:_POSITIVE_POINTS]):
        return False
    known = [different for different in differ if different is not None]
    return True if len(known) >= _POSITIVE_POINTS + 1 and not any(known) else None


def _points(symbols: list[Any]) -> list[dict[Any, float]]:
    chance = random.Random(0)
    return [{symbol: chance.uniform(low, high) for symbol in symbols} for low, high in _POINTS]


def _value(expression: Any, point: dict[Any, float]) -> Any:
    try:
        value = expression.evalf(20, subs=point)
        return value if value.is_number and value.is_finite else None
    except (AttributeError, TypeError, ValueError, ArithmeticError):
        return None


def _proportional(a: Any, g: Any) -> bool | None:
    """Whether two left-minus-right sides differ by a constant factor only: then the equations are the same."""
    symbols = sorted(a.free_symbols | g.free_symbols, key=str)
    if a.free_symbols != g.free_symbols:
        return False
    if not symbols:
        return None
    values = [(_value(a, point), _value(g, point)) for point in _points(symbols)]
    ratios = [x / y for x, y in values if x is not None and y is not None and y != 0]
    if len(ratios) < len(_POINTS) - 1:
        return None
    equal = all(_relative_difference(ratio, ratios[0]) < _EQUAL_AT_POINT for ratio in ratios[1:])
    # Where the ratio varies, math-verify may still find that both have the same solutions.
    return True if equal and ratios[0] != 0 else None
