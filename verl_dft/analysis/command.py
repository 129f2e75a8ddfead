"""``verl-dft analyze WHAT [key=value …]``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from verl_dft.errors import InputError

if TYPE_CHECKING:
    from omegaconf import DictConfig

WHATS = ("tokens", "kl", "entropy", "stages", "dynamics", "sweep", "change", "claims")
"""Modules of this package, each with a file of its keys in ``configs/analysis``."""


def main(argv: Sequence[str]) -> int:
    """Read, draw, write, and print the tables. Returns the exit code 0.

    Raises:
        InputError: unknown analysis or key, results that are missing, damaged or not comparable.
    """
    from verl_dft.analysis.output import check_formats, write
    from verl_dft.config import command_line
    from verl_dft.sampling.configure import plain

    what, config = compose_analysis(argv)
    formats, folder = check_formats(plain(config)["formats"]), Path(config.output_dir).expanduser()
    analysis = importlib.import_module(f"verl_dft.analysis.{what}").run(plain(config))
    written = write(analysis, what, folder, formats, command_line())
    print(analysis.markdown(f"verl-dft analyze {what}"))
    print(f"written: {folder}/{', '.join(path.name for path in written)}")
    return 0


def compose_analysis(argv: Sequence[str]) -> tuple[str, DictConfig]:
    """The analysis and its checked configuration; no result is looked at.

    Raises:
        InputError: unknown analysis or key, or a value that cannot be.
    """
    from verl_dft.analysis.output import check_formats
    from verl_dft.config import compose, require
    from verl_dft.sampling.configure import plain

    what, name, overrides = parse(argv)
    config = compose(name, [f"analysis={what}", *overrides])
    require(config, "runs", "output_dir")
    check_formats(plain(config)["formats"])
    module = importlib.import_module(f"verl_dft.analysis.{what}")
    if hasattr(module, "check"):
        module.check(plain(config))
    return what, config


def parse(argv: Sequence[str]) -> tuple[str, str, list[str]]:
    """The analysis, the configuration's name and the overrides.

    Raises:
        InputError: unknown analysis, or an argument that is no override.
    """
    from verl_dft.config import split_config_name

    if not argv or argv[0] not in WHATS:
        found = f"{argv[0]!r} is no analysis" if argv else "no analysis was named"
        raise InputError(f"{found}; write verl-dft analyze WHAT …, WHAT one of {', '.join(WHATS)}")
    return argv[0], *split_config_name(argv[1:], "analyze")
