"""The folder of a command that samples: which configuration it belongs to, and what is written at the end."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.redact import redacted_values

STORE = "store"
"""The folder of the samples, within that of what they are for."""

# Cannot change what is written; a run may be continued with other values.
VOLATILE = ("output_dir", "overwrite", "grading", "num_replicas", "dry_run")


def identity(config: Mapping[str, Any], volatile: tuple[str, ...] = VOLATILE) -> dict[str, Any]:
    """What a result depends on, as JSON values, without secrets: it is written down."""
    return redacted_values({k: v for k, v in config.items() if k not in volatile})


def check_folder(folder: Path, config: Mapping[str, Any], volatile: tuple[str, ...] = VOLATILE) -> None:
    """Refuse to mix two configurations in one folder, unless ``overwrite`` is set. Raises InputError."""
    old = folder / "config.json"
    if config["overwrite"] or not old.is_file():
        return
    before, now = json.loads(old.read_text(encoding="utf-8")), identity(config, volatile)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        raise InputError(
            f"{folder} holds a result made with another configuration ({', '.join(changed)} differ); "
            "give another output_dir, or overwrite=true"
        )
