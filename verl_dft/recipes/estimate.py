"""What a recipe would cost: tokens, optimizer steps and GPU-hours, from assumptions that are keys. An estimate."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_dft.recipes.plan import Planned

BENCHMARK_SIZES = {
    "aime24": 30, "amc23": 40, "amc83": 83, "arithmetic": 180, "college_math": 2818, "gaokao2023en": 385,
    "gsm8k": 1319, "gsm8k_train": 7473, "math": 5000, "math500": 500, "math_train": 7500, "mawps": 2065,
    "minerva_math": 272, "mmlu_stem": 3018, "olympiadbench": 675, "sat_math": 32, "svamp": 1000, "tabmwp": 1000,
}  # fmt: skip
"""Problems of each benchmark, as docs/benchmarks.md has them."""
_DATA_SIZES = {"gsm8k": 7473, "math": 7500, "numinamath_cot": 859_494, "arithmetic": 768}


@dataclass
class Cost:
    """Of one step. ``rows``: training rows or problems that it leaves for others. Hours are None where unknown."""

    rows: float = 0.0
    steps: int = 0
    trained_tokens: float = 0.0
    sampled_tokens: float = 0.0
    gpu_hours: float | None = 0.0


def estimates(steps: Sequence[Planned], assumed: Mapping[str, float]) -> dict[str, Cost]:
    """A cost for every step by its name; ``assumed``: ``estimate`` of recipes/scales.yaml."""
    found: dict[str, Cost] = {}
    by_folder: dict[str, str] = {}
    sizes: dict[str, float | None] = {}
    for step in steps:
        sources = {key: _source(value, by_folder) for key, value in step.values.items()}
        rows = [found[name].rows for name in sources.values() if name]
        given = next((found[n].rows for k, n in sources.items() if n and k in ("data", "data.train_files")), None)
        model = sources.get("model") or sources.get("model.path")
        sizes[step.name] = (
            sizes[model] if model else _size(str(step.values.get("model", step.composed.get("model.path"))))
        )
        given = given if given is not None else (max(rows) if rows else None)
        found[step.name] = _cost(step, given, dict(assumed), sizes[step.name])
        by_folder[str(step.folder)] = step.name
    return found


def _source(value: Any, by_folder: Mapping[str, str]) -> str | None:
    """The step that makes ``value``, where it is one of this run's files."""
    return next((name for folder, name in by_folder.items() if str(value).startswith(f"{folder}/")), None)


def _cost(step: Planned, given: float | None, assumed: dict[str, float], size: float | None) -> Cost:
    counts = {"sample": _sampled, "rewrite": _sampled, "groups": _sampled, "evaluate": _evaluated}
    problems = given if given is not None else _num_rows(step)
    limit = step.composed.get("limit")
    problems = min(problems, limit) if limit else problems
    verb = step.verb.split()[0]
    if verb == "data":
        return Cost(rows=problems)
    if verb in ("analyze", "compare"):
        return Cost()
    if verb == "reject":
        return Cost(rows=problems * assumed.get("solve_rate", 0.5))
    if verb in counts:
        return _with_hours(counts[verb](step, problems, assumed), size, assumed)
    if verb in ("train", "rl", "score"):
        return _with_hours(_trained(step, verb, problems, assumed), size, assumed, _flops(step, verb))
    return Cost(rows=problems)


def _num_rows(step: Planned) -> float:
    wanted = step.composed.get("data.source.num_rows")
    return float(wanted or _DATA_SIZES.get(str(step.composed.get("data.source.name")), 0))


def _response(step: Planned, assumed: Mapping[str, float], *limits: str) -> float:
    """Tokens of a response: as assumed, never above the step's own limit."""
    found = [step.composed.get(key) for key in limits]
    return min([assumed.get("response_tokens", 500), *[value for value in found if value]])


