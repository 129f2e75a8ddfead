r"""Finding the final answer in a response.

Order of the rules, first hit wins:

1. the content of the last ``\boxed{...}`` or ``\fbox{...}`` with balanced braces (``\boxed 5`` takes one token). A
   last box that is empty or never closed is *no answer*: an earlier box was superseded, and a cut-off text has none;
2. the last line of the form ``#### answer`` (GSM8K);
3. what follows the last "answer is", "answer:" or "answer =", up to the end of the line or sentence.
"""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_HASHES = re.compile(r"^####[ \t]*(.+?)[ \t]*$", re.MULTILINE)
_ANSWER = re.compile(r"answer\s*(?:is\s*:?|:|=)\s*", re.IGNORECASE)
# A full stop ends the answer unless a digit follows (3.5); a mathematical environment is taken whole.
_SENTENCE_END = re.compile(r"\.(?!\d)|\n")
_ENVIRONMENT = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|\*\*(.+?)\*\*", re.DOTALL)


def extract_answer(response: str) -> str | None:
    r"""The final answer of ``response``, stripped, or None.

    >>> extract_answer(r"so \boxed{ 16 }, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> extract_answer("The answer is $480$.")
    '480'
    """
    boxes = list(_BOX.finditer(response))
    if boxes:
        return _box_content(response, boxes[-1].end()) or None
    hashes = _HASHES.findall(response)
    if hashes:
        return hashes[-1]
    phrases = list(_ANSWER.finditer(response))
    return _phrase(response[phrases[-1].end() :]) or None if phrases else None


def _box_content(text: str, start: int) -> str:
    """The balanced group that opens at ``start``; a nested box is unwrapped by taking the innermost, which is last."""
    if start >= len(text):
        return ""
    if text[start] != "{":
        token = re.match(r"\$?(-?[\w.]+)", text[start:])
        return token[1].rstrip(".") if token else ""
    depth, position = 0, start
    while position < len(text):
        character = text[position]
        if character == "\\":  # an escaped brace does not count
            position += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start + 1 : position].strip()
        position += 1
    return ""


def _phrase(rest: str) -> str:
    environment = _ENVIRONMENT.match(rest)
    if environment:
        return next(group for group in environment.groups() if group is not None).strip()
    end = _SENTENCE_END.search(rest)
    return (rest[: end.start()] if end else rest).strip().strip("*:").strip()
