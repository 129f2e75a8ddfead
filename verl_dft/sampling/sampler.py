"""From what is asked to graded samples: prompts, requests, the store, the engine where it is needed, and the grader.

Everything that samples goes through here: evaluation, rejection sampling, groups, rewriting.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.grading.pool import GraderPool
from verl_dft.sampling.ask import Ask
from verl_dft.sampling.engine import SampleRequest, context_length, load_config
from verl_dft.sampling.fingerprint import model_fingerprint
from verl_dft.sampling.graded import GradedSamples
from verl_dft.sampling.grader import BackgroundGrader
from verl_dft.sampling.progress import Progress
from verl_dft.sampling.seeds import sample_seed
from verl_dft.sampling.shards import Sampled, Wanted, missing_of, sample_all
from verl_dft.sampling.shared import start_engine
from verl_dft.sampling.source import TextSource
from verl_dft.sampling.store import SampleStore, sample_key
from verl_dft.sampling.watch import ShardWatch

# How much memory an engine takes changes no text, and a prompt's room is in its requests.
_NOT_OF_THE_TEXT = ("max_model_len", "gpu_memory_utilization", "kv_cache_gib", "trust_remote_code")
# Differs with the memory that happens to be free.
_NOT_OF_THE_SOURCE = ("kv_cache_memory_bytes", "max_model_len")
_DEFAULTS = {"seed": 0, "shard_size": 256, "deterministic": True, "num_replicas": 1, "want_logp": False}

_Turns = tuple[tuple[str, str], ...]
OpenSource = Callable[[int], AbstractContextManager[TextSource]]
"""Opens what generates, given the longest prompt + response in tokens that it must take."""


class Sampler:
    """The samples of one model, through the store in ``folder``. A context manager.

    A sample that the store has is never generated again, and an engine is started only when first one is missing; it
    then stays until the end.

    Args:
        folder: of the store, made where it is missing.
        model: folder or hub name; with an endpoint as ``source``, the name it serves.
        config: ``seed, shard_size, deterministic, num_replicas, want_logp, engine, grading`` as in
            ``configs/sampler.yaml``; what is left out has its default.
        source: what generates instead of a vLLM engine started here, or how to open it. One that is given is not
            closed.
        may_generate: False: missing samples are an error.

    Raises:
        InputError: no such model, or another process writes to ``folder``.
    """

    def __init__(
        self,
        folder: str | Path,
        model: str,
        config: Mapping[str, Any],
        source: TextSource | OpenSource | None = None,
        *,
        may_generate: bool = True,
    ) -> None:
        self.model, self.config = model, _DEFAULTS | {"engine": {}, "grading": {}} | dict(config)
        self._served = hasattr(source, "writer")  # an endpoint: its model's files and template are elsewhere
        if not self._served:
            trust = self.config["engine"].get("trust_remote_code", False)
            hf_config = load_config(model, trust)
            self.context = self.config["engine"].get("max_model_len") or context_length(hf_config)
            engine = {key: value for key, value in self.config["engine"].items() if key not in _NOT_OF_THE_TEXT}
            self._writer = json.dumps([model_fingerprint(model, hf_config), engine], sort_keys=True, default=str)
        else:
            self.context, self._writer = sys.maxsize, source.writer
        self._open = _opener(model, self.config, source)
        self._encoder: Any = None
        self._prompts: dict[_Turns, list[int]] = {}
        self._may_generate = may_generate
        self.folder = Path(folder)
        self.num_reused = self.num_generated = self.num_tokens = 0
        self.seconds = {"engine_start": 0.0, "prompts": 0.0, "generation": 0.0, "grading": 0.0}
        self.facts: list[dict[str, Any]] = []
        self._reserved = self._room = 0
        self._stack, self._store = ExitStack(), None
        self._source: TextSource | None = None
        self._source_stack = ExitStack()

    def __enter__(self) -> "Sampler":
        if not self._may_generate and not self.folder.is_dir():
            raise InputError(f"{self.folder} holds no samples, so there is nothing to grade again; generate them first")
        self._store = self._stack.enter_context(SampleStore(self.folder))
        self._pool = self._stack.enter_context(GraderPool(**self.config["grading"]))
        if self._store.recovery.unfinished_shards or self._store.recovery.corrupt:
            print(f"warning: {self.folder}: {self._store.recovery}", file=sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        for note in getattr(self._source, "notes", list)():
            print(f"warning: {self.folder}: {note}", file=sys.stderr)
        self._source = None
        try:
            self._source_stack.close()
        finally:
            self._stack.close()
            self._store = None

    def reserve(self, asks: Sequence[Ask]) -> int:
        """Make the engine large enough for these too, so that asking for them later does not start it again.

        Returns the longest prompt + response in tokens so far.
        """
        self._reserved = max([self._reserved, *(self._length(w.request) for w in self._wanted(asks))])
        return self._reserved

    def sample(self, asks: Sequence[Ask], name: str = "samples") -> GradedSamples:
        """A graded sample for each ask, in order, from the store where it is there.

        What is returned reads the samples from the store as they are used: go through it in order, and not often.

        The asks of one call, in their order, make up shards of ``shard_size``, the unit that is generated and resumed.

        Raises:
            InputError: a prompt that fills the context, samples missing where none may be generated, or what the
                source raises; finished shards are kept.
        """
        assert self._store is not None, "the sampler is not open"
        wanted = self._wanted(asks)
        items = {want.key: ask for want, ask in zip(wanted, asks, strict=True)}
        with (
            Progress(len(wanted), name) as progress,
            BackgroundGrader(self._pool, progress.graded) as grader,
        ):
            watch = ShardWatch(grader, progress, items)
            sampled = self._sample(wanted, watch)
            begun = time.monotonic()
            grades = grader.finish()
            self.seconds["grading"] += round(time.monotonic() - begun, 2)
        self._count(sampled, watch.num_tokens)
        told = [(grades[want.key], *watch.ends[want.key]) for want in wanted]
        return GradedSamples(self.model, asks, sampled.samples, told)

    def plan(self, asks: Sequence[Ask]) -> dict[str, int]:
        """What sampling these would take: samples, those stored already, prompt tokens, and response tokens at most.

        With ``deterministic`` a stored sample counts only where its whole shard is there, as when sampling.
        """
        wanted = self._wanted(asks)
        missing = [want.request for want in missing_of(self.folder, wanted, self.config)]
        return {
            "samples": len(wanted),
            "stored": len(wanted) - len(missing),
            "prompt_tokens": sum(len(request.prompt_ids) for request in missing),
            "max_response_tokens": sum(request.max_tokens for request in missing),
        }

    def num_context_limited(self, asks: Sequence[Ask]) -> int:
        """How many distinct prompts leave less than ``max_tokens`` of the context."""
        pairs = zip(asks, self._encode(asks), strict=True)
        return len({tuple(ids) for ask, ids in pairs if self.context - len(ids) < ask.sampling.max_tokens})

    # ---- requests ----

    def _wanted(self, asks: Sequence[Ask]) -> list[Wanted]:
        begun = time.monotonic()
        prompts = self._encode(asks)
        stop_ids = [] if self._served else sorted(self._encoder.end_ids)
        wanted = []
        for ask, ids in zip(asks, prompts, strict=True):
            seed = sample_seed(self.config["seed"], _stream_id(ask), ask.index)
            room = min(ask.sampling.max_tokens, self.context - len(ids))
            request = SampleRequest(
                ids,
                seed,
                temperature=ask.sampling.temperature,
                top_p=ask.sampling.top_p,
                top_k=ask.sampling.top_k,
                max_tokens=room,
                stop_token_ids=stop_ids,
                messages=ask.messages,
                want_logp=self.config["want_logp"],
            )
            key = sample_key(self._writer, request, ask.index)
            wanted.append(Wanted(key, ask.index, request, f"problem {ask.problem_id}"))
        self.seconds["prompts"] += round(time.monotonic() - begun, 3)
        return wanted

    def _encode(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Prompt ids of each ask; equal turns are encoded once, also from one call to the next."""
        if self._served:
            return [[] for _ in asks]
        if self._encoder is None:
            from verl_dft.data.sources import load_tokenizer
            from verl_dft.data.template import ConversationEncoder

            self._encoder = ConversationEncoder(load_tokenizer(self.model))
        turns = [tuple((turn["role"], turn["content"]) for turn in ask.messages) for ask in asks]
        new: dict[_Turns, Ask] = {}
        for key, ask in zip(turns, asks, strict=True):
            if key not in self._prompts:
                new.setdefault(key, ask)
        firsts = list(new.values())
        ids = self._encoder.encode_prompts([a.messages for a in firsts], lambda i: f"problem {firsts[i].problem_id}")
        for ask, prompt in zip(firsts, ids, strict=True):
            if len(prompt) >= self.context:
                raise InputError(
                    f"the prompt of problem {ask.problem_id} has {len(prompt)} tokens, the context of {self.model} "
                    f"{self.context}; leave the problem out, or use a model with a longer context"
                )
        self._prompts |= zip(new, ids, strict=True)
        return [self._prompts[key] for key in turns]

    # ---- generation ----

    def _sample(self, wanted: Sequence[Wanted], watch: ShardWatch) -> Sampled:
        assert self._store is not None
        needed = max([self._reserved, *(self._length(want.request) for want in wanted)])
        return sample_all(
            self._store,
            wanted,
            (lambda: self._opened(needed)) if self._may_generate else None,
            shard_size=self.config["shard_size"],
            deterministic=self.config["deterministic"],
            on_progress=watch.on_progress,
            on_shard=watch.on_shard,
            num_parallel=self.config["num_replicas"],
        )

    def _length(self, request: SampleRequest) -> int:
        return len(request.prompt_ids) + request.max_tokens

    @contextmanager
    def _opened(self, needed: int) -> Iterator[TextSource]:
        if self._source is None or needed > self._room:
            self._source_stack.close()
            begun = time.monotonic()
            self._source = self._source_stack.enter_context(self._open(needed))
            self._reserved = self._room = needed
            self.seconds["engine_start"] += round(time.monotonic() - begun, 2)
        yield self._source

    def _count(self, sampled: Sampled, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        self.num_reused += sampled.num_reused
        self.num_generated += sampled.num_generated
        self.seconds["generation"] += sampled.seconds
        self.facts += [facts for facts in sampled.facts if facts not in self.facts]
        setups = {json.dumps({k: v for k, v in f.items() if k not in _NOT_OF_THE_SOURCE}) for f in self.facts}
        if len(setups) > 1:
            texts = " | ".join(sorted(setups))
            print(f"warning: {self.folder}: samples of {len(setups)} engine setups: {texts}", file=sys.stderr)


def _opener(model: str, config: Mapping[str, Any], source: TextSource | OpenSource | None) -> OpenSource:
    def engine(max_model_len: int) -> AbstractContextManager[TextSource]:
        room = config["engine"].get("max_model_len") or max_model_len
        options = {"seed": config["seed"], **config["engine"], "max_model_len": room}
        return start_engine(model, options, config["num_replicas"])

    if source is None:
        return engine
    return source if not hasattr(source, "generate") else lambda max_model_len: nullcontext(source)


def _stream_id(ask: Ask) -> str:
    return f"{ask.stream}/{ask.problem_id}" if ask.stream else ask.problem_id
