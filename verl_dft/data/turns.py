"""Which turns a model was trained on, as its chat template renders them, recorded so that an evaluation can compare.

A template may add a system turn of its own (Qwen's and SmolLM2's do) where a conversation has none. What counts is what
the model saw, so such a turn is listed like one that was given.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_dft.data import tables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "trained_with.json"
"""Name of the record in a model's folder."""
_MOST_ROWS = 10_000
_SYSTEM, _USER = "verldftsystemtext", "verldftusertext"


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the chat template's text (of all of them, where a tokenizer has several by name)."""
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def adds_system_turn(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template puts a system turn of its own before a conversation that has none."""
    user = {"role": "user", "content": _USER}
    try:
        plain, given = (
            tokenizer.apply_chat_template(turns, tokenize=False)
            for turns in ([user], [{"role": "system", "content": _SYSTEM}, user])
        )
    except Exception:  # jinja raises what the template's author chose: this one refuses a system turn
        return False
    before, found, rest = given.partition(_SYSTEM)
    between, begin = rest.partition(_USER)[0], plain.partition(_USER)[0]
    inside = begin.startswith(before) and begin.endswith(between) and len(begin) >= len(before) + len(between)
    return bool(found) and inside and bool(before or between)


def rendered_turns(roles: Sequence[str], adds_system: bool) -> str:
    """Roles of a prompt as rendered, joined by spaces: ``system user``. ``adds_system``: :func:`adds_system_turn`."""
    added = ["system"] if adds_system and "system" not in roles else []
    return " ".join([*added, *roles])


def trained_with(files: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The record for a model that is trained on these row files with this tokenizer.

    Returns:
        ``chat_template_sha256``; ``turns``, rendered roles before the response with the number of rows that have them,
        most rows first, over the first 10,000 rows of each file; ``prompts``, names of the prompts that the files'
        manifests tell.

    Raises:
        InputError: a file that cannot be read.
    """
    adds_system = adds_system_turn(tokenizer)
    counts = Counter(rendered_turns(roles, adds_system) for file in files for roles in _roles(Path(file)))
    prompts = sorted({name for file in files if (name := _prompt_name(Path(file)))})
    return {"chat_template_sha256": template_sha256(tokenizer), "turns": dict(counts.most_common()), "prompts": prompts}


def _roles(file: Path) -> Iterable[list[str]]:
    """The roles before the response, row by row."""
    for messages in itertools.islice(_messages(file), _MOST_ROWS):
        roles = [message["role"] for message in messages]
        yield roles[:-1] if roles[-1] == "assistant" else roles


def _messages(file: Path) -> Iterable[list[Mapping[str, str]]]:
    # rows have messages, preference pairs the prompt's turns alone
    column = "messages" if "messages" in tables.columns_of(file) else "prompt"
    if file.suffix != ".parquet":
        return (record[column] for record in tables.read_records(file))
    import pyarrow.parquet as pq

    batches = pq.ParquetFile(file, page_checksum_verification=True).iter_batches(batch_size=1000, columns=[column])
    return (messages for batch in batches for messages in batch.column(0).to_pylist())


def _prompt_name(file: Path) -> str | None:
    try:
        manifest = json.loads(Path(f"{file}.manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest.get("request", {}).get("prompt")
