r"""The tiny world: multi-step word arithmetic with worked solutions in several styles, small enough for a CPU.

A problem starts from a number and changes it two to six times; every number stays in 0..60 and every token is
preceded by a space, so that a number is always one token of the world's own tokenizer. Example of level 2::

    question  Eve has 15 keys : a loses 2 , b times 2 , c eats 7 . How many ?
    native    a 15 - 2 = 13 ; b 13 * 2 = 26 ; c 26 - 7 = 19 ; Answer \boxed{ 19 }
    teacher   Start at 15 . Step a - 2 gives 13 . Step b x 2 gives 26 . Step c - 7 gives 19 . The answer is \boxed{ 19 }
    expert    Observe $ 15 - 2 = 13 $ , hence $ 13 \cdot 2 - 7 = 19 $ . So we have $ \boxed{ 19 } $ .

The base model computes well in its *native* style; the *expert* style (unlabelled, often two operations in one formula)
is the foreign demonstration. Sets of problems, pretraining texts and the tokenizer are made in
:mod:`verl_dft.data.arithmetic`, which also re-exports what is defined here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

MAX_VALUE = 60
LETTERS = "abcdef"
NAMES = ("Ann", "Bob", "Cat", "Dan", "Eve", "Fay", "Gus", "Hal")
ITEMS = ("pens", "cups", "figs", "nuts", "hats", "keys")
VERBS = {"+": ("gets", "finds"), "-": ("loses", "eats"), "*": ("times",)}
FUSE_PROB = 0.7
"""Probability that the expert writes the next two operations as one formula."""
_OPENERS = ("We get", "Note that", "Clearly", "Observe", "By hypothesis")
_LINKS = (" , thus ", " , hence ", " ; then ", " and so ", " . Now ")
_CLOSERS = (" . Therefore ", " . So we have ", " . Hence the result ", " . It follows that ")
_REDRAWS = 50


@dataclass(frozen=True)
class Level:
    """How hard a problem is."""

    num_steps: int
    mul_prob: float
    """Probability that a step multiplies."""
    multipliers: tuple[int, ...]
    big_prob: float
    """Probability that an added or subtracted number is 10..19 rather than 2..9."""


LEVELS: dict[int, Level] = {
    1: Level(2, 0.15, (2,), 0.0),
    2: Level(3, 0.20, (2,), 0.0),
    3: Level(4, 0.20, (2, 3), 0.05),
    4: Level(5, 0.20, (2, 3), 0.30),
    5: Level(6, 0.25, (2, 3, 4), 0.50),
}


@dataclass(frozen=True)
class Slips:
    """Probabilities of a wrong step result (carried on) in a pretraining text, by the kind of step.

    Slips leave the base imperfect at temperature 1 even where it is certain of the method, so that training can show.
    """

    small: float = 0.03
    mul: float = 0.09
    big: float = 0.12

    def prob(self, sign: str, operand: int) -> float:
        """Probability for one step."""
        return self.mul if sign == "*" else self.big if operand > 9 else self.small


@dataclass(frozen=True)
class ArithmeticProblem:
    """A generated problem: ``start``, then ``ops`` = ((sign, operand), ...) in order."""

    question: str
    start: int
    ops: tuple[tuple[str, int], ...]
    answer: int
    level: int

    @property
    def core(self) -> str:
        """The computation without names and wording; two questions with one core are the same problem retold."""
        return f"{self.start} " + " ".join(f"{sign}{operand}" for sign, operand in self.ops)


@dataclass(frozen=True)
class Step:
    """One worked step: ``before sign operand = after`` (``after`` is wrong where the writer slipped)."""

    before: int
    sign: str
    operand: int
    after: int


def apply(value: int, sign: str, operand: int) -> int:
    """The result of one operation."""
    return value + operand if sign == "+" else value - operand if sign == "-" else value * operand


def generate(level: int, rng: random.Random) -> ArithmeticProblem:
    """Draw a problem of ``level`` (1..5)."""
    spec = LEVELS[level]
    while True:
        start = rng.randint(2, 20)
        ops = _draw_ops(start, spec, rng)
        if ops is not None:
            break
    value = start
    for sign, operand in ops:
        value = apply(value, sign, operand)
    steps = [
        f"{letter} {rng.choice(VERBS[sign])} {operand}" for letter, (sign, operand) in zip(LETTERS, ops, strict=False)
    ]
    question = f"{rng.choice(NAMES)} has {start} {rng.choice(ITEMS)} : {' , '.join(steps)} . How many ?"
    return ArithmeticProblem(question, start, tuple(ops), value, level)


def _draw_ops(value: int, spec: Level, rng: random.Random) -> list[tuple[str, int]] | None:
    """Operations that keep the running value in 1..60, or None where a step could not be drawn."""
    ops = []
    for _ in range(spec.num_steps):
        for _ in range(_REDRAWS):
            sign, operand = _draw_op(spec, rng)
            if 1 <= apply(value, sign, operand) <= MAX_VALUE:
                break
        else:
            return None
        ops.append((sign, operand))
        value = apply(value, sign, operand)
    return ops


def _draw_op(spec: Level, rng: random.Random) -> tuple[str, int]:
    if rng.random() < spec.mul_prob:
        return "*", rng.choice(spec.multipliers)
    sign = rng.choice("+-")
    return sign, rng.randint(10, 19) if rng.random() < spec.big_prob else rng.randint(2, 9)


def work(problem: ArithmeticProblem, rng: random.Random, slips: Slips | None = None) -> list[Step]:
    """The worked steps; with ``slips`` some results are off by 1, 2 or 10 and carried on.

    A slip that would take this or a later number out of 0..60 is not made.
    """
    steps, value = [], problem.start
    for index, (sign, operand) in enumerate(problem.ops):
        result = apply(value, sign, operand)
        if slips is not None and rng.random() < slips.prob(sign, operand):
            wrong = min(MAX_VALUE, max(0, result + rng.choice((-10, -2, -1, 1, 2, 10))))
            result = wrong if _stays_in_range(wrong, problem.ops[index + 1 :]) else result
        steps.append(Step(value, sign, operand, result))
        value = result
    return steps


def _stays_in_range(value: int, ops: tuple[tuple[str, int], ...]) -> bool:
    for sign, operand in ops:
        value = apply(value, sign, operand)
        if not 0 <= value <= MAX_VALUE:
            return False
    return True


def native(problem: ArithmeticProblem, rng: random.Random, slips: Slips | None = None) -> str:
    """The base model's own style: one lettered equation per step."""
    steps = work(problem, rng, slips)
    lines = [f"{a} {s.before} {s.sign} {s.operand} = {s.after} ;" for a, s in zip(LETTERS, steps, strict=False)]
    return f"{' '.join(lines)} Answer \\boxed{{ {steps[-1].after} }}"


