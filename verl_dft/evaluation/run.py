"""One evaluation: problems -> prompts -> samples (vLLM) -> verdicts -> numbers, written beside each other.

``result.json`` holds the numbers and what they depend on, ``samples.parquet`` every sample with its seed, length,
finish reason and verdict, so that a number can be traced to texts and texts can be graded again.
"""

import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from verl_dft.errors import InputError
from verl_dft.evaluation import metrics
from verl_dft.evaluation.benchmarks import Benchmark, load_benchmark
from verl_dft.grading.pool import VERDICTS, Grade, GradeItem, GraderPool
from verl_dft.sampling.engine import GeneratedText, SampleRequest, VLLMEngine, context_length, load_config
from verl_dft.sampling.seeds import sample_seed

WARN_FRAC = 0.05
"""Share of truncated or answerless samples above which a result gets a warning."""
# Options that cannot change a result; a folder made with other values of these may be overwritten.
_VOLATILE = ("output_dir", "overwrite", "grading")


@dataclass(frozen=True)
class Prompts:
    """Token ids of each problem's prompt, the ids that end a response, and how many prompts leave less than max_tokens
    of the context."""

    ids: list[list[int]]
    stop_token_ids: list[int]
    max_model_len: int
    num_context_limited: int


def evaluate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate one model on one benchmark.

    Args:
        config: ``configs/evaluate.yaml`` composed, with ``models`` naming one model.

    Returns:
        The result as written to ``<output_dir>/result.json``. Fractions are of samples; ``avg_ci95`` is clustered by
        problem; ``truncated_frac`` counts samples cut off by ``max_tokens`` or the context.

    Raises:
        InputError: anything a user can put right.
    """
    config = _plain(config)
    model = _one_model(config)
    folder = Path(config["output_dir"] or default_output_dir(model, config["benchmark"]["name"]))
    _check_options(config)
    _check_folder(folder, config)
    started = time.monotonic()
    benchmark = load_benchmark(config["benchmark"], config["limit"])
    prompts = make_prompts(model, benchmark, config)
    requests = _requests(benchmark, prompts, config)
    generated, engine = _generate(model, requests, prompts.max_model_len, config)
    graded = _grade(benchmark, generated, config)
    result = _result(config, model, benchmark, prompts, generated, graded)
    result["engine"] = engine
    result["seconds"] = {**engine.pop("seconds"), "total": round(time.monotonic() - started, 2)}
    _write(folder, config, result, _sample_rows(config, model, benchmark, requests, generated, graded))
    return result


def default_output_dir(model: str, benchmark: str) -> str:
    """``runs/evaluate/<last two parts of the model's name>/<benchmark>``."""
    parts = [part for part in Path(model).parts if part not in ("/", ".", "..")]
    return str(Path("runs", "evaluate", "-".join(parts[-2:]), benchmark))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    from omegaconf import DictConfig, OmegaConf

    return OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)


def _one_model(config: Mapping[str, Any]) -> str:
    models = config["models"]
    models = [models] if isinstance(models, str) else list(models)
    assert len(models) == 1, "evaluate() takes one model; evaluate_all() several"
    return models[0]


def _check_options(config: Mapping[str, Any]) -> None:
    for name, least in (("n", 1), ("max_tokens", 1), ("temperature", 0), ("top_k", 0)):
        value = config[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or value < least:
            raise InputError(f"{name}={value}; it must be a number of at least {least}")
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


def make_prompts(model: str, benchmark: Benchmark, config: Mapping[str, Any]) -> Prompts:
    """Prompts through the named template and the tokenizer's chat template, checked against the model's context.

    Raises:
        InputError: unknown prompt, tokenizer without a chat template, or a prompt that fills the context.
    """
    from verl_dft.data.prompts import render_messages
    from verl_dft.data.sources import load_tokenizer
    from verl_dft.data.template import ConversationEncoder

    messages = [render_messages(config["prompt"], problem.problem) for problem in benchmark.problems]
    encoder = ConversationEncoder(load_tokenizer(model))
    ids = encoder.encode_prompts(messages, lambda i: f"problem {benchmark.problems[i].id}")
    engine, wanted = config["engine"], config["max_tokens"]
    context = engine["max_model_len"] or context_length(load_config(model, engine["trust_remote_code"]))
    for problem, prompt in zip(benchmark.problems, ids, strict=True):
        if len(prompt) >= context:
            raise InputError(
                f"the prompt of problem {problem.id} has {len(prompt)} tokens, the context of {model} {context}; "
                "leave the problem out, or use a model with a longer context"
            )
    longest = max(map(len, ids)) + wanted
    limited = sum(len(prompt) + wanted > context for prompt in ids)
    return Prompts(ids, sorted(encoder.end_ids), engine["max_model_len"] or min(longest, context), limited)


def _requests(benchmark: Benchmark, prompts: Prompts, config: Mapping[str, Any]) -> list[SampleRequest]:
    """Problem by problem, sample by sample: an order that is part of what makes a result reproducible."""
    shared = {key: config[key] for key in ("temperature", "top_p", "top_k", "max_tokens")}
    return [
        SampleRequest(ids, sample_seed(config["seed"], problem.id, i), stop_token_ids=prompts.stop_token_ids, **shared)
        for problem, ids in zip(benchmark.problems, prompts.ids, strict=True)
        for i in range(config["n"])
    ]


def _generate(
    model: str, requests: Sequence[SampleRequest], max_model_len: int, config: Mapping[str, Any]
) -> tuple[list[GeneratedText], dict[str, Any]]:
    options = {**config["engine"], "max_model_len": max_model_len}
    begun = time.monotonic()
    with VLLMEngine(model, seed=config["seed"], **options) as engine:
        ready = time.monotonic()
        generated = engine.generate(requests, progress=sys.stderr.isatty())
        done = time.monotonic()
        facts: dict[str, Any] = {"dtype": engine.dtype, "device": "cpu" if engine.on_cpu else "gpu"}
        kept = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "kv_cache_memory_bytes")
        facts |= {key: engine.options.get(key) for key in kept}
        facts |= {"num_threads": engine.num_threads}
    seconds = {"engine_start": round(ready - begun, 2), "generation": round(done - ready, 2)}
    return generated, {**facts, "seconds": seconds}


