"""What an evaluation shows: a table for the terminal, ``report.md``, the samples' page, and warnings."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_dft.report.tables import Table

WARN_FRAC = 0.05
"""Share of truncated or answerless samples above which a result gets a warning."""
_STD = (
    ("std_over_problems", "of a problem's average, between problems (of it comes the interval)"),
    ("std_over_runs", "of a run's average, between the n runs (run i: sample i of every problem), on these problems"),
    ("std_within_problems", "of one sample's verdict (0 or 100) around its problem's average"),
)


def format_table(results: Sequence[Mapping[str, Any]]) -> str:
    """A row per result. avg@n, its interval and pass@n in percent; no-answer and truncated are shares of samples."""
    n = results[0]["n"] if len({result["n"] for result in results}) == 1 else "n"
    header = ["model", "benchmark", "problems", f"avg@{n}", "95% interval", f"pass@{n}"]
    header += [f"maj@{n}"] if all("maj_at_k" in result for result in results) else []
    header += ["avg (qwen)"] if all("avg_qwen" in result for result in results) else []
    header += ["no answer", "truncated"]
    rows = [header, *(_row(result, header) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _row(result: Mapping[str, Any], header: Sequence[str]) -> list[str]:
    n = str(result["n"])
    row = [_short(result["model"]), result["benchmark"], str(result["num_problems"]), _percent(result["avg"])]
    row += [_interval(result["avg_ci95"]), _percent(result["pass_at_k"][n])]
    row += [_percent(result["maj_at_k"][n])] if any(cell.startswith("maj@") for cell in header) else []
    row += [_percent(result["avg_qwen"])] if "avg (qwen)" in header else []
    return [*row, f"{_percent(result['no_answer_frac'])}%", f"{_percent(result['truncated_frac'])}%"]


def warnings(result: Mapping[str, Any]) -> list[str]:
    """Reasons to distrust a result, one line each."""
    found = []
    if result["truncated_frac"] > WARN_FRAC:
        found.append(f"{_percent(result['truncated_frac'])}% of the samples were cut off; raise max_tokens")
    if result["no_answer_frac"] > WARN_FRAC:
        found.append(f"{_percent(result['no_answer_frac'])}% of the samples hold no answer; look at samples.parquet")
    if result["num_context_limited"]:
        context = result["engine"].get("max_model_len", "unknown")
        found.append(
            f"{result['num_context_limited']} of {result['num_problems']} prompts leave less than "
            f"max_tokens={result['max_tokens']} of the context ({context} tokens)"
        )
    found += result.get("asked_otherwise", [])
    for verdict in ("timeout", "error"):
        if count := result["verdicts"][verdict]:
            found.append(f"{count} samples could not be graded ({verdict}) and count as not correct")
    return found


def write_report(folder: str | Path) -> tuple[Path, Path]:
    """Write ``report.md`` and ``samples.html`` in the folder of a finished evaluation; returns their paths.

    Raises:
        InputError: ``result.json`` or ``samples.parquet`` is missing or incomplete.
    """
    from verl_dft.files import atomic_write
    from verl_dft.report.browse import write_samples_page

    page = write_samples_page(folder)
    result = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
    with atomic_write(Path(folder, "report.md")) as file:
        file.write(markdown(result))
    return Path(folder, "report.md"), page


def markdown(result: Mapping[str, Any]) -> str:
    """One result as a Markdown page: scores, pass@k and maj@k, spread, lengths, verdicts, warnings."""
    tables = [_scores(result), _at_k(result), _spread(result), _lengths(result), _verdicts(result)]
    lines = [f"# {result['model']} on {result['benchmark']}", ""]
    for table in tables:
        lines += [table.markdown(), ""] if table.rows else []
    lines += [f"- warning: {warning}" for warning in warnings(result)]
    settings = ("n", "temperature", "top_p", "top_k", "max_tokens", "prompt", "seed", "limit")
    lines += ["", ", ".join(f"{key}={result[key]}" for key in settings if key in result)]
    return "\n".join([*lines, "", "Samples and their verdicts: [samples.html](samples.html)", ""])


def _scores(result: Mapping[str, Any]) -> Table:
    rows = [["strict", _percent(result["avg"]), _interval(result["avg_ci95"])]]
    if "avg_qwen" in result:
        interval = _interval(result["avg_qwen_ci95"]) if "avg_qwen_ci95" in result else ""
        rows.append(["qwen-compatible", _percent(result["avg_qwen"]), interval])
    return Table(["verdict", f"avg@{result['n']} %", "95% interval (clustered by problem)"], rows)


def _at_k(result: Mapping[str, Any]) -> Table:
    n, majority = result["n"], result.get("maj_at_k", {})
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k < n] + [n]
    rows = [
        [str(k), *(_percent(of[str(k)]) if str(k) in of else "" for of in (result["pass_at_k"], majority))] for k in ks
    ]
    return Table(["k", "pass@k %", "maj@k %"], rows)


def _spread(result: Mapping[str, Any]) -> Table:
    rows = [[text, _percent(result[key])] for key, text in _STD if result.get(key) is not None]
    return Table(["standard deviation", "points"], rows)


def _lengths(result: Mapping[str, Any]) -> Table:
    lengths = result.get("response_tokens", {})
    return Table(
        ["response tokens", ""], [[k.replace("_", " "), f"{v:.0f}"] for k, v in lengths.items() if v is not None]
    )


def _verdicts(result: Mapping[str, Any]) -> Table:
    rows = [[name.replace("_", " "), str(count)] for name, count in result["verdicts"].items()]
    rows.append(["truncated", f"{_percent(result['truncated_frac'])}%"])
    if "num_disagree" in result:
        rows.append(["strict and qwen verdicts disagree", str(result["num_disagree"])])
    return Table(["samples", "count"], rows)


def _interval(interval: Sequence[float] | None) -> str:
    return f"{_percent(interval[0])} to {_percent(interval[1])}" if interval else "one problem"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _short(model: str, width: int = 40) -> str:
    return model if len(model) <= width else "…" + model[-(width - 1) :]
