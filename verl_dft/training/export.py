"""Writing the trained model as a Hugging Face folder: adapters merged, dtype explicit.

verl's own export writes PEFT-prefixed keys under LoRA, which ``transformers`` loads as random weights, and always bf16.
"""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from verl_dft.data.template import ConversationEncoder
from verl_dft.failpoints import failpoint
from verl_dft.files import atomic_dir

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


def export_model(engine: Any, path: Path, dtype: str) -> None:
    """Write the model of an FSDP engine to ``path``, atomically; every rank must call it.

    Args:
        engine: verl's FSDP engine.
        path: the folder to make (an old one is replaced once the new one is whole).
        dtype: ``fp32``, ``bf16`` or ``fp16``.
    """
    state = full_state(engine.module)
    if torch.distributed.get_rank() == 0:
        model = _plain_model(engine, state).to(DTYPES[dtype])
        model.config.dtype = DTYPES[dtype]
        with atomic_dir(path) as folder:
            model.save_pretrained(folder)
            for file in folder.glob("*.safetensors"):
                file.chmod(0o644)  # safetensors writes private files
            engine.model_config.get_processor().save_pretrained(folder)
            failpoint("export.before_rename")
    torch.distributed.barrier()


def _plain_model(engine: Any, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A model on the CPU with the given weights, adapters merged in float32."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    source = engine.model_config
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
    adapters = getattr(engine.module, "peft_config", None)
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
