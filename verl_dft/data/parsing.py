r"""From a raw record of a public set (or the normalised form of it) to a :class:`Problem`.

A parser gets the set's label, the row number and the record, and returns None where the record has no question or no
solution (counted and reported by the caller).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_dft.data.records import Problem, text_of
from verl_dft.errors import InputError

ANSWER_FORMATS = ("boxed", "hash", "none")
MATH_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def last_boxed(text: str) -> str:
    r"""Content of the last ``\boxed{…}`` (or ``\fbox{…}``) with balanced braces; ``""`` where there is none."""
    for match in reversed(list(_BOX.finditer(text))):
        depth, at = 1, match.end()
        while at < len(text) and depth:
            if text[at] == "\\":
                at += 1  # an escaped brace is text
            elif text[at] in "{}":
                depth += 1 if text[at] == "{" else -1
            at += 1
        if not depth:
            return text[match.end() : at - 1].strip()
    return ""


def numinamath_cot(label: str, index: int, record: Mapping[str, Any]) -> Problem | None:
    """``problem, solution, source`` as on the hub; the answer is the solution's last box (none for a proof)."""
    question, solution = (_text(label, index, record, key) for key in ("problem", "solution"))
    if not question.strip() or not solution.strip():
        return None
    origin = str(record.get("source") or "")
    source = f"numinamath_cot/{origin}" if origin else "numinamath_cot"
    return Problem(_id(label, index, record, "numinamath_cot"), question, last_boxed(solution), solution, source=source)


def gsm8k(label: str, index: int, record: Mapping[str, Any], answer_format: str = "boxed") -> Problem | None:
    r"""``question, answer`` as on the hub (``worked solution\n#### 72``), or normalised ``problem, answer, solution``.

    The calculator notes ``<<48/2=24>>`` are removed. The training target ends with the final answer, because the
    solution text alone does not say which number it is: ``boxed`` appends ``The answer is \boxed{72}.``, which graders
    read, ``hash`` the original ``#### 72``, ``none`` nothing.
    """
    if "question" in record:
        question = _text(label, index, record, "question")
        worked, mark, answer = _text(label, index, record, "answer").rpartition("####")
        if not mark:
            raise InputError(f"{label}: row {index}: column 'answer' has no '#### final answer'; is this GSM8K?")
    else:
        question, answer = (_text(label, index, record, key) for key in ("problem", "answer"))
        worked = _text(label, index, record, "solution")
    worked, answer = _CALCULATOR.sub("", worked).strip(), answer.strip().replace(",", "")
    if not question.strip() or not worked:
        return None
    final = {"boxed": f"\nThe answer is \\boxed{{{answer}}}.", "hash": f"\n#### {answer}", "none": ""}[answer_format]
    return Problem(_id(label, index, record, "gsm8k"), question.strip(), answer, worked + final, source="gsm8k")


def competition_math(label: str, index: int, record: Mapping[str, Any]) -> Problem | None:
    """``problem, solution, level`` as on the hub, or normalised with ``answer``; else the answer is the last box."""
    question, solution = (_text(label, index, record, key) for key in ("problem", "solution"))
    if not question.strip() or not solution.strip():
        return None
    given = record.get("answer")
    answer = last_boxed(solution) if given is None else text_of(f"{label}: row {index}", "answer", given)
    digits = re.search(r"\d+", str(record.get("level") or ""))
    level = int(digits[0]) if digits else None
    return Problem(_id(label, index, record, "math"), question, answer, solution, source="math", level=level)


def user_file(label: str, index: int, record: Mapping[str, Any], keys: Mapping[str, str]) -> Problem:
    """A record of the user's own file; an empty text is an error there, since nobody asked to drop rows.

    Args:
        keys: column names of ``id``, ``problem``, ``answer``, ``solution``; only ``problem`` must exist.
    """
    question = _text(label, index, record, keys["problem"], "data.source.problem_key")
    values = {k: record.get(keys[k]) for k in ("answer", "solution")}
    where = f"{label}: row {index}"
    values = {k: None if v is None else text_of(where, keys[k], v) for k, v in values.items()}
    solution = values["solution"]
    for column, text in ((keys["problem"], question), (keys["solution"], solution)):
        if text is not None and not text.strip():
            raise InputError(f"{where}: column {column!r} is empty; drop the row or give it a text")
    answer = last_boxed(solution or "") if values["answer"] is None else values["answer"]
    name = Path(label).name.split(".")[0]
    return Problem(
        _id(label, index, record, name, keys["id"]),
        question,
        answer,
        solution,
        _teacher_solutions(label, index, record),
        name,
        _level(record.get("level")),
    )


def _teacher_solutions(label: str, index: int, record: Mapping[str, Any]) -> list[str] | None:
    texts = record.get("teacher_solutions")
    if texts is None:
        return None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{label}: row {index}: column 'teacher_solutions' must be a list of texts")
    return texts


def _level(value: Any) -> int | None:
    """The number in ``3``, ``"3"`` or ``"Level 3"``; anything else has no level. It only orders statistics."""
    digits = re.search(r"\d+", str(value)) if isinstance(value, int | str) else None
    return int(digits[0]) if digits else None


def _text(label: str, index: int, record: Mapping[str, Any], key: str, option: str = "") -> str:
    if key not in record:
        have = ", ".join(map(str, record)) or "none"
        advice = f"set {option}=NAME" if option else "is this the right file?"
        raise InputError(f"{label}: row {index}: no column {key!r} (columns: {have}); {advice}")
    return text_of(f"{label}: row {index}", key, record[key])


def _id(label: str, index: int, record: Mapping[str, Any], name: str, key: str = "id") -> str:
    if record.get(key) is None:
        return f"{name}/{index}"
    if not (found := text_of(f"{label}: row {index}", key, record[key])).strip():
        raise InputError(f"{label}: row {index}: column {key!r} is empty; give the row an id, or leave the column out")
    return found
