r"""Spelling differences of LaTeX answers that never change their meaning, removed before anything is compared."""

import re

_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "π": r"\pi ", "∞": r"\infty ", "\u00a0": " ", "≈": ""}
)
_REMOVED = re.compile(r"\\(?:[,;:!> ]|quad|qquad|left|right|displaystyle|approx|limits)(?![A-Za-z])|~|\$|\\\$")
_FRACTION_NAMES = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_BARE_FRACTION = re.compile(r"\\frac(\d)(\d)(?!\d)")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname|mbox)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?:\^\{?\\circ\}?|°|\\(?:text|mathrm|mbox)\{[^{}]*\}(?:\^\{?-?\d\}?)?|[a-zA-Z][/ ]*\.?)+$")
_ASSIGNED = re.compile(r"[A-Za-z]\w*(?:\([A-Za-z]\))?=")
_E_NOTATION = re.compile(r"(?<![A-Za-z])(\d+(?:\.\d*)?)[eE]([+-]?\d+)(?![A-Za-z\d])")
_THOUSANDS = re.compile(r"(?<=\d)\{,\}(?=\d)|(?<=\d),\\!(?=\d{3})")


def normalize(text: str) -> str:
    r"""``text`` without dollars, spaces, sizing commands and a final full stop; one spelling of ``\frac`` and minus.

    >>> normalize(r"$\left( 3, \dfrac{1}{2} \right).$")
    '(3,\\frac{1}{2})'
    """
    text = _THOUSANDS.sub(",", text.translate(_UNICODE))
    text = _FRACTION_NAMES.sub(r"\\frac", _REMOVED.sub("", text))
    text = re.sub(r"\s+", "", text) if "\\text" not in text else re.sub(r"\s+", " ", text).strip()
    text = _BARE_FRACTION.sub(r"\\frac{\1}{\2}", text.strip("*"))
    if re.fullmatch(r"\\(?:text|mathrm)\{[^{}]*\}", text):
        text = text[text.index("{") + 1 : -1].strip()
    return text.rstrip(".").strip()


def unwrap_text(text: str) -> str:
    r"""The words of ``\text{...}``, without wrapper, dollars, brackets around a single letter or full stop."""
    text = _TEXT.sub(r"\1", text.replace("$", "").replace("~", " "))
    text = re.sub(r"\\[,;:! ]", " ", text)
    text = re.sub(r"\s+", " ", text).strip().rstrip(".").strip()
    return text[1:-1] if re.fullmatch(r"\([A-Za-z]\)", text) else text


def assigned_value(text: str) -> str:
    """``x=5`` to ``5``; anything else unchanged. ``text`` is normalised."""
    match = _ASSIGNED.match(text)
    return text[match.end() :] if match and text.count("=") == 1 else text


def strip_unit(text: str) -> str:
    r"""``5\text{ cm}`` to ``5``; also degrees and plain words behind a number. ``text`` is normalised."""
    return _UNIT.sub("", text).strip() if text[:1] in "+-." or text[:1].isdigit() or text[:2] == "\\f" else text


def for_math_verify(text: str) -> str:
    r"""``text`` as LaTeX that math-verify reads: e-notation becomes ``\times 10^{n}``, which it otherwise rejects."""
    text = _E_NOTATION.sub(r"\1 \\times 10^{\2}", text.translate(_UNICODE))
    return _THOUSANDS.sub(",", text).strip("$* ")
