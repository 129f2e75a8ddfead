"""What a training row must hold, value by value; see ``verl_dft.data.records``."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from verl_dft.errors import InputError
from verl_dft.origins import ORIGINS

_LARGEST = 3.4e38
"""What float32 holds: larger numbers would be stored as infinite."""
PER_TOKEN = ("ref_logp", "behavior_logp")
BUILDERS = {
    "advantage": "verl-dft groups",
    "ref_logp": "verl-dft score",
    "behavior_logp": "verl-dft sample (it stores the sampler's log-probs) followed by a builder",
}
"""Which command writes a column, for the message that says it is missing."""


def text_of(where: str, key: str, value: Any) -> str:
    """The text of a column, in which a number stands for its digits and null for nothing. Raises InputError."""
    if value is None:
        return ""
    number = type(value) is int or (isinstance(value, float) and math.isfinite(value))
    if not number and not isinstance(value, str):
        raise InputError(f"{where}: column {key!r} is {value!r}; it must be a text or a number")
    return str(value)


def check_row(where: str, default_id: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the columns that it lacks filled in. Raises InputError for what training could not use.

    Args:
        where: file and row, for messages.
        default_id: ``problem_id`` of a row without one.
    """
    row = dict(record)
    given = row.get("problem_id")
    row["problem_id"] = default_id if given is None else text_of(where, "problem_id", given)
    row["origin"] = row.get("origin") or "expert"
    if row["origin"] not in ORIGINS:
        raise InputError(f"{where}: column 'origin' is {row['origin']!r}; use one of {', '.join(ORIGINS)}")
    ids = row.get("response_ids")
    row["messages"] = _check_messages(where, row.get("messages"), has_ids=ids is not None)
    if ids is not None:
        _check_ids(where, ids)
    for name in PER_TOKEN:
        if row.get(name) is not None:
            _check_per_token(where, name, row[name], ids)
    for name in ("advantage", "reward"):
        value = row.get(name)
        if value is not None and (not _is_number(value) or math.isnan(value)):
            raise InputError(f"{where}: column {name!r} is {value!r}; it must be a finite number")
    return row


def _is_number(value: Any) -> bool:
    """A number that float32 holds, or NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > _LARGEST


def _check_ids(where: str, ids: Any) -> None:
    import numpy as np

    try:
        found = np.asarray(ids)
    except (ValueError, OverflowError):
        found = np.asarray(None)
    if found.shape == (0,):
        raise InputError(f"{where}: column 'response_ids' is empty; a response needs at least one token, drop the row")
    if found.ndim != 1 or found.dtype.kind not in "iu":  # numbers with a fraction would lose it
        raise InputError(f"{where}: column 'response_ids' must be a list of token ids, whole numbers")


def _check_messages(where: str, messages: Any, has_ids: bool) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError(f"{where}: column 'messages' must be a non-empty list of {{role, content}}")
    clean = []
    for turn, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise InputError(f"{where}: messages[{turn}] must have a 'role' and a text 'content'")
        if message.get("role") not in ("system", "user", "assistant", "tool"):
            raise InputError(
                f"{where}: messages[{turn}] has role {message.get('role')!r}; use system, user, assistant, tool"
            )
        clean.append({"role": message["role"], "content": message["content"]})
    if has_ids:
        if clean[-1]["role"] == "assistant" and len(clean) == 1:
            raise InputError(f"{where}: column 'messages' has no turn before the response; add the user's turn")
        return clean
    if clean[-1]["role"] != "assistant":
        raise InputError(f"{where}: column 'messages' must end with an assistant turn (the text to train on)")
    if not clean[-1]["content"].strip():
        raise InputError(f"{where}: column 'messages' has an empty response; drop the row or give it a text")
    if len(clean) == 1:
        raise InputError(f"{where}: column 'messages' has no turn before the response; add the user's turn")
    return clean


def _check_per_token(where: str, name: str, values: Sequence[float], ids: Sequence[int] | None) -> None:
    if ids is None:
        raise InputError(
            f"{where}: column {name!r} needs 'response_ids' beside it (a text can be tokenised in several ways); "
            f"make the rows with {BUILDERS[name]}"
        )
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise InputError(f"{where}: column {name!r} must be a list of log-probs")
    if len(values) != len(ids):
        raise InputError(
            f"{where}: column {name!r} has {len(values)} values for {len(ids)} response_ids; give one for each"
        )
    import numpy as np

    if isinstance(values, array):  # of one type
        found = np.array(values, dtype=np.float64)  # a copy
        found[np.abs(found) > _LARGEST] = math.inf
    else:
        found = np.asarray([value if _is_number(value) else math.inf for value in values], dtype=np.float64)
    # rounding may lift a log-prob a little above 0; NaN stands for "unknown" in behavior_logp only
    wrong = ~(found <= 1e-3) & ~(np.isnan(found) & (name == "behavior_logp"))
    if wrong.any():
        at = int(wrong.argmax())
        raise InputError(f"{where}: column {name!r} holds {values[at]} at position {at}; a log-prob is at most 0")
