"""The numbers of one evaluation, from its graded samples and the list of problems that they must cover."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from verl_dft.errors import InputError
from verl_dft.evaluation import metrics
from verl_dft.evaluation.majority import answer_key, maj_at_k
from verl_dft.grading.pool import VERDICTS

_NUM_NAMED = 5


def check_complete(keys: Iterable[tuple[str, int]], problem_ids: Sequence[str], n: int) -> None:
    """Refuse to score what is not exactly ``n`` samples (index 0 to n - 1) of every problem.

    Missing samples are not a random part: long ones are missing first, so a score of the rest would be too high.

    Args:
        keys: (problem id, index) of every sample.

    Raises:
        InputError: samples are missing, doubled, or of other problems; it says how many and which.
    """
    found = Counter(keys)
    wanted = {(problem, index): None for problem in problem_ids for index in range(n)}
    if len(wanted) != len(problem_ids) * n:
        doubled = [problem for problem, count in Counter(problem_ids).items() if count > 1]
        raise InputError(f"{len(doubled)} problem ids are not unique ({doubled[0]!r}); give each problem its own id")
    missing = [key for key in wanted if key not in found]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(wanted)} samples are missing ({_named(missing)}), so there is no score; run the "
            "same evaluation again to finish it"
        )
    if foreign := [key for key in found if key not in wanted]:
        raise InputError(
            f"{len(foreign)} samples are of no problem or index of this evaluation ({_named(foreign)}), which has "
            f"{len(problem_ids)} problems and n={n}"
        )
    if doubled := [key for key, count in found.items() if count > 1]:
        raise InputError(f"{len(doubled)} samples are there more than once ({_named(doubled)}); delete the repeats")


def summarize(
    rows: Sequence[Mapping[str, Any]],
    problem_ids: Sequence[str],
    n: int,
    levels: Mapping[str, int | None] | None = None,
) -> dict[str, Any]:
    """Every number of a result, as it is written to ``result.json``.

    Args:
        rows: samples in any order with ``problem_id, index, grade, answer, num_tokens, finish_reason`` and, if there
            is a second verdict, ``qwen``; the columns of ``samples.parquet``.
        problem_ids: all problems, in the benchmark's order.
        n: samples per problem.
        levels: problem id -> level, of the problems that have one.

    Returns:
        ``avg`` (avg@n) with ``avg_ci95`` clustered by problem, the three ``std_…`` (see ``std_over_problems`` and so on
        in :mod:`verl_dft.evaluation.metrics`), ``pass_at_k`` and ``maj_at_k`` (keys are k as text), ``avg_by_level``,
        counts of ``verdicts``, ``no_answer_frac``, ``truncated_frac``, ``response_tokens``, ``per_problem``; with a
        second verdict ``avg_qwen``, its interval, ``verdicts_qwen`` and ``num_disagree``. Shares are
        fractions, not percentages.

    Raises:
        InputError: samples are missing, doubled or foreign, or one has no known verdict.
    """
    check_complete(((row["problem_id"], row["index"]) for row in rows), problem_ids, n)
    _check_verdicts(rows)
    groups = _by_problem(rows, problem_ids, n)
    correct = [[row["grade"] == "correct" for row in group] for group in groups]
    counts = [sum(group) for group in correct]
    levels = levels or {}
    verdicts = Counter(row["grade"] for row in rows)
    votes = [[(answer_key(row["answer"]), row["grade"] == "correct") for row in group] for group in groups]
    return {
        "num_problems": len(problem_ids),
        "num_samples": len(rows),
        "avg": metrics.avg_at_n(counts, n),
        "avg_ci95": metrics.clustered_ci95([c / n for c in counts]),
        "std_over_problems": metrics.std_over_problems(counts, n),
        "std_over_runs": metrics.std_over_runs(correct),
        "std_within_problems": metrics.std_within_problems(counts, n),
        "pass_at_k": {str(k): value for k, value in metrics.pass_at_every_k(counts, n).items()},
        "maj_at_k": {str(k): value for k, value in maj_at_k(votes).items()},
        "avg_by_level": _by_level(problem_ids, counts, n, levels),
        "verdicts": {verdict: verdicts[verdict] for verdict in VERDICTS},
        "no_answer_frac": verdicts["no_answer"] / len(rows),
        "truncated_frac": fmean(row["finish_reason"] == "length" for row in rows),
        "mean_response_tokens": fmean(row["num_tokens"] for row in rows),
        "response_tokens": length_statistics(rows),
        **_second_verdict(groups, n),
        "per_problem": [
            {"id": problem, "level": levels.get(problem), "num_correct": c, "avg": c / n}
            for problem, c in zip(problem_ids, counts, strict=True)
        ],
    }


def length_statistics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Tokens per response: mean, median, 95th percentile, most, and the means of correct, other and truncated ones.

    A percentile is the smallest length that at least 95% of the responses do not exceed. None where there are none.
    """
    lengths = sorted(row["num_tokens"] for row in rows)

    def mean_where(wanted: Any) -> float | None:
        chosen = [row["num_tokens"] for row in rows if wanted(row)]
        return fmean(chosen) if chosen else None

    return {
        "mean": fmean(lengths),
        "median": median(lengths),
        "p95": lengths[-(-95 * len(lengths) // 100) - 1],
        "max": lengths[-1],
        "mean_correct": mean_where(lambda row: row["grade"] == "correct"),
        "mean_not_correct": mean_where(lambda row: row["grade"] != "correct"),
        "mean_truncated": mean_where(lambda row: row["finish_reason"] == "length"),
    }


def _check_verdicts(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = ("grade", "qwen") if "qwen" in rows[0] else ("grade",)
    for column in columns:
        unknown = [(row["problem_id"], row["index"]) for row in rows if row.get(column) not in VERDICTS]
        if unknown:
            raise InputError(
                f"{len(unknown)} samples have no verdict in column {column!r} ({_named(unknown)}); grade them first"
            )


def _by_problem(rows: Sequence[Mapping[str, Any]], problem_ids: Sequence[str], n: int) -> list[list[Mapping[str, Any]]]:
    placed = {(row["problem_id"], row["index"]): row for row in rows}
    return [[placed[problem, index] for index in range(n)] for problem in problem_ids]


def _by_level(
    problem_ids: Sequence[str], counts: Sequence[int], n: int, levels: Mapping[str, int | None]
) -> dict[str, float]:
    by_level: dict[int, list[int]] = defaultdict(list)
    for problem, c in zip(problem_ids, counts, strict=True):
        if (level := levels.get(problem)) is not None:
            by_level[level].append(c)
    return {str(level): metrics.avg_at_n(by_level[level], n) for level in sorted(by_level)}


def _second_verdict(groups: Sequence[Sequence[Mapping[str, Any]]], n: int) -> dict[str, Any]:
    if "qwen" not in groups[0][0]:
        return {}
    counts = [sum(row["qwen"] == "correct" for row in group) for group in groups]
    return {
        "avg_qwen": metrics.avg_at_n(counts, n),
        "avg_qwen_ci95": metrics.clustered_ci95([c / n for c in counts]),
        "verdicts_qwen": {verdict: sum(row["qwen"] == verdict for g in groups for row in g) for verdict in VERDICTS},
        "num_disagree": sum((row["qwen"] == "correct") != (row["grade"] == "correct") for g in groups for row in g),
    }


def _named(keys: Sequence[tuple[str, int]]) -> str:
    shown = ", ".join(f"{problem!r} sample {index}" for problem, index in keys[:_NUM_NAMED])
    return shown + (", …" if len(keys) > _NUM_NAMED else "")
