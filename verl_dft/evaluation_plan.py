"""What ``trainer.eval_every`` runs. Training knows no benchmarks: ``eval.planner`` of ``configs/sft.yaml`` is here."""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig

from verl_dft.errors import InputError


def plan(config: DictConfig) -> dict[str, list[str]]:
    """The evaluation that the group ``eval`` describes, checked as far as that is possible without a model.

    Returns:
        ``command``, which lacks ``model=`` and ``output_dir=``, and ``benchmarks``, the names of what it runs.

    Raises:
        InputError: no benchmark, one that cannot be loaded, or keys that ``verl-dft evaluate`` would refuse.
    """
    from verl_dft.evaluation.benchmarks import load_benchmark
    from verl_dft.evaluation.command import expand_benchmarks
    from verl_dft.sampling.configure import check_count, check_sampler, plain, sampling_of

    options = plain(config)
    if not options["benchmark"]:
        raise InputError("trainer.eval_every needs a benchmark; give eval.benchmark=NAME (verl-dft evaluate --help)")
    overrides = _overrides(options)
    try:
        configs = expand_benchmarks(overrides)
        for one in map(plain, configs):
            check_count(one)
            check_sampler(one)
            sampling_of(one | {"temperature": 1.0 if one["temperature"] is None else one["temperature"]})
            load_benchmark(one["benchmark"], one["limit"])
    except InputError as error:
        raise InputError(f"eval: {error}") from None
    return {
        "command": [sys.executable, "-m", "verl_dft.cli", "evaluate", *overrides],
        "benchmarks": [one.benchmark.name for one in configs],
    }


def _overrides(options: Mapping[str, Any]) -> list[str]:
    given = {key: options[key] for key in ("n", "limit", "max_tokens", "temperature") if options[key] is not None}
    given["engine.gpu_memory_utilization"] = options["gpu_memory_utilization"]
    given |= dict(_flat(options["overrides"]))
    names = options["benchmark"]
    benchmark = names if isinstance(names, str) else f"[{','.join(names)}]"
    return [f"benchmark={benchmark}", *(f"{key}={json.dumps(given[key], ensure_ascii=False)}" for key in given)]


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
