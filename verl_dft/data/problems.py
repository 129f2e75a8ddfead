"""The problems that a data configuration describes, without making training rows of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_dft.data import tables
from verl_dft.data.records import Problem
from verl_dft.errors import InputError


def problems_of(data: Mapping[str, Any], limit: int | None = None) -> list[Problem]:
    """The training problems of ``data.train_files`` (files of problems) or else of ``data.source``.

    Args:
        data: keys ``train_files`` and ``source``, as for training; others are ignored.
        limit: the first so many; None: all.

    Raises:
        InputError: neither is given, a file holds rows instead of problems, the same id twice, or what the source is
            refused for.
    """
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise InputError(f"limit={limit}; it is the number of problems to take, at least 1 (null: all)")
    from verl_dft.data.sources import load_problem_set

    files = _listed(data.get("train_files"))
    source = data.get("source") or {}
    if not files and (not source or (source["name"] == "files" and not source.get("path"))):
        raise InputError("no problems: set data=NAME (see verl-dft data list) or data=FILE")
    if files:
        problems = [problem for file in files for problem in _of_file(file, source)]
    else:
        problems = load_problem_set(source).train
    _check_unique(problems)
    return problems[:limit]


def files_of(data: Mapping[str, Any]) -> list[Path]:
    """The local files that :func:`problems_of` reads."""
    files = _listed(data.get("train_files")) or _listed((data.get("source") or {}).get("path"))
    return [Path(file).expanduser() for file in files]


def inputs_of(data: Mapping[str, Any]) -> dict[str, str]:
    """The files that :func:`problems_of` reads, as a manifest names its inputs."""
    return {f"problems{i}" if i else "problems": str(path) for i, path in enumerate(files_of(data))}


def _listed(files: Any) -> list[str | Path]:
    return [files] if isinstance(files, str | Path) else list(files or [])


def _of_file(file: str | Path, source: Mapping[str, Any]) -> Sequence[Problem]:
    from verl_dft.data.sources import load_problems

    columns = tables.columns_of(Path(file).expanduser())
    keys = {key: value for key, value in source.items() if key.endswith("_key")}
    if keys.get("problem_key", "problem") not in columns:
        kind = (
            "holds training rows" if "messages" in columns else f"has no column {keys.get('problem_key', 'problem')!r}"
        )
        raise InputError(
            f"{file} {kind}, and problems are wanted here; give a file with columns problem and answer, e.g. the "
            "problems.jsonl that verl-dft data make writes"
        )
    return load_problems({"name": "files", "path": str(file), "subset": "first_n", **keys})


def _check_unique(problems: Sequence[Problem]) -> None:
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise InputError(f"problem id {problem.id!r} is there twice; make the ids of all files unique")
        seen.add(problem.id)
