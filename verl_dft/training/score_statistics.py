"""Statistics of scored rows: by origin, and by stage of data rewriting (Table 3 of the data rewriting paper).

The unit of chance is the problem: rows of one problem are alike, and so are a response's tokens. Every mean here is a
ratio of two sums over problems, and its standard error is that of the ratio, clustered by problem.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl_dft.origins import ORIGINS

STAGES = ("self", "guided", "expert")
"""Origins of rewritten rows; ``expert`` is the fallback, whose text is the expert's own."""


@dataclass(frozen=True)
class Scored:
    """What the statistics need of scored rows.

    problems, origins: [rows] problem id and origin. logp: [rows] float64, nats, summed over a response's tokens.
    tokens: [rows]. kl: name -> [rows] float64, nats, summed likewise.
    """

    problems: Sequence[str]
    origins: Sequence[str]
    logp: np.ndarray
    tokens: np.ndarray
    kl: Mapping[str, np.ndarray]

    def take(self, chosen: np.ndarray) -> "Scored":
        """The rows of a boolean mask."""
        at = chosen.nonzero()[0]
        pick = [list(np.asarray(values, dtype=object)[at]) for values in (self.problems, self.origins)]
        return Scored(*pick, self.logp[at], self.tokens[at], {name: value[at] for name, value in self.kl.items()})


def summarise(problems: Sequence[str], origins: Sequence[str], values: np.ndarray, counts: np.ndarray,
              names: Sequence[str]) -> Scored:  # fmt: skip
    """Sums by row.

    Args:
        values: [k, tokens] float32 of all rows, one after the other: log-probs, then one line for each of ``names``.
        counts: [rows] tokens of each row, at least 1.
    """
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    sums = np.add.reduceat(values.astype(np.float64), starts, axis=1)
    return Scored(list(problems), list(origins), sums[0], counts, dict(zip(names, sums[1:], strict=True)))


def ratio(numerators: np.ndarray, denominators: np.ndarray, clusters: Sequence[str]) -> dict[str, float | None]:
    """Sum over sum, and its standard error by the linearised ratio estimator over clusters (None for one cluster).

    se = sqrt(P / (P - 1) * sum_p (N_p - R D_p)^2) / sum_p D_p, for P clusters.
    """
    _, at = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    n, d = (np.bincount(at, weights=values.astype(np.float64)) for values in (numerators, denominators))
    mean = float(n.sum() / d.sum())
    return {"mean": mean, "se": _deviation((n - mean * d) / d.sum())}


def _deviation(influence: np.ndarray) -> float | None:
    count = len(influence)
    return float(np.sqrt(count / (count - 1) * (influence**2).sum())) if count > 1 else None


def describe(rows: Scored) -> dict[str, Any]:
    """Counts, mean sequence sum and per-token mean of some rows."""
    ones = np.ones(len(rows.tokens))
    found: dict[str, Any] = {
        "problems": len(set(rows.problems)),
        "rows": len(rows.tokens),
        "tokens": int(rows.tokens.sum()),
        "sequence_sum": ratio(rows.logp, ones, rows.problems),
        "per_token": ratio(rows.logp, rows.tokens, rows.problems),
    }
    return found | {name: ratio(value, rows.tokens, rows.problems) for name, value in rows.kl.items()}


def by_origin(rows: Scored) -> dict[str, Any]:
    """:func:`describe` of the rows of each origin, and of all."""
    origins = np.asarray(rows.origins)
    found = {name: describe(rows.take(origins == name)) for name in ORIGINS if (origins == name).any()}
    return {**found, "all": describe(rows)}


