"""What a run measured, by model and method: accuracies, counts of stages, log-probs, KL, a training's last values.

Accuracies keep their problems, so that a difference is taken problem by problem. Runs that differ in the loop variable
``seed`` alone are repetitions: their mean is shown, with Student's t interval over them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from verl_dft.analysis.estimates import from_error
from verl_dft.errors import InputError
from verl_dft.evaluation.compare import load_results
from verl_dft.report.expected import method_of
from verl_dft.report.numbers import Columns, Number, accuracy
from verl_dft.report.runs import Run, RunStep, read_json

KINDS = {
    "evaluation": "Accuracy",
    "pass@128": "pass@128",
    "pass@256": "pass@256",
    "stages": "Stages that the texts come from",
    "logp": "Log-probs by stage",
    "kl": "KL divergence from the reference",
    "scored": "Log-prob of the scored rows",
    "training": "Training, last values",
}
_PASS_K = (128, 256)
_KL = {"kl_model_reference": "kl", "kl_reference_model": "kl_reverse"}
_LAST = {"train/loss": "loss", "critic/rewards/mean": "reward"}

Measured = dict[str, dict[tuple[str, str], dict[str, Columns]]]
"""Kind -> (model, method) -> seed -> column -> number."""
Entry = tuple[str, str, str, str, str, Number]
"""Kind, model, method, seed, column, number."""


def collect(run: Run) -> Measured:
    """Everything that the finished steps of a run measured.

    Files that cannot be read go to ``run.problems``, and so do two steps that measured the same of the same: the first
    one's numbers stand.
    """
    found: Measured = {kind: {} for kind in KINDS}
    readers = {"evaluate": _evaluations, "rewrite": _stages, "score": _scores, "train": _training, "rl": _training}
    for step in run.steps:
        reader = readers.get(step.verb.split()[0])
        if reader is None or not step.done:
            continue
        try:
            for kind, model, method, seed, column, number in reader(run, step):
                columns = found[kind].setdefault((model, method), {}).setdefault(seed, {})
                if column in columns:
                    run.problems.append(_twice(step, columns[column], kind, model, method, seed, column))
                columns.setdefault(column, number)
        except InputError as error:
            run.problems.append(f"{step.name}: {error}".replace(f"{run.root}/", ""))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            run.problems.append(f"{step.name}: its results are not as verl-dft {step.verb} writes them ({error!r})")
    return found


def _twice(step: RunStep, first: Number, kind: str, model: str, method: str, seed: str, column: str) -> str:
    whose = ", ".join(part for part in (model, method, f"seed {seed}" if seed else "") if part)
    return (
        f"{step.name}: its {column} of {whose} ({kind}) is left out, for {', '.join(first.steps)} has one too; give "
        "the steps or their arms other names"
    )


# ---- readers ----


def _evaluations(run: Run, step: RunStep) -> Iterable[Entry]:
    found = [result for path in step.results for result in load_results(path.parent).values()]
    names = [result["benchmark"] for result in found]
    for result in found:
        whose, method = step, method_of(step.step, step.arms)
        if len(set(names)) < len(names):  # several models: each is called by the training that made it
            maker = _maker(run, str(result["model"]))
            whose, method = maker or step, method_of(maker.step, maker.arms) if maker else Path(result["model"]).name
        model, seed = whose.arm.get("model", ""), whose.seed
        yield "evaluation", model, method, seed, result["benchmark"], accuracy(result, step.name)
        for k in _PASS_K:
            if k <= int(result["n"]):
                yield f"pass@{k}", model, method, seed, result["benchmark"], accuracy(result, step.name, k)


def _maker(run: Run, model: str) -> RunStep | None:
    """The training whose model it is; folders may have been moved, so their last two parts decide."""
    trainings = [step for step in run.steps if step.verb in ("train", "rl")]
    return next((step for step in trainings if f"/{'/'.join(step.folder.parts[-2:])}/" in f"{model}/"), None)


def _stages(run: Run, step: RunStep) -> Iterable[Entry]:
    method = "rewriting" if not set(step.arms) - {"model"} else method_of(step.step, step.arms)
    counts = read_json(step.folder / "statistics.json")["table1"]
    for stage, column in (("self", "self"), ("guided", "guided"), ("fallback", "expert"), ("total", "total")):
        count = float(counts[stage]["count"])
        yield ("stages", step.arm.get("model", ""), method, step.seed, column,
               Number(count, None, None, "", "", "problems", (step.name,)))  # fmt: skip


def _scores(run: Run, step: RunStep) -> Iterable[Entry]:
    statistics, model = read_json(step.folder / "statistics.json"), step.arm.get("model", "")
    for stage, found in statistics.get("by_stage", {}).items():
        problems = found.get("expert", {}).get("problems", 0)
        for text, method in (("expert", "sft"), ("rewritten", "rewriting"), ("difference", "rewriting minus sft")):
            if text in found and not (stage == "expert" and text != "expert"):
                number = _estimate(
                    found[text]["sequence_sum"], problems, "nats per response", "summed over a response", step
                )
                yield "logp", model, method, step.seed, stage, number
    everything = statistics["by_origin"]["all"]
    if "by_stage" not in statistics and not any(name in everything for name in _KL):
        number = _estimate(everything["per_token"], everything["problems"], "nats per token", "mean", step)
        yield "scored", model, _scored_method(step), step.seed, "all", number
    for name, column in _KL.items():
        if name in everything:
            number = _estimate(everything[name], everything["problems"], "nats per token", name.replace("_", " "), step)
            yield "kl", model, _scored_method(step), step.seed, column, number


def _scored_method(step: RunStep) -> str:
    """Arms that are no methods (steps of a training, models) do not say alone what was scored: the step's name does."""
    own, method = method_of(step.step, {}), method_of(step.step, step.arms)
    return method if "method" in step.arms or not set(step.arms) - {"model"} else f"{own}-{method}"


def _estimate(found: Mapping[str, Any], problems: int, unit: str, metric: str, step: RunStep) -> Number:
    estimate = from_error(float(found["mean"]), found["se"], problems)
    return Number(estimate.mean, estimate.low, estimate.high, "problems", metric, unit, (step.name,))


def _training(run: Run, step: RunStep) -> Iterable[Entry]:
    from verl_dft.training.metrics import read_metrics

    rows = read_metrics(step.folder / "metrics.jsonl")
    last = {key: value for row in rows for key, value in row.items()}
    model, method = step.arm.get("model", ""), method_of(step.step, step.arms)

    def entry(column: str, value: float, metric: str, unit: str, ends: Sequence[float | None] = (None, None)) -> Entry:
        over = "problems" if ends[0] is not None else ""
        number = Number(value, ends[0], ends[1], over, metric, unit, (step.name,))
        return "training", model, method, step.seed, column, number

    for key, value in last.items():
        if match := re.fullmatch(r"eval/(.+)/avg", key):
            ends = [last.get(f"eval/{match[1]}/ci95_{end}") for end in ("low", "high")]
            percent = [None if end is None else 100 * end for end in ends]
            yield entry(match[1], 100 * value, "accuracy at the last step", "%", percent)
    rectified = [row["train/rectified_frac"] for row in rows if "train/rectified_frac" in row]
    if rectified:
        yield entry("rectified_frac", 100 * fmean(rectified), "share of rectified tokens, mean over steps", "%")
    for key, column in _LAST.items():
        if key in last:
            yield entry(column, last[key], f"{key} at the last step", "")
