"""The tokenised cache: arrays in a folder named by a hash of everything they depend on, built once under a lock."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_dft.files import atomic_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CODE = tuple(f"{name}.py" for name in "records row_checks tables template pieces encode arrays dataset cache".split())
"""Source files of this package whose change makes old caches invalid."""


def cache_key(facts: Mapping[str, Any]) -> str:
    """Name of the cache for these facts, the code that reads them and the libraries it uses."""
    code = hashlib.sha256()
    for name in _CODE:
        code.update((Path(__file__).parent / name).read_bytes())
    libraries = [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    text = json.dumps([facts, code.hexdigest(), libraries], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what decides a tokenizer's ids: vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)  # settings of the last call, not of the tokenizer
        rules.pop("padding", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([rules, special, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def cached_dir(root: str | Path, key: str, build: Callable[[Path], None]) -> Path:
    """The folder ``root/key``, made by ``build(folder)`` unless it is there.

    Safe between processes: one builds under a file lock, the others wait; the folder appears complete or not at all.
    """
    from filelock import FileLock

    root = Path(root)
    folder = root / key
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{key}.lock"):
            if not folder.is_dir():  # another process may have built it while this one waited
                with atomic_dir(folder) as temporary:
                    build(temporary)
    return folder
