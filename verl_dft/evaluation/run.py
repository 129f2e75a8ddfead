"""One evaluation: problems -> prompts -> samples (vLLM) -> verdicts -> numbers, written beside each other.

``result.json`` holds the numbers and what they depend on, ``samples.parquet`` every sample with its seed, length,
finish reason and verdict, so that a number can be traced to texts. ``store/`` is where samples go as they are made: a
run that was interrupted goes on from there, and one with other grading options grades again without a model.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.evaluation.benchmarks import Benchmark, load_benchmark
from verl_dft.evaluation.samples import wanted_samples
from verl_dft.evaluation.summary import summarize
from verl_dft.sampling.configure import check_count, check_sampler, plain, sampling_of
from verl_dft.sampling.folder import STORE, VOLATILE, check_folder, identity
from verl_dft.sampling.graded import GradedSamples
from verl_dft.sampling.record import Sample, write_samples
from verl_dft.sampling.sampler import OpenSource, Sampler
from verl_dft.sampling.source import TextSource

# Options that cannot change a result; a folder made with other values of these may be overwritten.
_VOLATILE = (*VOLATILE, "regrade", "preset", "data_dir", "licences")
PRESETS: dict[str, dict[str, Any]] = {"dft": {"temperature": 1.0}, "gft": {"temperature": 0.5}}
"""Sampling options of the papers' evaluations: for each key that the configuration leaves null, the preset's value."""
_DEFAULTS = {"preset": "dft", "shard_size": 256, "deterministic": True, "regrade": False, "num_replicas": 1}


def evaluate(config: Mapping[str, Any], source: TextSource | OpenSource | None = None) -> dict[str, Any]:
    """Evaluate one model on one benchmark, or finish doing so: stored samples are never generated again.

    Args:
        config: ``configs/evaluate.yaml`` composed, with ``models`` naming one model.
        source: what samples, or how to open it, instead of a vLLM engine started here.

    Returns:
        The result as written to ``<output_dir>/result.json``. Fractions are of samples; ``avg_ci95`` is clustered by
        problem; ``truncated_frac`` counts samples cut off by ``max_tokens`` or the context.

    Raises:
        InputError: anything a user can put right.
    """
    config = _with_defaults(plain(config))
    model = _one_model(config)
    folder = Path(config["output_dir"] or default_output_dir(model, config["benchmark"]["name"]))
    _check_options(config)
    check_folder(folder, config, _VOLATILE)
    started = time.monotonic()
    benchmark = load_benchmark(config["benchmark"], config["limit"])
    asks = wanted_samples(benchmark, config)
    with Sampler(folder / STORE, model, config, source, may_generate=not config["regrade"]) as sampler:
        samples = sampler.sample(asks)
        result = _result(config, model, benchmark, samples)
        result["num_context_limited"] = sampler.num_context_limited(asks)
        result["asked_otherwise"] = _asked_otherwise(model, asks[0].messages)
        result |= {"engine": sampler.facts[-1], "num_reused": sampler.num_reused}
        result |= {"num_generated": sampler.num_generated}
        result["seconds"] = sampler.seconds | {"total": round(time.monotonic() - started, 2)}
        _write(folder, config, result, samples)  # while the store is held: nobody else writes here meanwhile
    return result


def longest_sample(config: Mapping[str, Any]) -> int:
    """Tokens of the longest prompt + response that :func:`evaluate` would ask for. Raises InputError as that does."""
    config = _with_defaults(plain(config))
    _check_options(config)
    asks = wanted_samples(load_benchmark(config["benchmark"], config["limit"]), config | {"n": 1})
    return Sampler(Path(config["output_dir"]) / STORE, _one_model(config), config).reserve(asks)


def default_output_dir(model: str, benchmark: str) -> str:
    """``runs/evaluate/<last two parts of the model's name>/<benchmark>``."""
    parts = [part for part in Path(model).parts if part not in ("/", ".", "..")]
    return str(Path("runs", "evaluate", "-".join(parts[-2:]), benchmark))


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


def _check_options(config: Mapping[str, Any]) -> None:
    check_count(config)
    sampling_of(config)
    check_sampler(config)


def _asked_otherwise(model: str, messages: Sequence[Mapping[str, str]]) -> list[str]:
    """Ways in which the prompts are not like those that the model was trained on."""
    from verl_dft.data.sources import load_tokenizer
    from verl_dft.evaluation.trained_with import training_warnings

    return training_warnings(model, load_tokenizer(model), [message["role"] for message in messages])


def _result(config: Mapping[str, Any], model: str, benchmark: Benchmark, samples: GradedSamples) -> dict[str, Any]:
    kept = ("n", "temperature", "top_p", "top_k", "max_tokens", "prompt", "limit", "seed")
    levels = {problem.id: problem.level for problem in benchmark.problems}
    rows = list(samples.counted())
    return {
        "model": model,
        "benchmark": benchmark.name,
        **{key: config[key] for key in (*kept, "shard_size", "deterministic")},
        **summarize(rows, [problem.id for problem in benchmark.problems], config["n"], levels),
        "origin": benchmark.origin,
    }


def _write(folder: Path, config: Mapping[str, Any], result: dict[str, Any], samples: Sequence[Sample]) -> None:
    """Samples first, the result last: a folder with a result is complete."""
    from verl_dft.config import command_line
    from verl_dft.evaluation.report import write_report
    from verl_dft.files import versions, write_json

    result |= {"versions": versions(), "command": command_line()}
    result |= {"written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    (folder / "result.json").unlink(missing_ok=True)
    write_samples(folder / "samples.parquet", samples, bool(config.get("want_logp")))
    write_json(folder / "config.json", identity(config, _VOLATILE))
    write_json(folder / "result.json", result)
    write_report(folder)
    result["output_dir"] = str(folder)
