"""Values of a recipe: ``${…}`` put in, and written as Hydra overrides."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from verl_dft.errors import InputError

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_PLAIN = re.compile(r"[A-Za-z0-9_/\-+.$%*@?|:]+")
"""What Hydra's grammar reads as one value without quotes."""
_NOT_TEXT = ("null", "true", "false", "none", "inf", "nan")
AS_GIVEN = ("model", "data", "objective", "benchmark", "composition")
"""Keys whose value the commands read themselves: never quoted."""


def filled(value: Any, lookup: Callable[[str], Any]) -> Any:
    """``value`` with its references replaced, in mappings and lists too; one whole reference keeps its type.

    A key of a mapping that is a whole reference and has no value stands for the entries of what it names.

    Args:
        lookup: the value of what stands between ``${`` and ``}``.

    Raises:
        InputError: such a key names no mapping.
    """
    if isinstance(value, Mapping):
        found: dict[Any, Any] = {}
        for key, item in value.items():
            whole = _REFERENCE.fullmatch(key.strip()) if isinstance(key, str) and item is None else None
            found |= _entries(whole[1].strip(), lookup) if whole else {key: filled(item, lookup)}
        return found
    if isinstance(value, list):
        return [filled(item, lookup) for item in value]
    if not isinstance(value, str):
        return value
    if whole := _REFERENCE.fullmatch(value.strip()):
        return lookup(whole[1].strip())
    return _REFERENCE.sub(lambda match: str(lookup(match[1].strip())), value)


def _entries(text: str, lookup: Callable[[str], Any]) -> dict[Any, Any]:
    found = lookup(text)
    if not isinstance(found, Mapping):
        raise InputError(f"${{{text}}} stands as a key without a value, so it must be a mapping, not {found!r}")
    return dict(found)


def override(key: str, value: Any) -> str:
    """``key=value`` in Hydra's grammar, which has to be quoted once more for a shell."""
    if key.startswith("~"):
        return key if value is None else f"{key}={literal(value)}"
    if key in AS_GIVEN and isinstance(value, str):
        return f"{key}={value}"
    if key in AS_GIVEN and isinstance(value, list):
        return f"{key}=[{','.join(map(str, value))}]"
    return f"{key}={literal(value)}"


def literal(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{','.join(map(literal, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key(key)}:{literal(item)}" for key, item in value.items()) + "}"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT and "${" not in text:
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _key(key: Any) -> str:
    """A key of a mapping: Hydra's grammar has no quotes there, a backslash before each sign of its own instead."""
    return re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", str(key))
