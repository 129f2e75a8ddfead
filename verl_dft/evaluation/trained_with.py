"""Whether a model is asked in the way in which it was trained: the same chat template, turns that it has seen.

Training leaves ``trained_with.json`` in the model's folder (:mod:`verl_dft.data.turns`). A model without it (of a hub,
of another trainer) is compared with nothing. The texts of the turns are not compared: the papers train on the problem
alone and ask with an instruction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_dft.data.turns import RECORD, adds_system_turn, rendered_turns, template_sha256
from verl_dft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def training_warnings(model: str, tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> list[str]:
    """What is other than in training, a line each; none where the model's folder has no record.

    Args:
        model: folder or hub name.
        tokenizer: the model's, with the chat template that the evaluation uses.
        roles: the prompt's roles, e.g. ``["system", "user"]``.

    Raises:
        InputError: the record is damaged.
    """
    record = read_record(model)
    if record is None:
        return []
    found = []
    if record["chat_template_sha256"] != template_sha256(tokenizer):
        found.append(
            f"the chat template is not the one that {model} was trained with ({RECORD}): its scores are of prompts "
            "such as it has never seen; restore the template, or train with this one"
        )
    asked, seen = rendered_turns(roles, adds_system_turn(tokenizer)), record["turns"]
    if seen and asked not in seen:
        rows, turns = sum(seen.values()), " or ".join(f"'{known}'" for known in seen)
        prompts = f" (prompt={', '.join(record['prompts'])})" if record["prompts"] else ""
        found.append(
            f"the prompt's turns are '{asked}', in none of the {rows} rows counted in training, which have "
            f"{turns}{prompts}; ask with a prompt of these turns, or train with this one"
        )
    return found


def read_record(model: str) -> dict[str, Any] | None:
    """The record in a model's folder; None where there is none. Raises InputError where it is damaged."""
    path = Path(model).expanduser() / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(record["chat_template_sha256"], str) and isinstance(record["prompts"], list)
        whole = whole and all(isinstance(count, int) for count in record["turns"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise InputError(f"{path} is damaged; restore it, or delete it")
    return record
