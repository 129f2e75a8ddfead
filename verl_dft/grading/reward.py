"""The grader as verl's reward: ``reward.custom_reward_function.path=pkg://verl_dft.grading.reward``.

One pool per process, made at the first answer that needs it and shared by all threads; verl calls the function from an
executor, so it blocks no event loop. (verl's own pool scores every later answer 0 once a worker of it has died.)
"""

from collections.abc import Mapping
from typing import Any

from verl_dft.errors import InputError
from verl_dft.grading.pool import GradeItem, shared_pool


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    harness: str = "strict",
    num_workers: int | None = None,
    timeout_s: float = 10.0,
    memory_mb: int = 2048,
    **_: Any,
) -> dict[str, Any]:
    """verl's ``custom_reward_function``: 1 for a right final answer, else 0, with the verdict beside it.

    Args:
        data_source, solution_str, ground_truth: as verl passes them.
        extra_info: ``answer_type`` and ``tolerance`` are read from it where present.
        harness: which verdict is the score: ``strict`` or ``qwen``.
        num_workers, timeout_s, memory_mb: of the pool; see :class:`verl_dft.grading.GraderPool`.

    Returns:
        ``score``, ``acc`` and ``acc_qwen`` (0 or 1), ``graded`` (0 where no verdict was reached: a time-out or an
        error, which score 0 but are not wrong answers), ``verdict`` and ``pred`` (strings).
    """
    if harness not in ("strict", "qwen"):
        raise InputError(f"reward_kwargs.harness is {harness!r}; valid: strict, qwen")
    extra = extra_info or {}
    item = GradeItem(solution_str, str(ground_truth), extra.get("answer_type") or "auto", extra.get("tolerance"))
    (grade,) = shared_pool(num_workers, timeout_s, memory_mb).grade([item])
    strict, qwen = float(grade.verdict == "correct"), float(grade.qwen == "correct")
    return {
        "score": strict if harness == "strict" else qwen,
        "acc": strict,
        "acc_qwen": qwen,
        "graded": float(grade.verdict not in ("timeout", "error")),
        "verdict": grade.verdict,
        "pred": grade.answer or "",
    }