def by_stage(rewritten: Scored, expert: Scored) -> dict[str, Any]:
    """The expert's and the rewritten text of each stage's problems, and the difference (Table 3).

    Args:
        rewritten: rows with the origins of :data:`STAGES`; a problem's stage is its row's origin.
        expert: expert texts of these problems.

    Problems without an expert text are counted and left out of both numbers.
    """
    known, stages = set(expert.problems), {}
    origins = np.asarray(rewritten.origins)
    has_expert = np.array([problem in known for problem in rewritten.problems])
    for stage in STAGES:
        at_stage = origins == stage
        ours = rewritten.take(at_stage & has_expert)
        if not at_stage.any():
            continue
        lacking = len(set(rewritten.take(at_stage & ~has_expert).problems))
        stages[stage] = {"problems_without_expert": lacking}
        if len(ours.problems):
            inside = set(ours.problems)
            theirs = expert.take(np.array([problem in inside for problem in expert.problems]))
            difference = {
                "sequence_sum": _difference(ours, theirs, per_token=False),
                "per_token": _difference(ours, theirs, per_token=True),
            }
            stages[stage] |= {"expert": describe(theirs), "rewritten": describe(ours), "difference": difference}
    return stages


def _difference(ours: Scored, theirs: Scored, per_token: bool) -> dict[str, float | None]:
    """Rewritten minus expert on the same problems, with the standard error of the paired difference."""
    names = sorted(set(ours.problems))
    mean, influence = 0.0, np.zeros(len(names))
    for sign, rows in ((1, ours), (-1, theirs)):
        at = np.searchsorted(np.asarray(names), np.asarray(rows.problems))
        weights = rows.tokens if per_token else np.ones(len(rows.tokens))
        n = np.bincount(at, weights=rows.logp, minlength=len(names))
        d = np.bincount(at, weights=weights, minlength=len(names))
        r = n.sum() / d.sum()
        mean += sign * r
        influence += sign * (n - r * d) / d.sum()
    return {"mean": float(mean), "se": _deviation(influence)}


def markdown(statistics: Mapping[str, Any]) -> str:
    """The statistics file for reading. Log-probs and KL are in nats, ± is one standard error over problems."""
    lines = [
        "# Log-probabilities of rows",
        "",
        f"Model: {statistics['model']}. Log-probs in nats; ± is one standard error, clustered by problem.",
        "",
    ]
    rows = statistics["rows"]
    lines += [f"- {name.replace('_', ' ')}: {count}" for name, count in rows.items() if count]
    kl = [name for name in statistics["by_origin"]["all"] if name.startswith("kl_")]
    header = ["origin", "problems", "rows", "tokens", "sum over a response", "per token"]
    header += [_KL_TITLE[name] for name in kl]
    body = [
        [name, *(str(d[key]) for key in ("problems", "rows", "tokens")), *_cells(d, ("sequence_sum", "per_token", *kl))]
        for name, d in statistics["by_origin"].items()
    ]
    lines += ["", "## By origin", "", *_table(header, body)]
    if kl:
        lines += ["", f"Reference: {statistics['reference']}. KL of whole next-token distributions, per scored token."]
    if "by_stage" in statistics:
        lines += ["", "## By stage", "", *_stage_table(statistics["by_stage"])]
    return "\n".join(lines) + "\n"


_KL_TITLE = {"kl_model_reference": "KL(model ‖ reference)", "kl_reference_model": "KL(reference ‖ model)"}


def _stage_table(stages: Mapping[str, Any]) -> list[str]:
    header = ["stage", "problems", "text", "rows", "tokens", "sum over a response", "per token"]
    body = []
    for stage, found in stages.items():
        for text in ("expert", "rewritten", "difference") if "expert" in found else ():
            part = found[text]
            counts = [str(part.get(key, "")) for key in ("rows", "tokens")]
            problems = str(found["expert"]["problems"])
            body.append([stage, problems, text, *counts, *_cells(part, ("sequence_sum", "per_token"))])
    lines = _table(header, body)
    lacking = {stage: found["problems_without_expert"] for stage, found in stages.items()}
    if any(lacking.values()):
        shown = ", ".join(f"{stage} {count}" for stage, count in lacking.items() if count)
        lines += ["", f"Left out, for want of an expert text of the problem: {shown}."]
    return lines


def _cells(found: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [_number(found[name], 2 if name == "sequence_sum" else 4) for name in names]


def _number(value: Mapping[str, float | None], digits: int) -> str:
    error = value["se"]
    return f"{value['mean']:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---" if i == 0 else "---:" for i in range(len(header))]
    return [f"| {' | '.join(line)} |" for line in (header, rule, *body)]