def teacher(problem: ArithmeticProblem, rng: random.Random, slips: Slips | None = None) -> str:
    """A second transparent style, in sentences."""
    steps = work(problem, rng, slips)
    signs = {"+": "+", "-": "-", "*": "x"}
    lines = [f"Step {a} {signs[s.sign]} {s.operand} gives {s.after} ." for a, s in zip(LETTERS, steps, strict=False)]
    return f"Start at {steps[0].before} . {' '.join(lines)} The answer is \\boxed{{ {steps[-1].after} }}"


def expert(problem: ArithmeticProblem, rng: random.Random, slips: Slips | None = None) -> str:
    """The textbook style: no letters, varied connectors, and often two operations in one formula."""
    steps = work(problem, rng, slips)
    formulas, at = [], 0
    while at < len(steps):
        group = steps[at : at + (2 if rng.random() < FUSE_PROB else 1)]
        formulas.append(_formula(group))
        at += len(group)
    text = f"{rng.choice(_OPENERS)} {formulas[0]}"
    for formula in formulas[1:]:
        text += rng.choice(_LINKS) + formula
    return f"{text}{rng.choice(_CLOSERS)}$ \\boxed{{ {steps[-1].after} }} $ ."


def _formula(group: list[Step]) -> str:
    text = str(group[0].before)
    for index, step in enumerate(group):
        if step.sign == "*" and index:
            text = f"( {text} )"
        text += f" \\cdot {step.operand}" if step.sign == "*" else f" {step.sign} {step.operand}"
    return f"$ {text} = {group[-1].after} $"


STYLES = {"native": native, "teacher": teacher, "expert": expert}


def guided_prompt(question: str, reference: str) -> str:
    """User turn that shows a worked solution to be retold; the question comes last, where it always stands."""
    return f"Reference : {reference}\nRetell .\n{question}"
