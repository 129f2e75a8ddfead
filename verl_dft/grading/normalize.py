r"""One spelling for the many ways to write the same LaTeX, applied to both sides before anything is compared.

``tidy`` keeps spaces, which separate a number from its unit and words from each other; ``squeeze`` then removes those
that mean nothing. Every pattern here runs in time linear in the text: it sees model output before any worker does.
"""

import re

_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width forms of ASCII
_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "θ": "theta", "λ": "lambda", "μ": "mu",
    "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi", "ω": "omega", "Δ": "Delta", "Ω": "Omega",
}  # fmt: skip
_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∕": "/",
    "∞": r"\infty ", "±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ",
    "∩": r"\cap ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "∈": r"\in ", "≈": r"\approx ",
    "°": r"^\circ ", "º": r"^\circ ", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
    "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⟨": r"\langle ", "⟩": r"\rangle ", "∨": r"\text{ or }",
    "’": "'", "‘": "'", "′": "'", "“": '"', "”": '"', "、": ",", "。": ".", "£": "", "€": "", "¥": "", "\u200b": "",
    "\ufeff": "", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
}  # fmt: skip
_UNICODE = str.maketrans(_WIDE | {k: rf"\{v} " for k, v in _GREEK.items()} | _SYMBOLS)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_RAISED = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_UNICODE_ROOT = re.compile(r"√\s*(?:\{([^{}]*)\}|\(([^()]*)\)|(\d+|[A-Za-z]))")

_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,|\\!|\\ |,\s?\\ |\{\s\})(?=\d{3}(?!\d))")
# Commands that only set the size, the space or the weight of what is around them.
_SIZES = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|biggl|biggr|big|Big|bigg|Bigg|displaystyle|textstyle|limits|nolimits|mathstrut"
    r"|bf|rm|it|boldmath|strut|noindent|centering)(?![A-Za-z])"
)
_SPACES = re.compile(r"\\(?:quad|qquad|thinspace|enspace|space|hfill|newline)(?![A-Za-z])|\\[,;:! >]|~|\s+")
_FONTS = re.compile(r"\\(?:mathbf|boldsymbol|bold|bm|mathit|mathsf|textup|mathop|pmb|displaylines|ensuremath)\s*(?=\{)")
_TEXTS = re.compile(r"\\(?:textbf|textit|textrm|textsf|texttt|textnormal|emph|mathrm|operatorname|mbox|hbox)\s*(?=\{)")
# The imaginary unit, Euler's number and the differential, which some set upright: not units.
_LETTERS = re.compile(r"\\(?:mathrm|text|operatorname|rm)\s*\{\s*([ied])\s*\}")
_RENAMED = [
    (re.compile(rf"\\(?:{old})(?![A-Za-z])"), new)
    for old, new in {
        "dfrac|tfrac|cfrac|nicefrac|sfrac": r"\\frac", "dbinom|tbinom": r"\\binom", "leqslant|leq|leqq": r"\\le",
        "geqslant|geq|geqq": r"\\ge", "neq": r"\\ne", "lt": "<", "gt": ">", "varnothing|O": r"\\emptyset",
        "infin": r"\\infty", "lbrace": r"\\{", "rbrace": r"\\}", "lbrack": "[", "rbrack": "]", "lparen": "(",
        "rparen": ")", "colon": ":", "degree": r"^\\circ ", "lvert|rvert|vert|mid": "|", "bigcup": r"\\cup",
        "land|wedge": r"\\text{ and }", "lor|vee": r"\\text{ or }", "thickapprox|simeq|doteq": r"\\approx",
        "ldots|cdots|dotsc|dots": r"\\ldots", "mathds|Bbb": r"\\mathbb", "reals|Reals": r"\\mathbb{R}",
        "percent": "%", "ast": "*", "prime": "'", "imath": "i", "lang": r"\\langle", "rang": r"\\rangle", "equiv": "=",
    }.items()
]  # fmt: skip
_FRAC_ARGUMENTS = re.compile(r"\\frac\s*(?:(\d)\s*(\d|[A-Za-z])|(\d|[A-Za-z])\s*(?=\{)|(?=\{))")
_FRAC_LAST = re.compile(r"(\\frac\s*\{[^{}]*\})\s*(\d|[A-Za-z])")
_ROOT_ARGUMENT = re.compile(r"\\sqrt\s*(\d|[A-Za-z])")
_WHOLE_WRAPPER = re.compile(r"\\(?:text|mathrm|boxed|fbox|mathbb|mathcal)\s*(?=\{)")
_NEEDED_SPACE = re.compile(r"(\\[A-Za-z]+) (?=[A-Za-z])|(?<=\d) (?=\d)| ")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?: \d{3})+(?!\d)")
_EDGES = ' \t\r\n,;:*`"'
_MATH_MARKS = re.compile(r"\\[\[\]()](?![A-Za-z])|\\?\$")


