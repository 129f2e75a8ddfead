"""A critic with the attention that its configuration asks for.

verl 0.9.1 loads every value model with flash attention, whatever ``critic.model.override_config`` says
(https://github.com/verl-project/verl/issues/5210): without flash-attn, on a CPU or a GPU, there is no critic.
"""

from types import ModuleType
from typing import Any


def respect_attention(module: ModuleType) -> None:
    """Change ``load_valuehead_model`` of ``verl.utils.model`` for configurations of other attention."""
    original = module.load_valuehead_model

    def load(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
        wanted = getattr(model_config, "_attn_implementation", None)
        if wanted in (None, "flash_attention_2"):
            return original(local_path, torch_dtype, model_config, trust_remote_code)
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification.from_pretrained(
            local_path,
            dtype=torch_dtype,
            config=model_config,
            attn_implementation=wanted,
            trust_remote_code=trust_remote_code,
        )

    module.load_valuehead_model = load
