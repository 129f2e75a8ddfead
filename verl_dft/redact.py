"""Taking secrets out of what is written down: command lines and manifests are kept, and shown to others.

Three kinds are known: the values of environment variables whose names say so (``WANDB_API_KEY``, ``HF_TOKEN``), the
user and password of a URL, and the value of a setting called ``…api_key``, ``…password``, ``…secret`` or
``…access_token``.
"""

import json
import os
import re
from typing import Any

SHOWN = "***"
_NAMES = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:_\d+)?$", re.IGNORECASE)
_SHORTEST = 12
"""Shorter values are words (``EMPTY``, for servers that need no key), and would be found in any text."""
_IN_URL = re.compile(r"(?<=://)[^/\s'\"@]*:[^/\s'\"@]*(?=@)")
_CALLED = r"(?:api_?key|password|secret|access_token)"
_NAME = re.compile(f"{_CALLED}$", re.IGNORECASE)
_SETTING = re.compile(rf"({_CALLED}(?:=|[\"']?:\s+))([\"']?)([^\s\"',}}]+)", re.IGNORECASE)


def redacted(text: str) -> str:
    """``text`` with ``***`` in place of every secret in it."""
    for value in sorted(_values(), key=len, reverse=True):
        text = text.replace(value, SHOWN)
    text = _IN_URL.sub(SHOWN, text)
    return _SETTING.sub(lambda found: _hidden(*found.groups()), text)


def redacted_values(config: Any) -> Any:
    """A configuration as JSON's values (what JSON has not becomes text), every secret in it ``***``."""
    return _walked(json.loads(json.dumps(config, default=str)))


def _walked(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {redacted(key): _walked(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_walked(inner, name) for inner in value]
    if value is not None and _NAME.search(name):
        return value if _is_reference(str(value)) else SHOWN
    return redacted(value) if isinstance(value, str) else value


def _hidden(name: str, quote: str, value: str) -> str:
    return f"{name}{quote}{value if _is_reference(value) else SHOWN}"


def _is_reference(value: str) -> bool:
    """Whether it says that there is none, or where to find it."""
    return value in ("null", "None") or value.startswith("$")


def _values() -> set[str]:
    """What this process's environment keeps secret."""
    found = {value.strip() for name, value in os.environ.items() if _NAMES.search(name)}
    return {value for value in found if len(value) >= _SHORTEST and "/" not in value}
