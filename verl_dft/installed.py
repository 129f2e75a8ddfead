"""Objectives that other installed packages add, through entry points of the group ``verl_dft.objectives``."""

import functools
import importlib.metadata
import sys

GROUP = "verl_dft.objectives"


def installed_objectives() -> dict[str, str]:
    """Dotted path of each class by its objective's name; packages are looked through once for each ``sys.path``."""
    return dict(_read(tuple(sys.path)))


@functools.lru_cache(maxsize=16)
def _read(path: tuple[str, ...]) -> dict[str, str]:
    """``path`` is only the key: every installed package's files are opened, which is not done for each config."""
    return {entry.name: entry.value.replace(":", ".") for entry in importlib.metadata.entry_points(group=GROUP)}
