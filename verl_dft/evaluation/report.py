"""What an evaluation prints: one small table, and the warnings that belong to its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from verl_dft.evaluation.run import WARN_FRAC


def format_table(results: Sequence[Mapping[str, Any]]) -> str:
    """A row per result. avg@n, its interval and pass@n in percent; no-answer and truncated are shares of samples."""
    n = results[0]["n"]
    header = ["model", "benchmark", "problems", f"avg@{n}", "95% interval", f"pass@{n}", "no answer", "truncated"]
    rows = [header, *(_row(result) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _row(result: Mapping[str, Any]) -> list[str]:
    interval = result["avg_ci95"]
    return [
        _short(result["model"]),
        result["benchmark"],
        str(result["num_problems"]),
        _percent(result["avg"]),
        f"{_percent(interval[0])} to {_percent(interval[1])}" if interval else "one problem",
        _percent(result["pass_at_k"][str(result["n"])]),
        f"{_percent(result['no_answer_frac'])}%",
        f"{_percent(result['truncated_frac'])}%",
    ]


def warnings(result: Mapping[str, Any]) -> list[str]:
    """Reasons to distrust a result, one line each."""
    found = []
    if result["truncated_frac"] > WARN_FRAC:
        found.append(f"{_percent(result['truncated_frac'])}% of the samples were cut off; raise max_tokens")
    if result["no_answer_frac"] > WARN_FRAC:
        found.append(f"{_percent(result['no_answer_frac'])}% of the samples hold no answer; look at samples.parquet")
    if result["num_context_limited"]:
        found.append(
            f"{result['num_context_limited']} of {result['num_problems']} prompts leave less than "
            f"max_tokens={result['max_tokens']} of the context ({result['engine']['max_model_len']} tokens)"
        )
    for verdict in ("timeout", "error"):
        if count := result["verdicts"][verdict]:
            found.append(f"{count} samples could not be graded ({verdict}) and count as not correct")
    return found


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _short(model: str, width: int = 40) -> str:
    return model if len(model) <= width else "…" + model[-(width - 1) :]