def tidy(text: str) -> str:
    r"""``text`` in one spelling: ASCII symbols, no dollars or sizing, single spaces, braced arguments, no wrapper.

    >>> tidy(r"$\left( 3,\; \dfrac12 \right).$")
    '( 3, \\frac{1}{2} )'
    """
    if not text.isascii():
        text = _UNICODE_ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2] or m[3]}}}", text)
        text = _RAISED.sub(lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text).translate(_UNICODE)
    if "\\" in text or "{" in text:
        text = _THOUSANDS.sub(",", text)
        text = _SIZES.sub("", _MATH_MARKS.sub("", text.replace("\\\\", "\0")))
        for pattern, new in _RENAMED:
            text = pattern.sub(new, text)
        text = _TEXTS.sub(r"\\text", _FONTS.sub("", _LETTERS.sub(r"\1", text)))
        text = _FRAC_ARGUMENTS.sub(_brace_fraction, text)
        text = _ROOT_ARGUMENT.sub(r"\\sqrt{\1}", _FRAC_LAST.sub(r"\1{\2}", text))
        text = text.replace("^{\\circ}", "^\\circ ").replace("^{ \\circ }", "^\\circ ").replace("\\%", "%")
        text = text.replace("^{'}", "'").replace("^{''}", "''").replace("\\#", "#").replace("\\&", "&")
    text = _SPACES.sub(" ", text.replace("$", "")).replace("\0", "\\\\").replace("+\\infty", "\\infty")
    return unwrap(text)


def _brace_fraction(match: re.Match[str]) -> str:
    if match[1]:
        return rf"\frac{{{match[1]}}}{{{match[2]}}}"
    return rf"\frac{{{match[3]}}}" if match[3] else r"\frac"


def unwrap(text: str) -> str:
    r"""``text`` without punctuation at its ends and without ``\text{...}`` or braces around the whole of it."""
    for _ in range(6):
        before = text
        text = text.strip(_EDGES).rstrip(".")
        if text.endswith("\\") and not text.endswith("\\\\"):
            text = text[:-1]
        match = _WHOLE_WRAPPER.match(text)
        if match and match[0].startswith((r"\mathbb", r"\mathcal")):
            break
        start = match.end() if match else 0
        if text[start : start + 1] == "{" and closing_brace(text, start) == len(text) - 1:
            text = text[start + 1 : -1]
        text = text.removeprefix("=").removeprefix(r"\approx").removeprefix(r"\therefore")
        if text == before:
            break
    return text


def closing_brace(text: str, start: int) -> int:
    """Where the group that opens with the brace at ``start`` closes, or -1. Escaped braces do not count."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        if match[0] in "{}":
            depth += 1 if match[0] == "{" else -1
            if depth == 0:
                return match.start()
    return -1


def squeeze(text: str) -> str:
    r"""A tidied ``text`` without spaces, but for those between a command and a letter and between two numbers.

    >>> squeeze("10 000 + 2 \\pi r")
    '10000+2\\pi r'
    """
    text = _SPACED_THOUSANDS.sub(lambda m: m[0].replace(" ", ""), text)
    return _NEEDED_SPACE.sub(lambda m: m[0] if m[1] or _between_digits(m) else "", text)


def _between_digits(match: re.Match[str]) -> bool:
    before, after = match.string[match.start() - 1 : match.start()], match.string[match.end() : match.end() + 1]
    return before.isdigit() and after.isdigit()


_WORD_COMMAND = re.compile(r"\\(?:text|mathrm)\s*")
_NOT_IN_WORDS = re.compile(r"[.,;!?'\"(){}$*`\\]+|:(?!\d)")


def words(text: str) -> str:
    r"""``text`` as words to compare: no case, wrappers, punctuation, article in front or repeated space.

    >>> words(r"\text{The  Graph.}")
    'graph'
    """
    text = _WORD_COMMAND.sub("", tidy(_WORD_COMMAND.sub(" ", text)))
    text = _NOT_IN_WORDS.sub("", text.replace("-", " ")).casefold()
    text = " ".join(text.split())
    for article in ("the ", "a ", "an "):
        if text.startswith(article) and len(text) > len(article):
            return text[len(article) :]
    return text
