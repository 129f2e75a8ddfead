"""Made-up responses and golds for the grader, and what must hold of the grades.

A case is a function of its seed alone. Of most it is known by construction whether the answer is right; of the rest,
noise, that a verdict is reached at all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from verl_dft.grading import VERDICTS, Grade, GradeItem, GraderPool
from verl_dft.grading.extract import extract_answer
from verl_dft.grading.pool import ANSWER_TYPES
from verl_dft.grading.quick import quick_judge

MOST_CPU_S = 1.0
"""Of the process that asks, for one item: what it does itself nothing can interrupt."""
_JUNK = (
    "", " ", "\n", "Let x be the number.", "First, $2 + 3 = 5$.", "<|im_end|>", "\x00", "\ud800", "🙂" * 3, "\u202e",
    "So ", "**Step 1**\n", "\\[ x^2 + 1 \\]", "\\frac{", "{", "}", "$", "(", "<answer", "\u2028", "e\u0301", "and ",
    "1,", "It is not 7. ", "\\text{", "&&", "####", "\t", "\\\\", "答案", "answer", "\ufeff", "\r\n", "\x1b[31m",
)  # fmt: skip
_TOKENS = (
    "\\frac", "{", "}", "\\sqrt", "\\boxed{", "x", "2", "^", "_", "\\pm", "(", ")", "[", "]", ",", "=", "<",
    "\\text{", "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "\\infty", "\\cup", "10", "e5", "!", "\\left",
    "\\right", "%", "\\circ", " or ", " and ", "\\le", "3.5", "|", "\\{", "-", "+", "*", "/", "\\sin", "\\pi", "\n",
    "\x00", "π", "\ud800", "9" * 50, "🙂", "\\binom", "\\int", "\\sum", "\\log", "i", "'", "\"", "\u00a0", "½", "٣",
    "\\%", "\\mathbf{", "#### ", "The answer is ", "</answer>", "<answer>", "$", "$$", "\\(", "\\)",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is graded, what kind of case it is, and the verdict it must have (None: any)."""

    item: GradeItem
    kind: str
    verdict: str | None


def make(chance: random.Random) -> Case:
    """A case, by the random numbers given."""
    (kind,) = chance.choices(list(_KINDS), _SHARES)
    return _KINDS[kind](chance, kind)


# ---- golds, each with another of the same form and another value ----


