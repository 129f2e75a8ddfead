"""What a rewriting came to: the paper's Table 1, and what it took, as JSON values and as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from verl_dft.build.rewrite import DROPPED, FALLBACK, GUIDED, SELF, Outcome, RewriteOptions, Stage, Wave
from verl_dft.grading.pool import VERDICTS
from verl_dft.sampling.record import Sample

_STAGES = (SELF, GUIDED, FALLBACK)
History = Sequence[tuple[Wave, Sequence[Sample]]]


def rewrite_statistics(outcomes: Sequence[Outcome], history: History, options: RewriteOptions) -> dict[str, Any]:
    """Counts and shares.

    ``table1``: rows by the stage that settled their problem, shares of all rows. ``sampling``: by stage, see
    :func:`_sampling`. ``fallback_reasons`` and ``dropped``: problems by reason. ``rows``: by whose text they have, with
    the tokens of the texts that the model wrote. ``by_level``: the same stages, where problems have levels.
    """
    levels = sorted({o.problem.level for o in outcomes if o.problem.level is not None})
    kept = [o.kept for o in outcomes if o.origin in (SELF, GUIDED) and o.kept is not None]
    return {
        "num_problems": len(outcomes),
        "table1": _table1(outcomes),
        "fallback_reasons": _counts(o.reason for o in outcomes if o.stage == FALLBACK),
        "dropped": _counts(o.reason for o in outcomes if o.stage == DROPPED),
        "rows": {
            "by_origin": _counts(o.origin for o in outcomes if o.origin is not None),
            "model_tokens": sum(sample.num_tokens for sample in kept),
            "model_truncated": sum(sample.finish_reason != "stop" for sample in kept),
            "with_behavior_logp": sum(sample.logp is not None for sample in kept),
        },
        "sampling": {stage.name: _sampling(stage, history, options) for stage in options.sampled_stages()},
        "by_level": {str(level): _level(level, outcomes, history, options) for level in levels},
    }


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _table1(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    counts = Counter(o.stage for o in outcomes if o.stage != DROPPED)
    total = sum(counts.values())
    table = {stage: {"count": counts[stage], "share": _share(counts[stage], total)} for stage in _STAGES}
    return table | {"total": {"count": total, "share": _share(total, total)}}


def _sampling(stage: Stage, history: History, options: RewriteOptions) -> dict[str, Any]:
    """What a stage drew.

    ``first_wave_accuracy`` is the share of accepted samples in the first wave, which every problem of the stage has:
    an estimate of the stage's solve rate per sample without bias (later waves hold the harder problems only).
    ``samples_literal``: what drawing all n of each problem takes.
    """
    waves = [(wave, samples) for wave, samples in history if wave.stage.name == stage.name]
    samples = [sample for _, told in waves for sample in told]
    tried = {sample.problem_id for sample in samples}
    solved = {sample.problem_id for sample in samples if stage.accepts(sample)}
    first = waves[0][1] if waves else []
    return {
        "n": stage.n,
        "prompt": stage.prompt_name,
        "verifier": stage.verifier,
        "temperature": stage.sampling.temperature,
        "top_p": stage.sampling.top_p,
        "top_k": stage.sampling.top_k,
        "max_tokens": stage.sampling.max_tokens,
        "problems": len(tried),
        "solved": len(solved),
        "solved_share": _share(len(solved), len(tried)),
        "first_wave_accuracy": _share(sum(map(stage.accepts, first)), len(first)),
        "samples": len(samples),
        "samples_literal": stage.n * len(tried),
        "waves": [len(told) for _, told in waves],
        "tokens": sum(sample.num_tokens for sample in samples),
        "truncated": sum(sample.finish_reason != "stop" for sample in samples),
        "correct_truncated": sum(stage.correct(sample) and sample.finish_reason != "stop" for sample in samples),
        "verdicts": {name: sum(sample.grade == name for sample in samples) for name in VERDICTS},
        "verdicts_qwen": _counts(sample.qwen for sample in samples if sample.qwen),
    }


def _level(level: int, outcomes: Sequence[Outcome], history: History, options: RewriteOptions) -> dict[str, Any]:
    mine = [o for o in outcomes if o.problem.level == level]
    ids = {o.problem.id for o in mine}
    counts = Counter(o.stage for o in mine)
    found: dict[str, Any] = {"problems": len(mine), **{stage: counts[stage] for stage in (*_STAGES, DROPPED)}}
    for stage in options.sampled_stages():
        first = next((told for wave, told in history if wave.stage.name == stage.name), ())
        judged = [stage.accepts(sample) for sample in first if sample.problem_id in ids]
        found[f"{stage.name}_accuracy"] = _share(sum(judged), len(judged))
    return found


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


# ---- as Markdown ----


def markdown(statistics: Mapping[str, Any], model: str) -> str:
    """The statistics as a page."""
    table1, rows = statistics["table1"], statistics["rows"]
    parts = ["# Data rewriting", _table1_lines(table1, model)]
    origins = ", ".join(f"{count} {origin}" for origin, count in rows["by_origin"].items())
    lines = [f"{statistics['num_problems']} problems. Rows by whose text they have: {origins}."]
    if rows["model_tokens"]:
        lines.append(f"The model's own texts: {rows['model_tokens']} tokens, {rows['model_truncated']} texts cut off.")
    parts.append("\n".join(lines))
    for title, key in (("Fallback, by reason", "fallback_reasons"), ("Dropped, by reason", "dropped")):
        if statistics[key]:
            parts.append(_lines(["reason", "problems"], [[k, str(v)] for k, v in statistics[key].items()], title))
    parts.append(_sampling_lines(statistics["sampling"]))
    if statistics["by_level"]:
        parts.append(_level_lines(statistics["by_level"]))
    return "\n\n".join(parts) + "\n"


def _table1_lines(table1: Mapping[str, Any], model: str) -> str:
    """The form of the paper's Table 1, with shares."""
    cells = [f"{table1[key]['count']:,} ({_percent(table1[key]['share'])})" for key in (*_STAGES, "total")]
    return _lines(["", "Self-alignment", "Guided-alignment", "Fallback", "Total"], [[model, *cells]])


