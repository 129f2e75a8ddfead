"""Taking secrets out of what is written down: command lines and manifests are kept, and shown to others.

Three kinds are known: the values of environment variables whose names say so (``WANDB_API_KEY``, ``HF_TOKEN``), the
user and password of a URL, and the value of a setting called ``…api_key``, ``…password``, ``…secret`` or
``…access_token``.
"""

import os
import re

SHOWN = "***"
_NAMES = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:_\d+)?$", re.IGNORECASE)
_SHORTEST = 12
"""Shorter values are words (``EMPTY``, for servers that need no key), and would be found in any text."""
_IN_URL = re.compile(r"(?<=://)[^/\s'\"@]*:[^/\s'\"@]*(?=@)")
_SETTING = re.compile(
    r"((?:api_?key|password|secret|access_token)(?:=|[\"']?:\s+))([\"']?)([^\s\"',}]+)", re.IGNORECASE
)


def redacted(text: str) -> str:
    """``text`` with ``***`` in place of every secret in it."""
    for value in sorted(_values(), key=len, reverse=True):
        text = text.replace(value, SHOWN)
    text = _IN_URL.sub(SHOWN, text)
    return _SETTING.sub(lambda found: _hidden(*found.groups()), text)


def _hidden(name: str, quote: str, value: str) -> str:
    return f"{name}{quote}{value if value in ('null', 'None') or value.startswith('$') else SHOWN}"


def _values() -> set[str]:
    """What this process's environment keeps secret."""
    found = {value.strip() for name, value in os.environ.items() if _NAMES.search(name)}
    return {value for value in found if len(value) >= _SHORTEST and "/" not in value}
