"""One evaluation: problems -> prompts -> samples (vLLM) -> verdicts -> numbers, written beside each other.

``result.json`` holds the numbers and what they depend on, ``samples.parquet`` every sample with its seed, length,
finish reason and verdict, so that a number can be traced to texts. ``store/`` is where samples go as they are made: a
run that was interrupted goes on from there, and one with other grading options grades again without a model.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.evaluation.benchmarks import Benchmark, load_benchmark
from verl_dft.evaluation.samples import Prompts, make_prompts, sample, wanted_samples
from verl_dft.evaluation.summary import summarize
from verl_dft.grading.pool import Grade, GradeItem, GraderPool
from verl_dft.sampling.engine import GeneratedText
from verl_dft.sampling.source import TextSource
from verl_dft.sampling.store import StoredSample

# Options that cannot change a result; a folder made with other values of these may be overwritten.
_VOLATILE = ("output_dir", "overwrite", "grading", "regrade", "preset", "data_dir", "licences")
PRESETS: dict[str, dict[str, Any]] = {"dft": {"temperature": 1.0}, "gft": {"temperature": 0.5}}
"""Sampling options of the papers' evaluations: for each key that the configuration leaves null, the preset's value."""
_DEFAULTS = {"preset": "dft", "shard_size": 256, "deterministic": True, "regrade": False}


def evaluate(config: Mapping[str, Any], source: TextSource | None = None) -> dict[str, Any]:
    """Evaluate one model on one benchmark, or finish doing so: stored samples are never generated again.

    Args:
        config: ``configs/evaluate.yaml`` composed, with ``models`` naming one model.
        source: what samples, instead of a vLLM engine started here. It is not closed.

    Returns:
        The result as written to ``<output_dir>/result.json``. Fractions are of samples; ``avg_ci95`` is clustered by
        problem; ``truncated_frac`` counts samples cut off by ``max_tokens`` or the context.

    Raises:
        InputError: anything a user can put right.
    """
    config = _with_defaults(_plain(config))
    model = _one_model(config)
    folder = Path(config["output_dir"] or default_output_dir(model, config["benchmark"]["name"]))
    _check_options(config)
    _check_folder(folder, config)
    started = time.monotonic()
    benchmark = load_benchmark(config["benchmark"], config["limit"])
    prompts = make_prompts(model, benchmark, config)
    wanted = wanted_samples(model, benchmark, prompts, config)
    sampled, seconds = sample(folder, model, wanted, prompts.max_model_len, config, source)
    generated = [stored.text for stored in sampled.samples]
    sampled_at = time.monotonic()
    graded = _grade(benchmark, generated, config)
    seconds |= {"generation": sampled.seconds, "grading": round(time.monotonic() - sampled_at, 2)}
    rows = _sample_rows(config, model, benchmark, sampled.samples, graded)
    result = _result(config, model, benchmark, prompts, rows)
    result |= {"engine": sampled.facts[-1], "num_reused": sampled.num_reused, "num_generated": sampled.num_generated}
    result["seconds"] = {**seconds, "total": round(time.monotonic() - started, 2)}
    _write(folder, config, result, rows)
    return result


def default_output_dir(model: str, benchmark: str) -> str:
    """``runs/evaluate/<last two parts of the model's name>/<benchmark>``."""
    parts = [part for part in Path(model).parts if part not in ("/", ".", "..")]
    return str(Path("runs", "evaluate", "-".join(parts[-2:]), benchmark))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    from omegaconf import DictConfig, OmegaConf

    return OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {**_DEFAULTS, **config}
    if config["preset"] not in PRESETS:
        raise InputError(f"preset={config['preset']} is not one of {', '.join(PRESETS)}")
    preset = PRESETS[config["preset"]]
    return config | {key: value for key, value in preset.items() if config.get(key) is None}


def _one_model(config: Mapping[str, Any]) -> str:
    models = config["models"]
    models = [models] if isinstance(models, str) else list(models)
    assert len(models) == 1, "evaluate() takes one model; evaluate_all() several"
    return models[0]


