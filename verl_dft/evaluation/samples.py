"""What an evaluation asks for: ``n`` samples of every problem of a benchmark, in a fixed order."""

from collections.abc import Mapping
from typing import Any

from verl_dft.data.prompts import render_messages
from verl_dft.evaluation.benchmarks import Benchmark
from verl_dft.sampling.ask import Ask, Sampling


def wanted_samples(benchmark: Benchmark, config: Mapping[str, Any]) -> list[Ask]:
    """Problem by problem, sample by sample. Raises InputError for an unknown prompt."""
    sampling = Sampling(*(config[key] for key in ("temperature", "top_p", "top_k", "max_tokens")))
    asks = []
    for problem in benchmark.problems:
        messages = render_messages(config["prompt"], problem.problem)
        first = Ask(
            problem.id,
            0,
            messages,
            problem.answer,
            sampling,
            prompt_name=config["prompt"],
            problem=problem.problem,
            answer_type=problem.answer_type,
            tolerance=problem.tolerance,
        )
        asks += first.numbered(range(config["n"]))
    return asks
