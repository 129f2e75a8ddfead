"""verl's reward for the arithmetic problems of the online tests: 1 for the right final number, else 0.

verl loads this file by its path (``reward.custom_reward_function``) in a reward worker.
"""

from typing import Any

from verl_dft.grading import extract_answer
from verl_dft.grading.quick import quick_judge


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any) -> float:
    """The quick rules decide every pair of numbers, so no grader process is needed here."""
    answer = extract_answer(solution_str)
    verdict = quick_judge(answer, ground_truth, "number") if answer is not None else None
    return float(verdict is not None and verdict.equal)
