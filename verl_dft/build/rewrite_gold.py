r"""Which gold answers no response could be judged against: their problems are not worth a sample.

Two looks at each gold. A response that is the gold itself in ``\boxed{}`` must be graded correct (an empty gold and
unbalanced braces are not). And a response that cannot be equal is graded, which makes the grader parse the gold: the
first look alone would pass any string, because equal strings are equal answers. A time-out of the second look says
nothing about the gold (comparing an infinite sum with something else takes for ever), so it passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from verl_dft.data.records import Problem
from verl_dft.grading.pool import Grade, GradeItem, GraderPool

EMPTY, UNREADABLE, UNPARSED = "gold is empty", "gold is not read back from a box", "gold cannot be parsed"
# No gold has this value. Golds that the quick rules can evaluate are told from it at once, the others are parsed.
_PROBE = r"\boxed{\sqrt{q}+q^{2}}"
_PROBE_TIMEOUT_S = 2.0
"""Parsing takes milliseconds; what is not wanted is the comparison after it."""


def unusable_golds(problems: Sequence[Problem], grading: Mapping[str, Any]) -> dict[str, str]:
    """Problem id -> reason, for every problem whose gold cannot be verified.

    Args:
        grading: options of :class:`verl_dft.grading.pool.GraderPool`.
    """
    own = [GradeItem(rf"\boxed{{{problem.answer}}}", problem.answer) for problem in problems]
    probes = [GradeItem(_PROBE, problem.answer) for problem in problems]
    with GraderPool(**grading) as pool:
        readable = pool.grade(own)
    with GraderPool(**{**grading, "timeout_s": _PROBE_TIMEOUT_S}) as pool:
        probed = pool.grade(probes)
    found = {p.id: _reason(p, itself, probe) for p, itself, probe in zip(problems, readable, probed, strict=True)}
    return {id: reason for id, reason in found.items() if reason}


def _reason(problem: Problem, itself: Grade, probe: Grade) -> str:
    if not problem.answer.strip():
        return EMPTY
    if probe.rule == "gold_unparsed":
        return UNPARSED
    return "" if itself.verdict == "correct" else UNREADABLE
