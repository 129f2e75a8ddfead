"""Checks of objectives' options: one clear line for a value that cannot be meant."""

import math
from collections.abc import Sequence
from typing import Any

from verl_dft.errors import InputError


def check_range(name: str, value: Any, low: float = 0.0, high: float = math.inf, hint: str = "") -> None:
    """``low <= value <= high``, or an :class:`InputError` that names ``objective.<name>`` and gives ``hint``."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and low <= value <= high):
        bounds = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise InputError(f"objective.{name} must be {bounds}{f' ({hint})' if hint else ''}, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """``value`` is one of ``choices``, or an :class:`InputError`."""
    if value not in choices:
        raise InputError(f"objective.{name}={value} is not one of {', '.join(choices)}")


def check_switch(name: str, value: Any) -> None:
    """``value`` is true or false, or an :class:`InputError`: a word like "no" would count as true."""
    if not isinstance(value, bool):
        raise InputError(f"objective.{name} must be true or false, got {value!r}")


def check_level(level: Any, length_normalized: Any) -> None:
    """``level`` is token or sequence, and ``length_normalized`` is asked for only where it does something."""
    check_choice("level", level, ("token", "sequence"))
    check_switch("length_normalized", length_normalized)
    if length_normalized and level == "token":
        raise InputError("objective.length_normalized=true needs objective.level=sequence; a token has no length")
