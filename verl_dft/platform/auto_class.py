"""Which transformers class loads a model, found without importing every model that transformers knows.

verl 0.9.1 (utils/model.py) asks whether a configuration is among the *keys* of the mapping of vision models, and
transformers imports the module of each of them to list the keys: 0.7 s of every start, for a question that the
configuration's name answers.
"""

from types import ModuleType
from typing import Any


def choose_by_name(module: ModuleType) -> None:
    """Change ``get_hf_auto_model_class`` of ``verl.utils.model`` for plain text models; the rest is left to verl."""
    original = module.get_hf_auto_model_class
    vision = module.AutoModelForImageTextToText._model_mapping

    def choose(hf_config: Any) -> Any:
        if not hasattr(hf_config, "auto_map") and type(hf_config) not in vision:  # compares names
            for part, auto_class in module._architecture_to_auto_class.items():
                if part in hf_config.architectures[0]:
                    return auto_class
        return original(hf_config)

    module.get_hf_auto_model_class = choose