def _sampled(step: Planned, problems: float, assumed: Mapping[str, float]) -> Cost:
    get, verb = step.composed.get, step.verb
    length = _response(step, assumed, "max_tokens" if verb == "sample" else "self.max_tokens")
    if verb == "sample":
        return Cost(rows=problems * get("n", 1), sampled_tokens=problems * get("n", 1) * length)
    if verb == "rewrite":  # all n samples of the first stage, and of the second for what is left: the upper end
        left = 1 - assumed.get("solve_rate", 0.5)
        return Cost(rows=problems, sampled_tokens=problems * length * (get("self.n", 8) + left * get("guided.n", 8)))
    counts = {name: get(f"composition.{name}", 0) for name in ("expert", "teacher", "self")}
    own = 0 if get("samples") else counts["self"]
    return Cost(rows=problems * sum(counts.values()), sampled_tokens=problems * own * length)


def _evaluated(step: Planned, problems: float, assumed: Mapping[str, float]) -> Cost:
    tokens = 0.0
    models = step.values.get("model")
    for config in step.composed.configs:
        size = BENCHMARK_SIZES.get(config.benchmark.name, 0)
        generator = config.benchmark.get("generator")
        size = generator.num_problems if generator else size
        size = min(size, config.limit) if config.limit else size
        tokens += size * config.n * min(assumed.get("response_tokens", 500), config.max_tokens)
    return Cost(sampled_tokens=tokens * (len(models) if isinstance(models, list) else 1))


def _trained(step: Planned, verb: str, rows: float, assumed: Mapping[str, float]) -> Cost:
    get = step.composed.get
    batch = get("data.train_batch_size", 1)
    if verb == "score":
        return Cost(rows=rows, trained_tokens=rows * _row_tokens(step, assumed))
    limit, epochs = get("trainer.total_training_steps"), get("trainer.total_epochs", 1)
    steps = int(limit or max(rows // batch, 1) * epochs)
    if verb == "train":
        return Cost(rows=rows, steps=steps, trained_tokens=steps * batch * _row_tokens(step, assumed))
    responses = steps * batch * get("actor_rollout_ref.rollout.n", 1)
    length = _response(step, assumed, "data.max_response_length")
    trained = responses * (length + min(assumed.get("prompt_tokens", 150), get("data.max_prompt_length", 1024)))
    return Cost(rows=rows, steps=steps, trained_tokens=trained, sampled_tokens=responses * length)


def _row_tokens(step: Planned, assumed: Mapping[str, float]) -> float:
    whole = assumed.get("prompt_tokens", 150) + assumed.get("response_tokens", 500)
    return min(whole, step.composed.get("data.max_length", whole))


def _flops(step: Planned, verb: str) -> float:
    """FLOPs per parameter and trained token: 6 of an update, 2 of each further forward pass."""
    if verb == "score":
        return 2.0
    if verb == "rl":  # the old policy's log-probs; the critic's values and updates
        return 16.0 if step.composed.get("algorithm.adv_estimator") == "gae" else 8.0
    target = str(step.composed.get("objective._target_", ""))
    if step.composed.get("objective.name") == "dpo":  # two responses, and the reference's log-probs
        return 16.0
    return 8.0 if any(name in target for name in ("iw_sft", "asft", "psft")) else 6.0


def _with_hours(cost: Cost, size: float | None, assumed: Mapping[str, float], per_token: float = 6.0) -> Cost:
    if "peak_tflops" not in assumed or size is None:
        cost.gpu_hours = None
        return cost
    peak = assumed["peak_tflops"] * 1e12 * 3600
    training = per_token * size * cost.trained_tokens / (peak * assumed["mfu_training"])
    sampling = 2 * size * cost.sampled_tokens / (peak * assumed["mfu_sampling"])
    cost.gpu_hours = training + sampling
    return cost


def _size(name: str) -> float | None:
    """Parameters of a model: of its weights where they are here, else by its name (``Qwen2.5-Math-1.5B``)."""
    weights = Path(name) / "model.safetensors"
    if weights.is_file():
        with open(weights, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes = [entry["shape"] for key, entry in header.items() if key != "__metadata__"]
        return float(sum(_product(shape) for shape in shapes))
    match = re.search(r"(\d+(?:\.\d+)?)([BbMm])(?![a-z])", Path(name).name)
    return float(match[1]) * (1e9 if match[2] in "Bb" else 1e6) if match else None


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
