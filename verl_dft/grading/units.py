r"""Units, currency, degrees and percent behind a value: taken off before values are compared.

A unit never makes a value wrong unless both sides name one and the two are known to be different (cm for m).
"""

import re

_ALIASES = {
    "mm": "mm millimeter millimeters millimetre millimetres", "cm": "cm centimeter centimeters centimetre centimetres",
    "m": "m meter meters metre metres", "km": "km kilometer kilometers kilometre kilometres",
    "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yard yards", "mi": "mi mile miles",
    "mg": "mg milligram milligrams", "g": "g gram grams", "kg": "kg kilogram kilograms", "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces", "s": "s sec secs second seconds", "min": "min mins minute minutes",
    "h": "h hr hrs hour hours", "day": "day days", "week": "week weeks", "month": "month months", "year": "year years",
    "dollar": "dollar dollars usd", "cent": "cent cents", "ml": "ml milliliter milliliters", "l": "l liter liters",
    "mph": "mph", "degree": "degree degrees deg", "percent": "percent percents", "unit": "unit units",
    "rad": "rad radian radians",
}  # fmt: skip
_CANONICAL = {alias: unit for unit, aliases in _ALIASES.items() for alias in aliases.split()}
# Short ones that may stand right behind a formula without a space or a wrapper. A single letter is more often a
# variable in a gold (16 m^2), so it counts as a unit in answers only.
_BARE = "mm|cm|km|mg|kg|ft|lbs?|oz|ml|mL|mph|hr|min|sec|Hz|eV|erg|erg/s|Pa|kPa|mol|kJ|kW"
_LETTER = re.compile(r"(?<=\d) ?[mgsWNJK]$")

_POWER = r"(?:\^\s?(?:\{\s?(-?\d)\s?\}|(-?\d)))?"
_WRAPPED = re.compile(rf"\s?\\text\s?\{{([^{{}}]{{0,60}}(?:\{{-?\d\}}[^{{}}]{{0,20}})?)\}}\s?{_POWER}$")
_BARE_UNIT = re.compile(rf"(?<=[\d}}) ])(?<![A-Za-z\\] )(?<!\\)({_BARE})\s?{_POWER}$")
_PER = re.compile(
    rf"\s?\\frac\{{\s?\\text\s?\{{([^{{}}]{{0,30}})\}}\s?\}}\{{\s?\\text\s?\{{[^{{}}]{{0,30}}\}}\s?{_POWER}\}}$"
)
_DEGREES = re.compile(r"\s?\^\s?\\circ\s?(?:[CF]|\\text\s?\{\s?[CF]\s?\})?$")
_VALUE = r"\(?[+-]?\s?(?:\\frac\{[\d.,+-]+\}\{[\d.,]+\}|[\d.,]+(?:\s?\d+/\d+|/\d+|\s?\\frac\{\d+\}\{\d+\})?)\)?"
_NUMBER_WITH_WORDS = re.compile(
    rf"({_VALUE}(?:\s?(?:\\times|\\cdot|x)\s?10\s?\^\s?\{{?[+-]?\d+\}}?)?)"
    rf"\s([A-Za-z][A-Za-z .'/-]{{1,60}}?)\s?{_POWER}$"
)
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_NOT_UNITS = frozenset("or and hundred thousand million billion trillion mod choose if pi base".split())
_CURRENCY = re.compile(r"(?:\\text\s?\{\s?)?\\?\$\s?\}?|(?:USD|US|Rs\.?)\s?(?=\d)|\\text\s?\{\s?\}")
_TAIL = 160  # characters at the end in which a unit is looked for


def strip_unit(text: str, letters: bool = False) -> tuple[str, str]:
    r"""(value, unit) of a tidied ``text``; the unit is empty where there is none, and never the whole text.

    ``letters``: a single letter behind digits counts as a unit.

    >>> strip_unit(r"3\pi \text{ cm}^2")
    ('3\\pi', 'cm2')
    """
    if match := _CURRENCY.match(text):
        text = text[match.end() :].lstrip()
    head, tail = text[:-_TAIL], text[-_TAIL:]
    if (
        "^" in tail
        and not _TRIGONOMETRY.search(tail)
        and (match := _DEGREES.search(tail))
        and head + tail[: match.start()]
    ):
        return head + tail[: match.start()], "degree"
    units: list[str] = []
    while len(units) < 6 and (match := _WRAPPED.search(tail) or _BARE_UNIT.search(tail) or _PER.search(tail)):
        name, value = match[1].strip(), tail[: match.start()].rstrip()
        if not (head or value) or name in _NOT_UNITS or any(c in "=<>+*_" for c in name):
            break
        units.insert(0, _name(name, match[2] or match[3]))
        tail = value.removesuffix(r"\cdot").rstrip("/ ")
    if not units and not head and (match := _NUMBER_WITH_WORDS.fullmatch(tail)):
        if match[2].split()[0].strip(".").casefold() not in _NOT_UNITS:
            return match[1].strip(), _name(match[2], match[3] or match[4])
    if letters and not units and (match := _LETTER.search(tail)):
        return head + tail[: match.start()], match[0].strip().casefold()
    if not units and tail.endswith(")") and "(" in tail:  # 2(5\text{ cm})
        value, unit = strip_unit(head + tail[:-1])
        return (value + ")", unit) if unit else (head + tail, "")
    return head + tail, " ".join(units)


def _name(unit: str, power: str | None) -> str:
    unit = unit.strip(" .,").casefold()
    unit = unit.removeprefix("square ").removeprefix("cubic ")
    return _CANONICAL.get(unit, unit) + (power or "")


def units_differ(a: str, b: str) -> bool:
    """Whether both are single known units, and not the same one (powers apart: cm and cm² are not told apart)."""
    a, b = a.rstrip("0123456789-"), b.rstrip("0123456789-")
    return a in _ALIASES and b in _ALIASES and a != b and "unit" not in (a, b)
