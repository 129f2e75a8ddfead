r"""Plain numbers, exactly: decimals, fractions, powers of ten, recurring decimals, mixed numbers, percent, words.

Nothing here computes a number longer than a few hundred digits, whatever the text says.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

# Longest text read as a number and largest power of ten, so that a number in the text cannot become a huge integer.
_MAX_NUMBER_CHARS = 400
_MAX_EXPONENT = 400
# A decimal counts as a rounded value only from this many places on (0.333333 is a third, 0.3333 is not), and only if
# it shows this many digits after its leading zeros.
_MIN_ROUNDED_PLACES = 6
_MIN_ROUNDED_DIGITS = 3
# What binary floating point leaves behind: 174080.00000000003.
_RELATIVE_TOLERANCE = Fraction(1, 10**9)
_LENIENT_TOLERANCE = 1e-4

_D = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)"
_SIGNED = rf"\(?[+-]?{_D}\)?"
_DECIMAL = re.compile(rf"([+-]?)({_D})(?:[eE]\{{?([+-]?\d+)\}}?)?")
_SCIENTIFIC = re.compile(rf"([+-]?)(?:({_D})(?:\\times|\\cdot|\*|x))?10\^(?:\{{\(?([+-]?\d+)\)?\}}|([+-]?\d+))")
_FRACTION = re.compile(rf"([+-]?)\(?(?:\\frac\{{({_SIGNED})\}}\{{({_SIGNED})\}}|({_SIGNED})/({_SIGNED}))\)?")
_MIXED = re.compile(r"([+-]?)(\d+)(?: |\\ )?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))")
_RECURRING = re.compile(r"([+-]?)(\d*)\.(\d*)\\(?:overline|bar|dot)\{(\d+)\}")
_POWER = re.compile(r"([+-]?)(\d{1,4})\^(?:\{(\d{1,2})\}|(\d))")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(rf"(.+?) ?\\?(?:text\{{ ?)?({'|'.join(_SCALES)})\}}?")
_WORDS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split()
    )
}


@dataclass(frozen=True)
class Number:
    """An exact value and how it was written.

    ``places``: decimal places (None for a fraction). ``percent``: with a % sign. ``whole``: as digits and nothing else.
    """

    value: Fraction
    places: int | None = None
    percent: bool = False
    whole: bool = False


def parse_number(text: str) -> Number | None:
    """``text`` (squeezed) as one plain number, or None."""
    if not text or len(text) > _MAX_NUMBER_CHARS:
        return None
    if text[-1] == "%":
        number = parse_number(text[:-1])
        return number and Number(number.value, number.places, percent=True, whole=number.whole)
    if text[0] == "(" and text[-1] == ")":
        return parse_number(text[1:-1])
    if text.startswith(("-(", "--", "-{")):
        number = parse_number(text[1:].strip("{}"))
        return number and Number(-number.value, number.places, whole=number.whole)
    if text[0].isalpha():
        value = _WORDS.get(text.casefold())
        return None if value is None else Number(Fraction(value), 0, whole=True)
    if text[-1] in "}dn" and (match := _SCALED.fullmatch(text)):
        number = parse_number(match[1].strip())
        return number and Number(number.value * 10 ** _SCALES[match[2]])
    for read in (_decimal, _scientific, _fraction, _others):
        if number := read(text):
            return number
    return None


def _sign(sign: str) -> int:
    return -1 if sign == "-" else 1


def _exact(decimal: str) -> Fraction:
    return Fraction(decimal.strip("()").replace(",", "").rstrip(".") or "0")


def _decimal(text: str) -> Number | None:
    match = _DECIMAL.fullmatch(text)
    return _powered(match[1], match[2], match[3] or "0") if match else None


def _scientific(text: str) -> Number | None:
    match = _SCIENTIFIC.fullmatch(text)
    return _powered(match[1], match[2] or "1", match[3] or match[4]) if match else None


def _powered(sign: str, mantissa: str, exponent_text: str) -> Number | None:
    if len(exponent_text) > 5 or abs(int(exponent_text)) > _MAX_EXPONENT:
        return None
    exponent = int(exponent_text)
    places = len(mantissa.partition(".")[2])
    value = _sign(sign) * _exact(mantissa) * Fraction(10) ** exponent
    return Number(value, places - exponent, whole=places == exponent == 0)


def _fraction(text: str) -> Number | None:
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    top, bottom = (_exact(part) for part in match.groups()[1:] if part is not None)
    return Number(_sign(match[1]) * top / bottom) if bottom else None


def _others(text: str) -> Number | None:
    if match := _MIXED.fullmatch(text):
        whole, top, bottom = (int(part) for part in match.groups()[1:] if part is not None)
        return Number(_sign(match[1]) * (whole + Fraction(top, bottom))) if bottom else None
    if match := _RECURRING.fullmatch(text):
        sign, whole, fixed, repeated = match.groups()
        value = Fraction(int(repeated), 10 ** len(repeated) - 1) / 10 ** len(fixed)
        return Number(_sign(sign) * (_exact(f"{whole or 0}.{fixed}") + value))
    if match := _POWER.fullmatch(text):
        return Number(Fraction(_sign(match[1]) * int(match[2]) ** int(match[3] or match[4])))
    return None


def same_number(a: Number, b: Number) -> bool:
    """Equal exactly, up to floating point, or one a fraction and the other its rounding to 6 places or more.

    A percentage equals both its own figure and its value: 10% is 10 where percent was asked for, and 0.1.
    """
    if a.percent != b.percent:
        percent, plain = (a, b) if a.percent else (b, a)
        scaled = Number(percent.value / 100, None if percent.places is None else percent.places + 2)
        return same_number(Number(percent.value, percent.places, whole=percent.whole), plain) or same_number(
            scaled, plain
        )
    difference = abs(a.value - b.value)
    if not difference:
        return True
    if a.whole and b.whole:
        return False
    if difference <= _RELATIVE_TOLERANCE * max(abs(a.value), abs(b.value)):
        return True
    if a.places is None and b.places is not None:
        return is_rounding(b, a.value)
    return b.places is None and a.places is not None and is_rounding(a, b.value)


def is_rounding(decimal: Number, exact: Fraction | float) -> bool:
    """Whether ``decimal`` is ``exact`` correctly rounded, and to enough places to say so."""
    places = decimal.places
    if places is None or places < _MIN_ROUNDED_PLACES:
        return False
    if abs(decimal.value) < Fraction(10) ** (_MIN_ROUNDED_DIGITS - 1 - places):
        return False
    slack = Fraction(1, 10**12) * abs(decimal.value)  # an exact value that came through binary floating point
    return abs(decimal.value - Fraction(exact)) <= Fraction(1, 2) / Fraction(10) ** places + slack


def lenient_same(a: float, b: float) -> bool:
    """The Qwen2.5-Math harness's test: ``a`` within 1e-4 of ``b``, 100 ``b`` or ``b`` / 100 (DFT's evaluation)."""
    return any(math.isclose(a, other, rel_tol=_LENIENT_TOLERANCE) for other in (b, b * 100, b / 100))


def as_float(number: Number) -> float:
    """The value as a float; infinity where it does not fit."""
    try:
        return float(number.value)
    except OverflowError:
        return math.copysign(math.inf, number.value)
