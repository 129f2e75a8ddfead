r"""Finding the final answer in a response.

Order of the rules, first hit wins:

1. the content of the last ``\boxed{...}`` or ``\fbox{...}`` with balanced braces (``\boxed 5`` takes one token). A
   last box that is empty or never closed is *no answer*: an earlier box was superseded, and a cut-off text has none.
   Where several values are asked for, boxes joined by a comma, "and" or "or" are one answer;
2. the last ``<answer>...</answer>``, or the last line of the form ``#### answer`` (GSM8K);
3. what follows the last "answer is", "answer:" or "answer =" (or its like in six languages), up to the end of the line
   or sentence;
4. a last line that is nothing but a formula, a number or a choice letter.
"""

import re

from verl_dft.grading.normalize import closing_brace

_BOX = re.compile(r"(?:\\(?:boxed|fbox)(?![A-Za-z])|(?<![A-Za-z\\])boxed(?=\{))\s*")
_BARE_BOX = re.compile(r"\$?(-?[\w.]{1,100})")
_BOX_JOINT = re.compile(r"[\s$.\\()]*(?:,|;|(?:\\text\s*\{\s*)?\b(?:and|or)\b\s*\}?)[\s$\\(]*(?:[a-z]\s*=\s*)?")
_MAX_BOXES, _MAX_JOINT = 16, 40

_ANSWER = re.compile(
    r"(?:answers?|solution|result|option|choice)\b[^.\n:=$\\]{0,40}?"
    r"(?:\b(?:is|are|be|equals?)\b[ \t]{0,9}"
    r"(?:then|thus|therefore|simply|just|about|approximately|equal to|given by)?\s*:?"
    r"|:|=)\s*"
    r"|(?:答案|答)(?:是|为|：|:)+\s*|respuesta(?: final)?(?: es|:)\s*|r[ée]ponse(?: finale)?(?: est|\s?:)\s*"
    r"|antwort(?: ist| lautet|:)\s*|ответ(?: —| -|:)?\s*",
    re.IGNORECASE,
)
# Words that name the answer for certain; "the result is" is used for intermediate results as well.
_FIRM = re.compile(r"answer|答|respuesta|r[ée]ponse|antwort|ответ|option|choice", re.IGNORECASE)
# A full stop ends the answer unless a digit follows (3.5) or it closes an abbreviation (P.M.).
_SENTENCE_END = re.compile(r"(?<!\.[A-Za-z])[.。](?![\dA-Za-z])|\n")
_ENVIRONMENT = re.compile(
    r"\$\$(.{1,4000}?)\$\$|\$([^$]{1,4000})\$|\\\((.{1,4000}?)\\\)|\\\[(.{1,4000}?)\\\]", re.DOTALL
)
_BOLD = re.compile(r"\*\*([^*\n]{1,400})\*\*")
_JOINT = re.compile(r"\s{0,9}(?:,?\s{0,9}\b(?:and|or)\b|,)\s{0,9}")
_MARKS = " \t\r\n*:`_>"

_LAST_NUMBER_LINE = re.compile(
    r"(?:[A-Za-z]\w?\s?=\s?)?[$]?[+-]?"
    r"(?:\d[\d,./]*|\.\d+|\\(?:frac|sqrt)\{[^{}]{1,40}\}(?:\{[^{}]{1,40}\})?)\s?%?[A-Za-z ]{0,20}"
)
_LAST_CHOICE_LINE = re.compile(r"\(?[A-J]\)?|\(?[A-J][.):] .{0,300}")


def extract_answer(response: str, several: bool = False) -> str | None:
    r"""The final answer of ``response``, stripped, or None. ``several``: the gold has more than one value.

    >>> extract_answer(r"so \boxed{ 16 }, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> extract_answer("The answer is $480$.")
    '480'
    """
    boxes = list(_BOX.finditer(response))
    if boxes:
        return _boxed(response, boxes if several else boxes[-1:]) or None
    end = response.rfind("</answer>")
    start = response.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0 and (inner := response[start + len("<answer>") : end].strip()):
        return inner
    at = response.rfind("####")
    if at >= 0 and (at == 0 or response[at - 1] == "\n"):
        line = response[at + 4 :].strip("\n").partition("\n")[0].strip()
        if line:
            return line
    phrases = list(_ANSWER.finditer(response))
    phrases = [match for match in phrases if _FIRM.match(match[0])] or phrases
    if phrases:
        return _phrase(response[phrases[-1].end() :]) or None
    return _last_line(response)


def _boxed(text: str, boxes: list[re.Match[str]]) -> str:
    """The last box, with the boxes before it that a comma, "and" or "or" joins to it."""
    content, _ = _box_content(text, boxes[-1].end())
    parts, start = [content], boxes[-1].start()
    if not content:
        return ""
    for box in reversed(boxes[-_MAX_BOXES:-1]):
        earlier, end = _box_content(text, box.end())
        if not earlier or not 0 <= start - end <= _MAX_JOINT or not _BOX_JOINT.fullmatch(text, end, start):
            break
        parts.append(earlier)
        start = box.start()
    return ", ".join(reversed(parts))


def _box_content(text: str, start: int) -> tuple[str, int]:
    """The group that opens at ``start`` and where it ends; empty where it never does. A nested box comes last."""
    if text[start : start + 1] != "{":
        token = _BARE_BOX.match(text, start)
        return (token[1].rstrip("."), token.end()) if token else ("", start)
    end = closing_brace(text, start)
    return (text[start + 1 : end].strip(), end + 1) if end >= 0 else ("", start)


def _phrase(rest: str) -> str:
    rest = rest[:20_000].lstrip(_MARKS)
    environment = _ENVIRONMENT.match(rest)
    if not environment:
        end = _SENTENCE_END.search(rest)
        line = (rest[: end.start()] if end else rest).strip().strip(_MARKS)
        inner = _ENVIRONMENT.match(line)
        return line if not inner else inner[0].strip("$")
    parts, position = [_group(environment)], environment.end()
    while len(parts) < _MAX_BOXES and (joint := _JOINT.match(rest, position)):
        following = _ENVIRONMENT.match(rest, joint.end())
        if not following:
            break
        parts.append(_group(following))
        position = following.end()
    return ", ".join(parts)


def _group(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None).strip()


def _last_line(response: str) -> str | None:
    """The last line if it is an answer and nothing else."""
    tail = response[-4000:].rstrip()
    environment = None
    if tail.endswith(("$$", "\\]")):
        opening = tail.rfind("$$", 0, -2) if tail.endswith("$$") else tail.rfind("\\[")
        environment = tail[opening + 2 : -2] if opening >= 0 else None
    line = (tail if environment is None else environment).rpartition("\n")[2].strip()
    if environment is not None:
        return environment.strip() or None
    bold = _BOLD.fullmatch(line)
    line = (bold[1] if bold else line).strip(_MARKS).rstrip(".")
    match = _ENVIRONMENT.fullmatch(line)
    if match:
        return _group(match)
    return line if _LAST_NUMBER_LINE.fullmatch(line) or _LAST_CHOICE_LINE.fullmatch(line) else None


def qwen_answer(response: str) -> str | None:
    """What the Qwen2.5-Math harness falls back on where nothing is marked as the answer: the last number."""
    numbers = re.findall(r"-?\d[\d,]*\.?\d*", response[-4000:])
    return numbers[-1].replace(",", "").rstrip(".") if numbers else None
