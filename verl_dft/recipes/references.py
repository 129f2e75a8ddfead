"""What stands between ``${`` and ``}``, taken apart."""

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from verl_dft.errors import InputError
from verl_dft.recipes.load import nearest

_OUTPUT = re.compile(r"(steps|all|each)\.([\w-]+)(?:\[([^\]]*)\])?\.([\w-]+)")


@dataclass(frozen=True)
class Reference:
    """``steps.NAME[VARIABLE=ARM].OUTPUT``: an output of a step.

    Attributes:
        kind: ``steps`` for one step, ``all`` for the list of those that agree, ``each`` for a mapping of them by arm.
        select: loop variable -> the name of its arm, or a pattern of names (``lr_*``).
    """

    kind: str
    step: str
    select: dict[str, str]
    output: str

    def fixes(self, variable: str) -> bool:
        """Whether the reference itself names the one arm of a loop variable."""
        return variable in self.select and not any(sign in self.select[variable] for sign in "*?")

    def allows(self, variable: str, arm: str) -> bool:
        """Whether an arm is one that the reference asks for."""
        return variable not in self.select or fnmatch.fnmatchcase(arm, self.select[variable])


def parse_reference(text: str, where: str) -> Reference:
    """Raises InputError for what is no reference to an output."""
    match = _OUTPUT.fullmatch(text)
    pairs = [part.partition("=") for part in match[3].split(",")] if match and match[3] else []
    if match is None or not all(separator for _, separator, _ in pairs):
        raise InputError(
            f"{where}: ${{{text}}} is not steps.NAME.OUTPUT, steps.NAME[VARIABLE=ARM].OUTPUT, all.… or each.…"
        )
    return Reference(match[1], match[2], {key.strip(): arm.strip() for key, _, arm in pairs}, match[4])


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
