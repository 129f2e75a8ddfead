"""Inputs made to stall, crash or bloat the grader: each gets a verdict, and the pool is right afterwards."""

import os
import random
import resource
import time
import traceback

import pytest

from verl_dft.grading import VERDICTS, GradeItem, GraderPool
from verl_dft.grading.extract import extract_answer
from verl_dft.grading.judge import gold_type
from verl_dft.grading.quick import quick_judge

# As boxed answers. Verdicts other than correct are all honest here, so only the time-outs are pinned.
BOXED = {
    "tower": "9^{9^{9^{9}}}", "tower in a sum": r"\sin(9^{9^{9^{9}}})+1", "factorials": "((20)!)!",
    "factorial": "(10^{9})!",
    "200k digits": "7" * 200_000, "200k decimals": "0." + "7" * 200_000, "4,000 digits": "7" * 4000,
    "braces": "{" * 5000 + "1" + "}" * 5000, "brackets": "(" * 3000 + "1" + ")" * 3000,
    "tuples": "(1," * 3000 + "2" + ")" * 3000, "fractions": r"\frac{1}{" * 800 + "2" + "}" * 800,
    "roots": r"\sqrt{" * 400 + "2" + "}" * 400, "boxes": r"\boxed{" * 3000 + "5" + "}" * 3000,
    "half a megabyte": r"\frac{x+1}{y}+" * 36_000 + "1", "controls": "\x00\x01\x1b[31m5\x07", "surrogate": "4\ud800",
    "emoji": "🙂" * 1000, "polynomial": "(x+y+z+w)^{200}", "sum": r"\sum_{n=1}^{10^{12}} \frac{1}{n^2}",
    "integral": r"\int_0^1 e^{-x^2}\sin(x^3)dx", "carets": "2" + "^2" * 300, "minus": "-" * 9000 + "5",
    "signs": r"\pm 1" * 300, "commas": "," * 9000, "ands": " and " * 2000, "equals": "=" * 8000,
    "units": "5 " + "a " * 4000,
    "backslashes": "\\" * 9001, "zero": r"\frac{1}{0}",
    "wide matrix": r"\begin{pmatrix}" + "1&" * 3000 + r"1\end{pmatrix}",
    "list": ",".join(map(str, range(2500))), "binomial": r"\binom{10^9}{5\cdot 10^8}", "letters": "x" * 9000,
}  # fmt: skip
TEXTS = {
    "nothing": "", "nulls": "\x00" * 1000, "open boxes": r"\boxed{" * 80_000, "hashes": "####" * 100_000,
    "hash and spaces": "#### 5" + " " * 300_000 + "b", "spaces": "The answer is" + " " * 400_000 + "x",
    "dollars": "The answer is " + "$" * 300_000, "phrases": "answer is " * 40_000, "answers": "answer " * 60_000,
    "words": "answer is " + "word " * 90_000, "lines": "\n" * 400_000, "stars": "*" * 300_000,
    "formula": "The answer is " + r"\frac{x+1}{y}+" * 36_000, "tags": "<answer>" * 60_000 + "</answer>",
}  # fmt: skip
COSTLY = {"brackets", "factorials", "carets", "binomial", "minus", "letters", "integral", "fractions", "units"}
GOLDS = ["5", r"\frac{\sqrt{x}}{2}", "(1,2)", "1, 2", "B", "yes", "x=5", r"[1,2) \cup (3,4)", "2516_8"]


def _hostile(gold: str) -> list[GradeItem]:
    texts = [rf"so \boxed{{{text}}}" for text in BOXED.values()] + list(TEXTS.values())
    return [GradeItem(text, gold) for text in texts]


@pytest.fixture(scope="module")
def pool() -> GraderPool:
    with GraderPool(2, timeout_s=0.5, memory_mb=1024) as made:
        yield made


def _right_afterwards(pool: GraderPool) -> None:
    grades = pool.grade([GradeItem(r"\boxed{\sin^2 x}", r"1-\cos^2 x"), GradeItem(r"\boxed{\sin x}", r"\cos x")])
    assert [grade.verdict for grade in grades] == ["correct", "wrong"]


@pytest.mark.slow
def test_hostile_answers_get_verdicts(pool: GraderPool) -> None:
    """All but those that cost a worker each: starting one takes a second, and the slow test has them all."""
    names = [name for name in [*BOXED, *TEXTS] if name not in COSTLY]
    items = [item for name, item in zip([*BOXED, *TEXTS], _hostile("5"), strict=True) if name not in COSTLY]
    grades = dict(zip(names, pool.grade(items), strict=True))
    assert all(grade.verdict in VERDICTS for grade in grades.values())
    assert [name for name, grade in grades.items() if grade.verdict == "correct"] == ["boxes"]
    assert grades["tower"].rule == grades["factorial"].rule == "value"
    assert grades["200k digits"].rule == grades["half a megabyte"].rule == "too_long"
    assert grades["tower in a sum"].verdict == "timeout"
    _right_afterwards(pool)


@pytest.mark.parametrize("gold", GOLDS[::2])
def test_the_calling_process_is_never_held_up(gold: str) -> None:
    """Extraction and the quick rules run where nothing can kill them, so they may not take long on anything."""
    for name, item in zip([*BOXED, *TEXTS], _hostile(gold), strict=True):
        start = time.process_time()
        answer = extract_answer(item.response, several=gold_type(gold) == "multi")
        if answer is not None:
            quick_judge(answer, gold)
        assert time.process_time() - start < 1.0, name


_TOKENS = [
    r"\frac", "{", "}", r"\sqrt", r"\boxed{", "x", "2", "^", "_", r"\pm", "(", ")", "[", "]", ",", "=", "<", r"\text{",
    r"\begin{pmatrix}", r"\end{pmatrix}", "&", "\\\\", r"\infty", r"\cup", "10", "e5", "!", r"\left", r"\right", "%",
    r"\circ", " or ", " and ", r"\le", "1", "3.5", "|", r"\{", r"\}", "-", "+", "*", "/", r"\sin", r"\pi", "\n", "\x00",
    "π",
]  # fmt: skip


def _fuzzed(count: int) -> list[GradeItem]:
    chance = random.Random(0)
    items = []
    for number in range(count):
        text = "".join(chance.choice(_TOKENS) for _ in range(chance.randint(0, 16)))
        gold = chance.choice(["5", "x+1", "(1,2)", r"\frac{1}{2}", "1, 2", r"[1,\infty)", text.strip("\x00\n ") or "1"])
        items.append(GradeItem(rf"\boxed{{{text}}}" if number % 3 else f"The answer is {text}", gold))
    return items


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fuzzed_strings(pool: GraderPool, count: int) -> None:
    grades = pool.grade(_fuzzed(count))
    assert len(grades) == count and all(grade.verdict in VERDICTS for grade in grades)
    lost = [grade for grade in grades if grade.verdict in ("timeout", "error")]
    assert len(lost) <= count / 100, lost
    _right_afterwards(pool)


@pytest.mark.nightly
@pytest.mark.slow
def test_memory_stays_bounded_over_every_hostile_answer_and_gold() -> None:
    """The caller grows by little, and no worker, alive or dead, ever held more than its limit.

    In a process of its own: what other tests' children held would count here too.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _grade_everything_hostile()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _grade_everything_hostile() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with GraderPool(2, timeout_s=0.5, memory_mb=1024) as pool:
        for gold in GOLDS:
            assert all(grade.verdict in VERDICTS for grade in pool.grade(_hostile(gold)))
        _right_afterwards(pool)
    # the pool is closed: its workers are waited for, and counted
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    assert 0 < resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1024 * 1024