def _number(chance: random.Random) -> tuple[str, str]:
    value = chance.choice([chance.randint(-50, 50), chance.randint(-(10**6), 10**6), chance.randint(10**11, 10**12)])
    return str(value), str(value + chance.choice([-3, -1, 1, 2]) * chance.choice([1, 1 + abs(value) // 7]))


def _decimal(chance: random.Random) -> tuple[str, str]:
    value = chance.randint(-9999, 9999)
    sign, other = ("-" if value < 0 else ""), abs(value) + chance.randint(100, 900)
    return f"{sign}{abs(value) // 100}.{abs(value) % 100:02d}", f"{sign}{other // 100}.{other % 100:02d}"


def _fraction(chance: random.Random) -> tuple[str, str]:
    below = chance.choice([3, 7, 11, 13])
    above = chance.choice([n for n in range(1, 40) if n % below])
    return f"\\frac{{{above}}}{{{below}}}", f"\\frac{{{above + chance.randint(1, 5) * below}}}{{{below}}}"


def _root(chance: random.Random) -> tuple[str, str]:
    under, before = chance.choice([2, 3, 5, 7, 11]), chance.randint(2, 9)
    return f"{before}\\sqrt{{{under}}}", f"{before + 1}\\sqrt{{{under}}}"


def _several(left: str, right: str) -> Callable[[random.Random], tuple[str, str]]:
    def make_one(chance: random.Random) -> tuple[str, str]:
        low = chance.sample(range(-30, 30), chance.choice([2, 2, 3]))
        low = low if (left, right) in (("(", ")"), ("\\{", "\\}")) else sorted(low[:2])
        other = [*low[:-1], low[-1] + 61]
        return tuple(f"{left}{','.join(map(str, values))}{right}" for values in (low, other))  # type: ignore[return-value]

    return make_one


def _polynomial(chance: random.Random) -> tuple[str, str]:
    a, b, c = chance.randint(2, 9), chance.randint(2, 9), chance.randint(1, 9)
    return f"{a}x^2+{b}x+{c}", f"{a}x^2+{b}x+{c + 1}"


def _letter(chance: random.Random) -> tuple[str, str]:
    one, other = chance.sample("ABCDE", 2)
    return one, other


def _words(chance: random.Random) -> tuple[str, str]:
    one, other = chance.sample(["Tuesday", "Friday", "parabola", "circle", "even", "Alice", "no solution"], 2)
    return one, other


_GOLDS = (
    _number, _number, _decimal, _fraction, _root, _several("(", ")"), _several("[", ")"), _several("\\{", "\\}"),
    _polynomial, _letter, _words,
)  # fmt: skip


# ---- kinds ----


def _before(chance: random.Random) -> str:
    return "".join(chance.choice(_JUNK) for _ in range(chance.randint(0, 5)))


def _after(chance: random.Random) -> str:
    return chance.choice(["", ".", "\n", " Done.", "$", "\n\nI hope it is correct.", " 🙂", "\x00", "\ud800", "}"])


def _type(chance: random.Random) -> str:
    return chance.choice(ANSWER_TYPES) if chance.random() < 0.2 else "auto"


def _itself(chance: random.Random, kind: str) -> Case:
    gold, _ = chance.choice(_GOLDS)(chance)
    response = f"{_before(chance)}\\boxed{{{gold}}}{_after(chance)}"
    return Case(GradeItem(response, gold, _type(chance)), kind, "correct")


def _respelt(chance: random.Random, kind: str) -> Case:
    gold, _ = chance.choice(_GOLDS)(chance)
    answer = gold
    for old, new in (("\\frac", "\\dfrac"), ("(", "\\left("), (")", "\\right)"), (",", ", "), ("x^2", "x^{2}")):
        if chance.random() < 0.5:
            answer = answer.replace(old, new)
    answer = chance.choice([answer, f" {answer} ", f"${answer}$", f"{answer}."])
    return Case(GradeItem(f"{_before(chance)}\\boxed{{{answer}}}", gold), kind, "correct")


def _another(chance: random.Random, kind: str) -> Case:
    gold, other = chance.choice(_GOLDS)(chance)
    return Case(GradeItem(f"{_before(chance)}\\boxed{{{other}}}{_after(chance)}", gold), kind, "wrong")


def _superseded(chance: random.Random, kind: str) -> Case:
    gold, other = chance.choice(_GOLDS)(chance)
    return Case(GradeItem(f"\\boxed{{{gold}}} No: {_before(chance)} it is\n\\boxed{{{other}}}", gold), kind, "wrong")


def _cut_off(chance: random.Random, kind: str) -> Case:
    gold, _ = chance.choice(_GOLDS)(chance)
    return Case(GradeItem(f"\\boxed{{{gold}}}, that is \\boxed{{{gold}", gold), kind, "no_answer")


def _noise(chance: random.Random, kind: str) -> Case:
    text = "".join(chance.choice(_TOKENS) for _ in range(chance.randint(0, 24)))
    golds = [chance.choice(_GOLDS)(chance)[0], text, "".join(chance.choice(_TOKENS) for _ in range(4))]
    response = chance.choice([f"\\boxed{{{text}}}", f"The answer is {text}", text, f"{text}\n#### {text}"])
    return Case(GradeItem(response, chance.choice(golds), _type(chance), chance.choice([None, None, 0.1])), kind, None)


def _repeated(chance: random.Random, kind: str) -> Case:
    unit = "".join(chance.choice(_TOKENS) for _ in range(chance.randint(1, 3)))
    text = unit * chance.choice([50, 500, 3000])
    response = chance.choice([f"\\boxed{{{text}}}", f"The answer is {text}", text])
    return Case(GradeItem(response, chance.choice(_GOLDS)(chance)[0], _type(chance)), kind, None)


_KINDS: dict[str, Callable[[random.Random, str], Case]] = {
    "itself": _itself,
    "respelt": _respelt,
    "another": _another,
    "superseded": _superseded,
    "cut off": _cut_off,
    "noise": _noise,
    "repeated": _repeated,
}
_SHARES = (15, 15, 15, 10, 10, 34, 1)  # the last ones cost seconds each: many must be stopped


# ---- what must hold ----


def graded(cases: Sequence[Case], pool: GraderPool) -> Iterator[tuple[Case, Grade, str]]:
    """Grade the cases; each with its grade and with what is wrong about it (nothing, mostly)."""
    slow = [_too_slow_here(case) for case in cases]
    start = time.monotonic()
    grades = pool.grade([case.item for case in cases])
    seconds = time.monotonic() - start
    assert len(grades) == len(cases)
    lost = sum(grade.verdict in ("timeout", "error") for grade in grades)
    limit = len(cases) * MOST_CPU_S + (lost + 1) * (3 * pool.timeout_s + 60)
    whole = f"{seconds:.0f} s for {len(cases)} cases" if seconds > limit else ""
    for case, grade, why in zip(cases, grades, slow, strict=True):
        found = why or whole or _wrong(case, grade)
        yield case, grade, f"{found}: {case} {grade}" if found else ""


def _too_slow_here(case: Case) -> str:
    start = time.thread_time()
    answer = extract_answer(case.item.response, several=True)
    if answer is not None:
        quick_judge(answer, case.item.gold, case.item.answer_type)
    used = time.thread_time() - start
    return f"{used:.1f} s in the calling process" if used > MOST_CPU_S else ""


def _wrong(case: Case, grade: Grade) -> str:
    if grade.verdict not in VERDICTS or grade.qwen not in VERDICTS:
        return "no such verdict"
    if case.verdict not in (None, grade.verdict):
        return f"not {case.verdict}"
    if grade.verdict == "correct" and grade.qwen != "correct":
        return "right, and wrong where more is allowed"
    if (grade.answer is None) != (grade.rule in ("extract", "empty_gold")):
        return "an answer that is none"
    return ""