_LEAST: tuple[tuple[str, int, Any], ...] = (
    ("n", 1, int), ("max_tokens", 1, int), ("shard_size", 1, int), ("top_k", 0, int), ("temperature", 0, int | float),
)  # fmt: skip


def _check_options(config: Mapping[str, Any]) -> None:
    for name, least, kind in _LEAST:
        value = config[name]
        if not isinstance(value, kind) or isinstance(value, bool) or value < least:
            whole = "a whole number" if kind is int else "a number"
            raise InputError(f"{name}={value}; it must be {whole} of at least {least}")
    if not 0 < config["top_p"] <= 1:
        raise InputError(f"top_p={config['top_p']}; it must be above 0 and at most 1")
    if config["temperature"] == 0 and config["n"] > 1:
        raise InputError(f"temperature=0 gives the same text {config['n']} times; use n=1, or a temperature above 0")


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({k: v for k, v in config.items() if k not in _VOLATILE}, default=str))


def _check_folder(folder: Path, config: Mapping[str, Any]) -> None:
    old = folder / "config.json"
    if config["overwrite"] or not old.is_file():
        return
    before, now = json.loads(old.read_text()), _identity(config)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        raise InputError(
            f"{folder} holds a result made with another configuration ({', '.join(changed)} differ); "
            "give another output_dir, or overwrite=true"
        )


def _grade(benchmark: Benchmark, generated: Sequence[GeneratedText], config: Mapping[str, Any]) -> list[Grade]:
    from tqdm import tqdm

    n = config["n"]
    pairs = zip((p for p in benchmark.problems for _ in range(n)), generated, strict=True)
    items = [GradeItem(text.text, problem.answer, problem.answer_type, problem.tolerance) for problem, text in pairs]
    with GraderPool(**config["grading"]) as pool:
        with tqdm(total=len(items), desc="grading", unit="sample", disable=not sys.stderr.isatty()) as bar:
            return pool.grade(items, bar.update)


def _result(
    config: Mapping[str, Any], model: str, benchmark: Benchmark, prompts: Prompts, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    kept = ("n", "temperature", "top_p", "top_k", "max_tokens", "prompt", "limit", "seed")
    levels = {problem.id: problem.level for problem in benchmark.problems}
    return {
        "model": model,
        "benchmark": benchmark.name,
        **{key: config[key] for key in (*kept, "shard_size", "deterministic")},
        **summarize(rows, [problem.id for problem in benchmark.problems], config["n"], levels),
        "num_context_limited": prompts.num_context_limited,
        "origin": benchmark.origin,
    }


def _sample_rows(
    config: Mapping[str, Any],
    model: str,
    benchmark: Benchmark,
    samples: Sequence[StoredSample],
    grades: Sequence[Grade],
) -> list[dict[str, Any]]:
    rows = []
    for position, (stored, grade) in enumerate(zip(samples, grades, strict=True)):
        problem, text = benchmark.problems[position // config["n"]], stored.text
        row = {"problem_id": problem.id, "index": stored.index, "seed": stored.seed, "model": model}
        row |= {"prompt_name": config["prompt"], "response": text.text, "token_ids": text.token_ids}
        row |= {"num_tokens": text.num_tokens, "finish_reason": text.finish_reason, "grade": grade.verdict}
        row |= {"qwen": grade.qwen, "answer": grade.answer, "gold": problem.answer, "rule": grade.rule}
        rows.append(row | {"detail": grade.detail, "problem": problem.problem})
    return rows


def _write(folder: Path, config: Mapping[str, Any], result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Samples first, the result last: a folder with a result is complete."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from verl_dft.config import command_line
    from verl_dft.evaluation.report import write_report
    from verl_dft.files import atomic_write, versions, write_json

    result |= {"versions": versions(), "command": command_line()}
    result |= {"written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    (folder / "result.json").unlink(missing_ok=True)
    with atomic_write(folder / "samples.parquet", "wb") as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
    write_json(folder / "config.json", _identity(config))
    write_json(folder / "result.json", result)
    write_report(folder)
    result["output_dir"] = str(folder)
