r"""Floating-point values of simple expressions, to tell at once that two of them differ.

Only ever used to reject: values that differ cannot belong to equal expressions, while values that agree prove nothing
and go to math-verify. Anything but numbers, letters, ``+ - * / ^ !``, ``\frac``, ``\sqrt``, ``\pi`` and brackets is
left to math-verify too, and so is whatever could be read in two ways (``1/2x``, ``x_1``, ``2\frac{1}{3}``).
"""

import functools
import math
import re

from verl_dft.grading.numbers import lenient_same

_MAX_CHARS = 200
_MAX_DEPTH = 20
_TOKEN = re.compile(r"\d+(?:\.\d*)?|\.\d+|\\[A-Za-z]+|.", re.DOTALL)
_SURELY_DIFFERENT = 1e-4
# Three sets of values for the letters; positive, so that roots and powers are real.
_POINTS = ((0.31, 0.47), (0.83, 0.29), (1.27, 0.61))
_PARAMETERS = frozenset("kmn")
_HUGE_EXPONENT, _LARGEST_FACTORIAL = 1e6, 170


class _Unknown(Exception):
    """Not an expression this reader knows."""


def surely_different(a: str, g: str, lenient: bool) -> bool:
    """Whether two squeezed expressions have different values; False also where that cannot be told.

    ``lenient``: also not within the Qwen harness's tolerances, which are for constants only.
    """
    if r"\pi" in a and set(a) & _PARAMETERS != set(g) & _PARAMETERS:  # an angle up to k turns, or n turns
        return False
    x, y = _values(a), _values(g)
    if x is None or y is None:
        return False
    if lenient and lenient_same(x[0], y[0]):
        return False
    return any(_differ(*pair) for pair in zip(x, y, strict=True))


def _differ(x: float, y: float) -> bool:
    if math.isinf(x) or math.isinf(y):
        return x != y
    return abs(x - y) > _SURELY_DIFFERENT * max(abs(x), abs(y))


@functools.lru_cache(maxsize=4096)
def _values(text: str) -> tuple[float, ...] | None:
    if len(text) > _MAX_CHARS:
        return None
    try:
        values = tuple(_Reader(text, *point).whole() for point in _POINTS)
    except (_Unknown, ArithmeticError, ValueError):
        return None
    return None if any(math.isnan(value) for value in values) else values


class _Reader:
    """Recursive descent over the tokens of one expression, at one value per letter."""

    def __init__(self, text: str, base: float, step: float) -> None:
        self.tokens = [token for token in _TOKEN.findall(text) if token != " "]
        self.position, self.depth = 0, 0
        self.base, self.step = base, step

    def whole(self) -> float:
        value = self.sum()
        if self.next():
            raise _Unknown
        return value

    def next(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.next()
        if not token or (expected and token != expected):
            raise _Unknown
        self.position += 1
        return token

    def sum(self) -> float:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _Unknown
        value = self.signed_product()
        while self.next() in ("+", "-"):
            sign = self.take()
            term = self.product()
            value = value + term if sign == "+" else value - term
        self.depth -= 1
        return value

    def signed_product(self) -> float:
        if self.next() in ("+", "-"):
            return -self.product() if self.take() == "-" else self.product()
        return self.product()

    def product(self) -> float:
        value, divided = self.power(), False
        while True:
            token = self.next()
            if token in ("*", r"\cdot", r"\times", "/"):
                self.take()
                factor = self.power()
                divided = token == "/"
                value = value / factor if divided else value * factor
            elif token and (token.isalnum() or token in ("(", r"\frac", r"\sqrt", r"\pi")):
                mixed = token == r"\frac" and self.tokens[self.position - 1].isdigit()
                if divided or mixed or token[0].isdigit():
                    raise _Unknown
                value *= self.power()
            else:
                return value

    def power(self) -> float:
        value = self.atom()
        while self.next() == "!":
            self.take()
            value = _factorial(value)
        if self.next() != "^":
            return value
        self.take()
        if self.next() == "{":
            return _power(value, self.group("{", "}"))
        token = self.take()
        if len(token) > 1 and token != r"\pi":  # 2^10 is 2^{1}0 to LaTeX and 2^{10} to its writer
            raise _Unknown
        return _power(value, self.simple(token))

    def atom(self) -> float:
        token = self.next()
        if token == "(":
            return self.group("(", ")")
        if token == "{":
            return self.group("{", "}")
        self.take()
        if token == r"\frac":
            return self.group("{", "}") / self.group("{", "}")
        if token == r"\sqrt":
            index = self.group("[", "]") if self.next() == "[" else 2.0
            return _power(self.group("{", "}"), 1 / index)
        return self.simple(token)

    def simple(self, token: str) -> float:
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            return float(token)
        if token == r"\pi":
            return math.pi
        if token == "e":
            return math.e
        if len(token) == 1 and token.isascii() and token.isalpha() and token != "i" and self.next() not in ("_", "'"):
            return self.base + self.step * (ord(token) % 32) / 7
        raise _Unknown

    def group(self, opening: str, closing: str) -> float:
        self.take(opening)
        value = self.sum()
        self.take(closing)
        return value


def _power(base: float, exponent: float) -> float:
    if math.isinf(base) or math.isinf(exponent):
        if base >= 2 and exponent >= 1:
            return math.inf
        raise _Unknown
    if base >= 2 and exponent >= _HUGE_EXPONENT:
        return math.inf
    if base < 0 and exponent != int(exponent):
        raise _Unknown
    return base**exponent


def _factorial(value: float) -> float:
    if value >= _HUGE_EXPONENT:
        return math.inf
    if value != int(value) or not 0 <= value <= _LARGEST_FACTORIAL:
        raise _Unknown
    return float(math.factorial(int(value)))
