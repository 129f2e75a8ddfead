"""The samples of an evaluation: prompts, one request per sample, and the store they go through."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.evaluation.benchmarks import Benchmark
from verl_dft.sampling.engine import SampleRequest, VLLMEngine, context_length, load_config
from verl_dft.sampling.fingerprint import model_fingerprint
from verl_dft.sampling.seeds import sample_seed
from verl_dft.sampling.shards import Sampled, Wanted, sample_all
from verl_dft.sampling.source import TextSource
from verl_dft.sampling.store import SampleStore, sample_key

STORE = "store"
# How much memory an engine takes changes no text, and a prompt's room is in its requests.
_NOT_OF_THE_TEXT = ("max_model_len", "gpu_memory_utilization", "kv_cache_gib", "trust_remote_code")
# Differs with the memory that happens to be free.
_NOT_OF_THE_SOURCE = ("kv_cache_memory_bytes", "max_model_len")


@dataclass(frozen=True)
class Prompts:
    """Token ids of each problem's prompt, the ids that end a response, and how many prompts leave less than max_tokens
    of the context."""

    ids: list[list[int]]
    stop_token_ids: list[int]
    max_model_len: int
    num_context_limited: int


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


def wanted_samples(model: str, benchmark: Benchmark, prompts: Prompts, config: Mapping[str, Any]) -> list[Wanted]:
    """Problem by problem, sample by sample: an order that is part of what makes a result reproducible."""
    engine = {key: value for key, value in config["engine"].items() if key not in _NOT_OF_THE_TEXT}
    fingerprint = model_fingerprint(model, load_config(model, config["engine"]["trust_remote_code"]))
    writer = json.dumps([fingerprint, engine], sort_keys=True, default=str)
    options = {key: config[key] for key in ("temperature", "top_p", "top_k")}
    wanted = []
    for problem, ids in zip(benchmark.problems, prompts.ids, strict=True):
        room = min(config["max_tokens"], prompts.max_model_len - len(ids))
        for index in range(config["n"]):
            seed = sample_seed(config["seed"], problem.id, index)
            request = SampleRequest(ids, seed, max_tokens=room, stop_token_ids=prompts.stop_token_ids, **options)
            wanted.append(Wanted(sample_key(writer, request, index), index, request, f"problem {problem.id}"))
    return wanted


def sample(
    folder: Path,
    model: str,
    wanted: Sequence[Wanted],
    max_model_len: int,
    config: Mapping[str, Any],
    source: TextSource | None,
) -> tuple[Sampled, dict[str, float]]:
    """Every wanted sample, through ``<folder>/store``, and the seconds that starting an engine took here.

    Warns on stderr of what an earlier kill left, and of samples that differently set up engines wrote.

    Raises:
        InputError: another process writes there, or ``regrade`` is set and samples are missing.
    """
    from tqdm import tqdm

    seconds = {"engine_start": 0.0}
    opener = None if config["regrade"] else _opener(model, max_model_len, config, source, seconds)
    if config["regrade"] and not (folder / STORE).is_dir():
        raise InputError(f"regrade=true, but {folder} holds no samples; leave it out to generate them")
    with SampleStore(folder / STORE) as store:
        if store.recovery.unfinished_shards or store.recovery.corrupt:
            print(f"warning: {folder / STORE}: {store.recovery}", file=sys.stderr)
        with tqdm(total=len(wanted), desc="samples", unit="sample", disable=not sys.stderr.isatty()) as bar:
            size, fixed = config["shard_size"], config["deterministic"]
            sampled = sample_all(
                store, wanted, opener, shard_size=size, deterministic=fixed, on_progress=_progress(bar, size)
            )
    setups = {json.dumps({k: v for k, v in facts.items() if k not in _NOT_OF_THE_SOURCE}) for facts in sampled.facts}
    if len(setups) > 1:
        print(
            f"warning: {folder}: samples of {len(setups)} engine setups: {' | '.join(sorted(setups))}", file=sys.stderr
        )
    return sampled, seconds


def _progress(bar: Any, shard_size: int) -> Callable[[int], None]:
    def advance(count: int) -> None:
        bar.update(count)
        bar.set_postfix_str(f"shard {-(-bar.n // shard_size)}/{-(-bar.total // shard_size)}")

    return advance


def _opener(
    model: str, max_model_len: int, config: Mapping[str, Any], source: TextSource | None, seconds: dict[str, float]
) -> Callable[[], AbstractContextManager[TextSource]]:
    @contextmanager
    def engine() -> Iterator[TextSource]:
        begun = time.monotonic()
        with VLLMEngine(model, seed=config["seed"], **{**config["engine"], "max_model_len": max_model_len}) as opened:
            seconds["engine_start"] = round(time.monotonic() - begun, 2)
            yield opened

    return engine if source is None else lambda: nullcontext(source)
