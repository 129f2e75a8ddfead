"""Whether two model folders differ in their weights only, so that one engine can hold first one, then the other."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# vLLM's reloading was checked for these; it is known to go wrong for some others (state-space layers).
_RELOADABLE = ("llama", "mistral", "qwen2", "qwen3")
# Files that an engine reads beside the weights.
_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
)  # fmt: skip
# Where a folder came from and how it is talked to; an engine is given token ids.
_IRRELEVANT = ("_name_or_path", "name_or_path", "transformers_version", "chat_template", "is_local", "local_files_only")


@dataclass(frozen=True)
class Shape:
    """What an engine takes from a folder beside its weights' values. ``obstacle``: why these cannot be replaced."""

    model: str
    files: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    obstacle: str | None = None


def model_shape(model: str) -> Shape:
    """The shape of a folder as it is now: configuration, end tokens, tokenizer; type and shape of every tensor."""
    folder = Path(model)
    if not folder.is_dir():
        return Shape(model, {}, {}, f"{model} is not a folder")
    files = {name: _content(folder / name) for name in _FILES}
    config, tensors = files["config.json"] or {}, _tensors(folder)
    obstacle = None
    if config.get("model_type") not in _RELOADABLE or config.get("quantization_config"):
        obstacle = f"new weights are not read into a running engine for a model like {model}"
    elif not tensors:
        obstacle = f"{model} has no safetensors files"
    return Shape(model, files, tensors, obstacle)


def shape_difference(one: Shape, other: Shape) -> str | None:
    """What an engine would have to be started anew for, or None where the values of the weights alone differ."""
    if one.obstacle or other.obstacle:
        return one.obstacle or other.obstacle
    for name in _FILES:
        if one.files[name] != other.files[name]:
            return f"{one.model} and {other.model} differ in {name}"
    if one.tensors != other.tensors:
        return f"{one.model} and {other.model} differ in a tensor's name, shape or number type"
    return None


def _content(path: Path) -> Any:
    if not path.is_file():
        return None
    content = path.read_bytes()
    if path.suffix != ".json" or path.name in ("tokenizer.json", "vocab.json"):
        return hashlib.sha256(content).hexdigest()
    value = json.loads(content)
    return {key: item for key, item in value.items() if key not in _IRRELEVANT} if isinstance(value, dict) else value


def _tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor, from the files' headers."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118, the file is no mapping
                tensor = file.get_slice(name)
                found[name] = (str(tensor.get_dtype()), tuple(tensor.get_shape()))
    return found
