"""Writing the trained model as a Hugging Face folder: adapters merged, dtype explicit.

verl's own export writes PEFT-prefixed keys under LoRA, which ``transformers`` loads as random weights, and always bf16.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from verl_dft.data.template import ConversationEncoder
from verl_dft.data.turns import RECORD
from verl_dft.failpoints import failpoint
from verl_dft.files import atomic_dir, write_json, writing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def full_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole state dict on the CPU of rank 0 (empty elsewhere); every rank must call it."""
    first = torch.distributed.get_rank() == 0
    state = {}
    for name, value in module.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if first:
            state[name] = whole.detach().to("cpu", copy=True)
    return state


def export_model(engine: Any, path: Path, dtype: str, trained_with: Mapping[str, Any] | None = None) -> None:
    """Write the model of an FSDP engine to ``path``, atomically; every rank must call it.

    Args:
        engine: verl's FSDP engine.
        path: the folder to make (an old one is replaced once the new one is whole).
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        trained_with: see :mod:`verl_dft.data.turns`; only rank 0's counts.
    """
    from verl.utils.memory_utils import aggressive_empty_cache

    state = full_state(engine.module)
    if torch.distributed.get_rank() == 0:
        adapters = getattr(engine.module, "peft_config", None)
        write_model(engine.model_config, state, path, dtype, adapters, trained_with)
    del state
    aggressive_empty_cache()  # for whoever wants the memory next: an evaluation beside training
    torch.distributed.barrier()


def write_model(
    source: Any,
    state: dict[str, torch.Tensor],
    path: Path,
    dtype: str,
    adapters: Any = None,
    trained_with: Mapping[str, Any] | None = None,
) -> None:
    """Write weights as the model of ``source``, atomically; one process calls it.

    Args:
        source: what the weights began as: verl's model configuration, of which ``hf_config``, ``trust_remote_code``,
            ``local_path``, ``tokenizer`` and ``get_processor()`` are used.
        state: the whole state dict, on the CPU.
        adapters: PEFT's configurations by name, where ``state`` has adapters to merge.
        trained_with: the record that goes with the model, see :mod:`verl_dft.data.turns`.
    """
    with torch.random.fork_rng(devices=[]):  # a new model is drawn at random; training draws as if it had not been
        model = _plain_model(source, state, adapters).to(DTYPES[dtype])
    model.config.dtype = DTYPES[dtype]
    with writing(path), atomic_dir(path) as folder:
        model.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes private files
        source.get_processor().save_pretrained(folder)
        if trained_with is not None:
            write_json(folder / RECORD, trained_with)
        failpoint("export.before_rename")


def _plain_model(source: Any, state: dict[str, torch.Tensor], adapters: Any) -> torch.nn.Module:
    """A model on the CPU with the given weights, adapters merged in float32."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = source.hf_config
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, trust_remote_code=source.trust_remote_code, attn_implementation="eager"
    )
    try:
        model.generation_config = GenerationConfig.from_pretrained(source.local_path)
    except OSError:  # a base model without one: the config's ids are used
        model.generation_config = GenerationConfig.from_model_config(config)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # sampling values without do_sample, as many bases ship them, cannot be saved
        model.generation_config.do_sample = True
    add_end_token(model.generation_config, source.tokenizer)
    if adapters:
        from peft import get_peft_model

        model = get_peft_model(model, adapters["default"])
    missing, unexpected = model.load_state_dict(state, strict=False)
    # a tied lm_head is the embedding under a second name
    missing = [name for name in missing if not (config.tie_word_embeddings and name.endswith("lm_head.weight"))]
    assert not missing and not unexpected, f"export: missing {missing}, unexpected {unexpected}"
    return model.merge_and_unload() if adapters else model


def add_end_token(generation_config: Any, tokenizer: Any) -> None:
    """Let generation stop at the token with which the chat template ends a turn, which a base model's need not be.

    Without a chat template the configuration stays as it is.
    """
    if not getattr(tokenizer, "chat_template", None):
        return
    stops = generation_config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    end = ConversationEncoder(tokenizer).end_id
    if end not in stops:
        generation_config.eos_token_id = [*stops, end] if stops else end
