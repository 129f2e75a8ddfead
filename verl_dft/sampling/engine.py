"""vLLM in this process: scheduler, worker and model together, so that one order of requests gives one result.

What it takes to be reproducible and to start anywhere:

- ``VLLM_ENABLE_V1_MULTIPROCESSING=0``. With a scheduler in its own process, which requests share a batch depends on
  timing, and with it the last bits of the logits.
- One seed per request. On a CPU tokens are drawn by ``verl_dft.sampling.seeded``: vLLM's own seeded sampling is slow
  there (see ``verl_dft.sampling.choose``) and fails where a prompt is cut into chunks (vLLM 0.28 rewinds the generator,
  which torch's CPU generators cannot do). On a GPU vLLM's own is used.
- On a CPU the KV cache gets what the sequences can fill, not a share of the machine: vLLM's default share (0.92)
  refuses to start where memory is in use.
- float32 checkpoints run in float32. vLLM's own ``dtype=auto`` casts them down.
"""

import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl_dft.errors import InputError

_CPU_MAX_NUM_SEQS = 256
_CPU_BATCHED_TOKENS = 4096
# vLLM's default on a CPU is 128; short sequences waste most of such a block, and nothing shorter can be shared.
_CPU_BLOCK_SIZE = 32
_CPU_KV_MEMORY_FRAC = 0.4
# Below this width a second thread costs more in waiting than it computes.
_ONE_THREAD_HIDDEN_SIZE = 256


@dataclass(frozen=True)
class SampleRequest:
    """One text to sample. ``seed`` is ignored at temperature 0 (greedy); ``top_k`` 0 means all tokens.

    ``messages`` are the turns behind ``prompt_ids``, for a source that applies its own template (an endpoint).
    With ``want_logp`` the log-prob of each sampled token is returned too.
    """

    prompt_ids: Sequence[int]
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop_token_ids: Sequence[int] = ()
    messages: Sequence[Mapping[str, str]] | None = None
    want_logp: bool = False


@dataclass(frozen=True)
class GeneratedText:
    """What came out. ``token_ids`` holds the end token where there is one, ``text`` does not.

    ``finish_reason``: ``stop`` (the model ended it) or ``length`` (cut off by ``max_tokens`` or the context).
    ``logp``: of each token under the model at temperature 1 without top-p and top-k, in nats, where it was asked for.
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    logp: list[float] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


class VLLMEngine:
    """A model loaded into vLLM in this process. Close it, or use it as a context manager.

    Args:
        model: folder or hub name.
        dtype: ``auto`` (as stored in the checkpoint), ``float32``, ``bfloat16`` or ``float16``.
        max_model_len: longest prompt + response in tokens; None takes the model's context.
        seed: vLLM's own; samples have theirs.
        max_num_seqs: sequences in flight; None: 256 on a CPU, vLLM's choice on a GPU.
        max_num_batched_tokens: tokens of one step; None chooses.
        kv_cache_gib: CPU only; None sizes the cache for ``max_num_seqs`` full sequences, at most 40% of free memory.
        gpu_memory_utilization: GPU only.
        num_threads: CPU only; None: 1 for a model of hidden size up to 256, else torch's own choice.
        extra: further keyword arguments of ``vllm.LLM``; they win over everything chosen here.

    Raises:
        InputError: no such model, or too little memory for one sequence.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        seed: int = 0,
        tensor_parallel_size: int = 1,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        kv_cache_gib: float | None = None,
        gpu_memory_utilization: float = 0.9,
        num_threads: int | None = None,
        trust_remote_code: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        # Before vLLM is imported: some are read once, at import.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # Weights are never replaced here, so our own vLLM plug-in may leave the faster kernels alone.
        os.environ["VERL_DFT_VLLM_PREPACK"] = "1"
        import torch
        import vllm
        from vllm.platforms import current_platform

        self._num_threads, self._set_num_threads = torch.get_num_threads(), torch.set_num_threads
        hf_config = load_config(model, trust_remote_code)
        self.dtype = _stored_dtype(hf_config) if dtype == "auto" else dtype
        self.max_model_len = max_model_len or context_length(hf_config)
        self.on_cpu = current_platform.is_cpu()
        options: dict[str, Any] = {
            "model": model,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "seed": seed,
            "tensor_parallel_size": tensor_parallel_size,
            "trust_remote_code": trust_remote_code,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if self.on_cpu:
            threads = num_threads or (1 if _text_config(hf_config).hidden_size <= _ONE_THREAD_HIDDEN_SIZE else None)
            if threads:
                torch.set_num_threads(threads)
            options |= _cpu_options(hf_config, self.dtype, self.max_model_len, max_num_seqs, kv_cache_gib)
        else:
            options["gpu_memory_utilization"] = gpu_memory_utilization
        chosen = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
        options |= {key: value for key, value in chosen.items() if value is not None}
        self.options = options | dict(extra or {})
        self.num_threads = torch.get_num_threads()
        self._vllm = vllm
        environment = dict(os.environ)
        try:
            self._llm: Any = vllm.LLM(**self.options)
        finally:
            self._changed = {k: environment.get(k) for k, v in os.environ.items() if environment.get(k) != v}

    def __enter__(self) -> "VLLMEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, requests: Sequence[SampleRequest], progress: bool = False) -> list[GeneratedText]:
        """Sample every request, in order. The prefix cache is emptied first: a call's result is a function of it alone.

        Raises:
            InputError: a prompt that leaves no room for one token.
        """
        assert self._llm is not None, "the engine is closed"
        for index, request in enumerate(requests):
            if len(request.prompt_ids) >= self.max_model_len:
                raise InputError(
                    f"prompt {index} has {len(request.prompt_ids)} tokens and the context is {self.max_model_len}; "
                    "shorten it or raise engine.max_model_len"
                )
        self._llm.reset_prefix_cache()
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
            [self._sampling_params(request) for request in requests],
            use_tqdm=progress,
        )
        assert len(outputs) == len(requests)
        return [
            _generated(output.outputs[0], request.want_logp) for output, request in zip(outputs, requests, strict=True)
        ]

    def facts(self) -> dict[str, Any]:
        """What a result should say about this engine: number type, device, limits and threads."""
        kept = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "kv_cache_memory_bytes")
        facts: dict[str, Any] = {"dtype": self.dtype, "device": "cpu" if self.on_cpu else "gpu"}
        return {**facts, **{key: self.options.get(key) for key in kept}, "num_threads": self.num_threads}

    def _sampling_params(self, request: SampleRequest) -> Any:
        options: dict[str, Any] = {"temperature": 0.0}
        if request.temperature > 0 and self.on_cpu:
            from verl_dft.sampling.seeded import EXTRA_ARG

            drawn = (request.seed, float(request.temperature), float(request.top_p), request.top_k)
            options["extra_args"] = {EXTRA_ARG: drawn}
        elif request.temperature > 0:
            options = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
            options["seed"] = request.seed
        if request.want_logp:
            options["logprobs"] = 0  # no alternatives: the sampled token's alone
        return self._vllm.SamplingParams(
            n=1, max_tokens=request.max_tokens, stop_token_ids=list(request.stop_token_ids), **options
        )

    def close(self) -> None:
        """End the engine, free its memory and undo what vLLM changed in this process. Safe to call twice."""
        if self._llm is None:
            return
        import torch
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        cleanup_dist_env_and_memory()
        gc.collect()
        # vLLM's CPU worker replaces this function for the whole process.
        torch.set_num_threads = self._set_num_threads
        torch.set_num_threads(self._num_threads)
        # LD_PRELOAD and the like would otherwise reach every process started from here.
        for name, value in self._changed.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _generated(output: Any, want_logp: bool) -> GeneratedText:
    ids = list(output.token_ids)
    logp = None
    if want_logp:
        logp = [float(at[token].logprob) for at, token in zip(output.logprobs, ids, strict=True)]
    return GeneratedText(ids, output.text, str(output.finish_reason), logp)