def _sampling_lines(sampling: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(sampling)
    rows = [
        ["problems", *(str(sampling[c]["problems"]) for c in columns)],
        ["solved", *(f"{sampling[c]['solved']} ({_percent(sampling[c]['solved_share'])})" for c in columns)],
        ["accepted in the first wave", *(_percent(sampling[c]["first_wave_accuracy"]) for c in columns)],
        ["samples", *(f"{sampling[c]['samples']:,}" for c in columns)],
        ["samples if all n were drawn", *(f"{sampling[c]['samples_literal']:,}" for c in columns)],
        ["samples by wave", *(" + ".join(map(str, sampling[c]["waves"])) for c in columns)],
        ["tokens", *(f"{sampling[c]['tokens']:,}" for c in columns)],
        ["cut off", *(str(sampling[c]["truncated"]) for c in columns)],
        ["cut off, but correct", *(str(sampling[c]["correct_truncated"]) for c in columns)],
        *([f"verdict {name}", *(str(sampling[c]["verdicts"][name]) for c in columns)] for name in VERDICTS),
        ["n, temperature, top-p", *(_drawn(sampling[c]) for c in columns)],
        ["prompt, verifier", *(f"{sampling[c]['prompt']}, {sampling[c]['verifier']}" for c in columns)],
    ]
    return _lines(["", *columns], rows, "Sampling, by stage")


def _drawn(stage: Mapping[str, Any]) -> str:
    return f"{stage['n']}, {stage['temperature']}, {stage['top_p']}"


def _level_lines(by_level: Mapping[str, Mapping[str, Any]]) -> str:
    header = ["level", "problems", "self", "guided", "fallback", "dropped", "self accuracy", "guided accuracy"]
    rows = [
        [
            level,
            *(str(found[key]) for key in ("problems", *_STAGES, DROPPED)),
            *(_percent(found.get(f"{stage}_accuracy")) for stage in (SELF, GUIDED)),
        ]
        for level, found in by_level.items()
    ]
    return _lines(header, rows, "By level (accuracy: of the first wave)")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {title}\n\n{table}" if title else table
