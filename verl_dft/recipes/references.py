"""What stands between ``${`` and ``}``, taken apart."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from verl_dft.errors import InputError
from verl_dft.recipes.load import nearest

_OUTPUT = re.compile(r"(steps|all)\.([\w-]+)(?:\[([^\]]*)\])?\.([\w-]+)")


@dataclass(frozen=True)
class Reference:
    """An output of a step: ``steps.NAME[VARIABLE=ARM].OUTPUT``; of all that agree where ``many``."""

    many: bool
    step: str
    select: dict[str, str]
    output: str


def parse_reference(text: str, where: str) -> Reference:
    """Raises InputError for what is no reference to an output."""
    match = _OUTPUT.fullmatch(text)
    pairs = [part.partition("=") for part in match[3].split(",")] if match and match[3] else []
    if match is None or not all(separator for _, separator, _ in pairs):
        raise InputError(f"{where}: ${{{text}}} is not steps.NAME.OUTPUT, steps.NAME[VARIABLE=ARM].OUTPUT or all.…")
    return Reference(match[1] == "all", match[2], {key.strip(): arm.strip() for key, _, arm in pairs}, match[4])


def select_field(base: Any, rest: str, text: str, where: str) -> Any:
    """The field ``rest`` (``a.b``; names may have dots) of ``base``; None if missing, where ``text`` ends in ``?``."""
    if not rest:
        return base
    if isinstance(base, Mapping):
        for name in base:
            if rest == name:
                return base[name]
            if rest.startswith(f"{name}."):
                return select_field(base[name], rest.removeprefix(f"{name}."), text, where)
    if text.endswith("?"):
        return None
    valid = list(base) if isinstance(base, Mapping) else []
    raise InputError(f"{where}: ${{{text}}} has no field {rest!r}{nearest(rest, valid)}; ${{{text}?}} allows for that")
