r"""The rules that decide most answers without a computer algebra system: equal strings, exact numbers, words.

Each returns ``True`` (correct), ``False`` (wrong) or ``None`` (not its case; ask the next, and math-verify last).
Nothing here evaluates an expression, so no input can make it slow: patterns are linear and numbers are bounded.
"""

import re
from fractions import Fraction

from verl_dft.grading.normalize import assigned_value, normalize, strip_unit, unwrap_text

# Longest text read as a number and largest power of ten, so that a number in the text cannot become a huge integer.
_MAX_NUMBER_CHARS = 64
_MAX_EXPONENT = 400
# A decimal counts as a rounded fraction only from this many places on: 0.333333 is a third, 0.3333 is not.
_MIN_ROUNDED_PLACES = 6
_RELATIVE_TOLERANCE = Fraction(1, 10**9)

_DECIMAL = r"[+-]?(?:\d+(?:,\d{3})*(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(rf"({_DECIMAL})(?:e([+-]?\d+)|(?:\\times|\\cdot|\*|x)10\^(?:\{{([+-]?\d+)\}}|([+-]?\d)))?")
_FRACTION = re.compile(rf"([+-]?)(?:\\frac\{{({_DECIMAL})\}}\{{({_DECIMAL})\}}|\\frac(\d)(\d)|(\d+)/(\d+))")
_WORD = re.compile(r"[A-Za-z][A-Za-z' -]*")
_INTERVAL_ENDS = re.compile(r"[(\[].*,.*[)\]]", re.DOTALL)
_CHOICE = re.compile(r"\(?([A-Za-z])\)?(?:[.:)].*)?", re.DOTALL)


def quick_verdict(answer: str, gold: str, answer_type: str = "auto") -> tuple[bool | None, str]:
    """Compare ``answer`` with ``gold`` by the cheap rules.

    Args:
        answer: an extracted answer, as ``extract_answer`` gives it.
        gold: the reference answer.
        answer_type: ``auto``, ``number``, ``latex``, ``choice``, ``text`` or ``multi``.

    Returns:
        (verdict, rule): the verdict is None where no rule applies.
    """
    a, g = normalize(answer), normalize(gold)
    if a == g:
        return True, "string"
    if answer_type == "choice":
        return _choice(a) == _choice(g), "choice"
    if answer_type == "text" or (answer_type == "auto" and is_text(gold)):
        return unwrap_text(answer).casefold() == unwrap_text(gold).casefold(), "text"
    gold_number = parse_number(g)
    if gold_number is not None:
        answer_number = parse_number(a)
        if answer_number is None:
            answer_number = parse_number(strip_unit(assigned_value(a)))
        if answer_number is not None:
            return same_number(answer_number, gold_number), "number"
    if _INTERVAL_ENDS.fullmatch(a) and _INTERVAL_ENDS.fullmatch(g) and (a[0], a[-1]) != (g[0], g[-1]):
        return False, "interval_ends"
    return None, ""


def parse_number(text: str) -> tuple[Fraction, int | None] | None:
    """(exact value, decimal places as written; None for a fraction), or None where ``text`` is not one plain number."""
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    if match := _FRACTION.fullmatch(text):
        sign, *parts = match.groups()
        top, bottom = (part for part in parts if part is not None)
        numerator, denominator = _fraction(top), _fraction(bottom)
        return ((-1 if sign == "-" else 1) * numerator / denominator, None) if denominator else None
    if match := _NUMBER.fullmatch(text):
        exponent = int(next((e for e in match.groups()[1:] if e is not None), "0"))
        if abs(exponent) > _MAX_EXPONENT:
            return None
        places = len(match[1].partition(".")[2])
        return _fraction(match[1]) * Fraction(10) ** exponent, places - exponent
    return None


def _fraction(decimal: str) -> Fraction:
    return Fraction(decimal.replace(",", "").rstrip(".") or "0")


def same_number(a: tuple[Fraction, int | None], b: tuple[Fraction, int | None]) -> bool:
    """Equal exactly or to 1e-9, or one is a fraction and the other its correct rounding to 6 places or more."""
    difference = abs(a[0] - b[0])
    if difference <= _RELATIVE_TOLERANCE * max(abs(a[0]), abs(b[0])):
        return True
    for places, other in ((a[1], b[1]), (b[1], a[1])):
        if places is not None and other is None and places >= _MIN_ROUNDED_PLACES:
            return difference <= Fraction(1, 2 * 10**places)
    return False


def is_text(gold: str) -> bool:
    r"""Whether a gold is words: wrapped in ``\text``, or a run of three letters or more without any mathematics.

    Words must not reach the algebra system, which reads them as products of symbols, so that any anagram would pass.
    """
    words = unwrap_text(gold)
    wrapped = words != normalize(gold) and "text" in gold
    if not _WORD.fullmatch(words):
        return False
    return wrapped or words.casefold() == "no" or any(len(w) >= 3 for w in re.split(r"[' -]+", words))


def _choice(text: str) -> str:
    match = _CHOICE.fullmatch(unwrap_text(text))
    return match[1].upper() if match else text.strip()