def _grade(benchmark: Benchmark, generated: Sequence[GeneratedText], config: Mapping[str, Any]) -> list[Grade]:
    from tqdm import tqdm

    n = config["n"]
    pairs = zip((p for p in benchmark.problems for _ in range(n)), generated, strict=True)
    items = [GradeItem(text.text, problem.answer, problem.answer_type) for problem, text in pairs]
    with GraderPool(**config["grading"]) as pool:
        with tqdm(total=len(items), desc="grading", unit="sample", disable=not sys.stderr.isatty()) as bar:
            return pool.grade(items, bar.update)


def _result(
    config: Mapping[str, Any],
    model: str,
    benchmark: Benchmark,
    prompts: Prompts,
    generated: Sequence[GeneratedText],
    grades: Sequence[Grade],
) -> dict[str, Any]:
    n = config["n"]
    by_problem = [grades[i : i + n] for i in range(0, len(grades), n)]
    num_correct = [sum(grade.verdict == "correct" for grade in group) for group in by_problem]
    counts = Counter(grade.verdict for grade in grades)
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= n} | {n})
    kept = ("n", "temperature", "top_p", "top_k", "max_tokens", "prompt", "limit", "seed")
    return {
        "model": model,
        "benchmark": benchmark.name,
        **{key: config[key] for key in kept},
        "num_problems": len(benchmark.problems),
        "num_samples": len(grades),
        "avg": metrics.avg_at_n(num_correct, n),
        "avg_ci95": metrics.clustered_ci95([c / n for c in num_correct]),
        "pass_at_k": {str(k): metrics.pass_at_k(num_correct, n, k) for k in ks},
        "avg_by_level": _by_level(benchmark, num_correct, n),
        "verdicts": {verdict: counts[verdict] for verdict in VERDICTS},
        "no_answer_frac": counts["no_answer"] / len(grades),
        "truncated_frac": fmean(text.finish_reason == "length" for text in generated),
        "num_context_limited": prompts.num_context_limited,
        "mean_response_tokens": fmean(text.num_tokens for text in generated),
        "origin": benchmark.origin,
        "per_problem": [
            {"id": problem.id, "level": problem.level, "num_correct": c, "avg": c / n}
            for problem, c in zip(benchmark.problems, num_correct, strict=True)
        ],
    }


def _by_level(benchmark: Benchmark, num_correct: Sequence[int], n: int) -> dict[str, float]:
    levels: dict[int, list[int]] = defaultdict(list)
    for problem, correct in zip(benchmark.problems, num_correct, strict=True):
        if problem.level is not None:
            levels[problem.level].append(correct)
    return {str(level): metrics.avg_at_n(levels[level], n) for level in sorted(levels)}


def _sample_rows(
    config: Mapping[str, Any],
    model: str,
    benchmark: Benchmark,
    requests: Sequence[SampleRequest],
    generated: Sequence[GeneratedText],
    grades: Sequence[Grade],
) -> list[dict[str, Any]]:
    rows = []
    for position, (request, text, grade) in enumerate(zip(requests, generated, grades, strict=True)):
        problem = benchmark.problems[position // config["n"]]
        row = {"problem_id": problem.id, "index": position % config["n"], "seed": request.seed, "model": model}
        row |= {"prompt_name": config["prompt"], "response": text.text, "token_ids": text.token_ids}
        row |= {"num_tokens": text.num_tokens, "finish_reason": text.finish_reason, "grade": grade.verdict}
        row |= {"answer": grade.answer, "gold": problem.answer, "rule": grade.rule, "detail": grade.detail}
        rows.append(row)
    return rows


def _write(folder: Path, config: Mapping[str, Any], result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Samples first, the result last: a folder with a result is complete."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from verl_dft.config import command_line
    from verl_dft.files import atomic_write, versions, write_json

    result |= {"versions": versions(), "command": command_line()}
    result |= {"written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    (folder / "result.json").unlink(missing_ok=True)
    with atomic_write(folder / "samples.parquet", "wb") as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
    write_json(folder / "config.json", _identity(config))
    write_json(folder / "result.json", result)
    result["output_dir"] = str(folder)
