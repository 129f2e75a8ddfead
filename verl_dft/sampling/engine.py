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
- With tensor parallelism the model is in processes of its own (one per GPU, on a CPU one per rank); the scheduler stays
  here.
"""

import gc
import os
from array import array
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from verl_dft.errors import InputError
from verl_dft.files import scratch_folder
from verl_dft.platform.shared_memory import remove_abandoned, shared_memory_files
from verl_dft.platform.temporary import ENGINE_FOLDER
from verl_dft.sampling.engine_environment import engine_environment, restore_environment
from verl_dft.sampling.engine_options import context_length, cpu_options, cpu_threads, load_config, stored_dtype
from verl_dft.sampling.same_shape import model_shape, shape_difference


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
    ``reported_tokens``: how many tokens an endpoint says it wrote; ``token_ids`` are then empty.
    """

    token_ids: Sequence[int]
    text: str
    finish_reason: str
    logp: Sequence[float] | None = None
    reported_tokens: int | None = None

    def __post_init__(self) -> None:
        # 4 and 8 bytes a token instead of an object each: all samples of a run are kept
        object.__setattr__(self, "token_ids", array("i", self.token_ids))
        if self.logp is not None:
            object.__setattr__(self, "logp", array("d", self.logp))

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) if self.reported_tokens is None else self.reported_tokens


class VLLMEngine:
    """A model loaded into vLLM in this process. Close it, or use it as a context manager.

    Args:
        model: folder or hub name.
        dtype: ``auto`` (as stored in the checkpoint), ``float32``, ``bfloat16`` or ``float16``.
        max_model_len: longest prompt + response in tokens; None takes the model's context.
        seed: vLLM's own; samples have theirs.
        tensor_parallel_size: GPUs of this machine that hold the model together (CPU: processes).
        max_num_seqs: sequences in flight; None: 256 on a CPU, vLLM's choice on a GPU.
        max_num_batched_tokens: tokens of one step; None chooses.
        kv_cache_gib: CPU only, of each process; None sizes the cache for ``max_num_seqs`` full sequences, at most 40%
            of free memory.
        memory_share: CPU only: the part of that which this engine may take, where several run on the machine.
        gpu_memory_utilization: GPU only.
        num_threads: CPU only, of each process; None: 1 for a model of hidden size up to 256, else torch's own choice.
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
        memory_share: float = 1.0,
        gpu_memory_utilization: float = 0.9,
        num_threads: int | None = None,
        trust_remote_code: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        # Before vLLM is imported: some are read once, at import.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # `load` packs new weights again, so our own vLLM plug-in may leave the faster kernels alone.
        os.environ["VERL_DFT_VLLM_PREPACK"] = "1"
        import torch
        import vllm
        from vllm.platforms import current_platform

        self._num_threads, self._set_num_threads = torch.get_num_threads(), torch.set_num_threads
        hf_config = load_config(model, trust_remote_code)
        self._shape = model_shape(model)
        self.dtype = stored_dtype(hf_config) if dtype == "auto" else dtype
        self.max_model_len = max_model_len or context_length(hf_config)
        self.on_cpu = current_platform.is_cpu()
        options: dict[str, Any] = {
            "model": model,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "seed": seed,
            "tensor_parallel_size": tensor_parallel_size,
            # In a Ray actor vLLM would else ask Ray for further actors.
            "distributed_executor_backend": "uni" if tensor_parallel_size == 1 else "mp",
            "trust_remote_code": trust_remote_code,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if self.on_cpu:
            torch.set_num_threads(cpu_threads(hf_config, num_threads, tensor_parallel_size))
            options |= cpu_options(
                hf_config,
                self.dtype,
                self.max_model_len,
                max_num_seqs=max_num_seqs,
                kv_cache_gib=kv_cache_gib,
                tensor_parallel_size=tensor_parallel_size,
                memory_share=memory_share,
            )
        else:
            options["gpu_memory_utilization"] = gpu_memory_utilization
        chosen = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
        options |= {key: value for key, value in chosen.items() if value is not None}
        self.options = options | dict(extra or {})
        self.num_threads = torch.get_num_threads()
        self._vllm = vllm
        environment = dict(os.environ)
        self._shared_memory = shared_memory_files() if tensor_parallel_size > 1 else None
        self._folder = ExitStack()
        folder = self._folder.enter_context(scratch_folder(ENGINE_FOLDER))
        try:
            with engine_environment(folder, self.num_threads if self.on_cpu and tensor_parallel_size > 1 else None):
                self._llm: Any = vllm.LLM(**self.options)
        except BaseException:
            self._folder.close()
            raise
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

    def load(self, model: str) -> None:
        """Take the weights of another folder; what is generated then is what a new engine on it would generate.

        Raises:
            InputError: the folder is not of the same shape (:func:`verl_dft.sampling.same_shape.shape_difference`).
        """
        assert self._llm is not None, "the engine is closed"
        shape = model_shape(model)
        difference = shape_difference(self._shape, shape)
        if difference is not None:
            raise InputError(f"an engine cannot go on with other weights: {difference}")
        self._llm.collective_rpc(_reload, args=(model,))
        self._shape = shape

    def facts(self) -> dict[str, Any]:
        """What a result should say about this engine: number type, device, limits and threads."""
        kept = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "kv_cache_memory_bytes")
        facts: dict[str, Any] = {"dtype": self.dtype, "device": "cpu" if self.on_cpu else "gpu"}
        facts |= {**{key: self.options.get(key) for key in kept}, "num_threads": self.num_threads}
        if self.on_cpu:
            facts["all_sequences_fit"] = self._all_sequences_fit()
        return facts

    def _all_sequences_fit(self) -> bool:
        """Whether ``max_num_seqs`` full sequences fit into the KV cache. Else its size has a say in what is batched."""
        config = self._llm.llm_engine.vllm_config
        block, blocks = config.cache_config.block_size, config.cache_config.num_gpu_blocks
        return blocks >= config.scheduler_config.max_num_seqs * -(-self.max_model_len // block)

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
        if self._shared_memory is not None:
            remove_abandoned(self._shared_memory)
        # vLLM's CPU worker replaces this function for the whole process.
        torch.set_num_threads = self._set_num_threads
        torch.set_num_threads(self._num_threads)
        # LD_PRELOAD and the like would otherwise reach every process started from here.
        restore_environment(self._changed)
        self._folder.close()


def _reload(worker: Any, folder: str) -> None:
    """In each of vLLM's workers: read the weights of ``folder`` and pack them as at the start."""
    worker.reload_weights(weights_path=folder)
    # A tied output layer has no weights of its own in the folder, so vLLM (0.28) leaves its packed copy as it was.
    for layer in worker.model_runner.get_model().modules():
        if getattr(layer, "cpu_linear", None) is not None and layer.weight.numel():
            layer.quant_method.process_weights_after_loading(layer)


def _generated(output: Any, want_logp: bool) -> GeneratedText:
    logp = None
    if want_logp:
        logp = [float(at[token].logprob) for at, token in zip(output.logprobs, output.token_ids, strict=True)]
    return GeneratedText(output.token_ids, output.text, str(output.finish_reason), logp)