def load_config(model: str, trust_remote_code: bool = False) -> Any:
    """The model's ``transformers`` configuration. Raises InputError where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        detail = " ".join(str(error).split())[:160]
        raise InputError(f"model {model!r} cannot be loaded: {detail}; give a folder or a hub name") from None


def context_length(config: Any) -> int:
    """Longest prompt + response in tokens that the model was built for."""
    return int(_text_config(config).max_position_embeddings)


def _text_config(config: Any) -> Any:
    return config.get_text_config()


def _stored_dtype(config: Any) -> str:
    stored = getattr(config, "dtype", None) or _text_config(config).dtype
    return str(stored).removeprefix("torch.") if stored is not None else "auto"


def _cpu_options(
    config: Any, dtype: str, max_model_len: int, max_num_seqs: int | None, kv_cache_gib: float | None
) -> dict[str, Any]:
    from verl_dft.sampling.seeded import SeededChoice

    sequences = max_num_seqs or _CPU_MAX_NUM_SEQS
    return {
        "enforce_eager": True,
        "logits_processors": [SeededChoice],
        "block_size": _CPU_BLOCK_SIZE,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": _CPU_BATCHED_TOKENS,
        "kv_cache_memory_bytes": _kv_cache_bytes(config, dtype, max_model_len, sequences, kv_cache_gib),
    }


def _kv_cache_bytes(config: Any, dtype: str, max_model_len: int, sequences: int, gib: float | None) -> int:
    """Bytes for ``sequences`` full sequences (one block more each), at most 40% of free memory, or what was asked."""
    import psutil

    if gib is not None:
        return int(gib * 2**30)
    text = _text_config(config)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * heads * head_dim * (4 if dtype in ("float32", "auto") else 2)
    per_sequence = (-(-max_model_len // _CPU_BLOCK_SIZE) + 1) * _CPU_BLOCK_SIZE * per_token
    available = int(psutil.virtual_memory().available * _CPU_KV_MEMORY_FRAC)
    if per_sequence > available:
        raise InputError(
            f"one sequence of {max_model_len} tokens needs {per_sequence / 2**30:.1f} GiB of KV cache and "
            f"{available / 2**30:.1f} GiB can be taken; lower max_tokens or engine.max_model_len"
        )
    return min(sequences * per_sequence, available)
