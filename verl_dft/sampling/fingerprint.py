"""Which model wrote a sample: by the content of its files, so that new weights in an old folder are another model."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from verl_dft.files import sha256_file

_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".model", ".txt", ".jinja", ".py")


def model_fingerprint(model: str, config: Any) -> str:
    """32 hex digits over a folder's weights, configuration and tokenizer, or ``name@commit`` of a model of the hub.

    Moving a folder keeps its fingerprint. A file is read once in a process as long as its size and time stay the same.

    Args:
        config: the loaded ``transformers`` configuration, which knows the commit.
    """
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{getattr(config, '_commit_hash', None) or 'unknown'}"
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        # Manifests tell when and by which command a model was made, not what it is.
        if path.is_file() and path.suffix in _SUFFIXES and not path.name.endswith(".manifest.json"):
            stat = path.stat()
            content = _sha256(str(path.resolve()), stat.st_size, stat.st_mtime_ns)
            digest.update(f"{path.name}\x1f{content}\n".encode())
    return digest.hexdigest()[:32]


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    return sha256_file(path)
