"""What a vLLM engine is started with: the model's configuration, and sizes for machines without an accelerator."""

from typing import Any

from verl_dft.errors import InputError

_CPU_MAX_NUM_SEQS = 256
_CPU_BATCHED_TOKENS = 4096
# vLLM's default on a CPU is 128; short sequences waste most of such a block, and nothing shorter can be shared.
CPU_BLOCK_SIZE = 32
_CPU_KV_MEMORY_FRAC = 0.4
# Below this width a second thread costs more in waiting than it computes.
_ONE_THREAD_HIDDEN_SIZE = 256


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
    return int(config.get_text_config().max_position_embeddings)


def stored_dtype(config: Any) -> str:
    """Number type of the checkpoint as its configuration states it (``float32``, ``bfloat16`` …), else ``auto``."""
    stored = getattr(config, "dtype", None) or config.get_text_config().dtype
    return str(stored).removeprefix("torch.") if stored is not None else "auto"


def cpu_threads(config: Any, num_threads: int | None, tensor_parallel_size: int = 1) -> int:
    """Threads of each process of an engine on a CPU: what was asked for, else 1 for a narrow model, else torch's own
    choice, shared among the processes."""
    import torch

    if num_threads is not None:
        return num_threads
    if config.get_text_config().hidden_size <= _ONE_THREAD_HIDDEN_SIZE:
        return 1
    return max(1, torch.get_num_threads() // tensor_parallel_size)


def cpu_options(
    config: Any,
    dtype: str,
    max_model_len: int,
    *,
    max_num_seqs: int | None,
    kv_cache_gib: float | None,
    tensor_parallel_size: int,
    memory_share: float,
) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for an engine on a CPU. Raises InputError where one sequence does not fit."""
    from verl_dft.sampling.seeded import SeededChoice

    sequences = max_num_seqs or _CPU_MAX_NUM_SEQS
    if kv_cache_gib is not None:
        kv_bytes = int(kv_cache_gib * 2**30)
    else:
        per_sequence = _sequence_bytes(config, dtype, max_model_len, tensor_parallel_size)
        kv_bytes = _kv_cache_bytes(per_sequence, sequences, max_model_len, memory_share / tensor_parallel_size)
    return {
        "enforce_eager": True,
        "logits_processors": [SeededChoice],
        "block_size": CPU_BLOCK_SIZE,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": _CPU_BATCHED_TOKENS,
        "kv_cache_memory_bytes": kv_bytes,
    }


def _sequence_bytes(config: Any, dtype: str, max_model_len: int, tensor_parallel_size: int) -> int:
    """KV cache of one full sequence and one block more, in one of the tensor-parallel processes."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    heads = max(1, heads // tensor_parallel_size)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * heads * head_dim * (4 if dtype in ("float32", "auto") else 2)
    return (-(-max_model_len // CPU_BLOCK_SIZE) + 1) * CPU_BLOCK_SIZE * per_token


def _kv_cache_bytes(per_sequence: int, sequences: int, max_model_len: int, share: float) -> int:
    """Bytes for ``sequences`` full sequences, at most 40% of ``share`` of the free memory."""
    import psutil

    available = int(psutil.virtual_memory().available * _CPU_KV_MEMORY_FRAC * share)
    if per_sequence > available:
        raise InputError(
            f"one sequence of {max_model_len} tokens needs {per_sequence / 2**30:.1f} GiB of KV cache and "
            f"{available / 2**30:.1f} GiB can be taken; lower max_tokens, engine.max_model_len or num_replicas"
        )
    return min(sequences * per_sequence, available)
