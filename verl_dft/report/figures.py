"""The figures and samples of a run: what its ``analyze`` steps drew, and what its models wrote."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from verl_dft.data.tables import read_parquet
from verl_dft.errors import InputError
from verl_dft.files import sha256_file
from verl_dft.report.parts import Folded, Heading, Part, Picture, Text, Verbatim
from verl_dft.report.runs import Run, RunStep, file_name, read_json

_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_CHARS = 1500
_COLUMNS = ("problem_id", "index", "grade", "gold", "response")


def figures(run: Run) -> list[Part]:
    """What the run's ``analyze`` steps wrote: pictures with their captions, and their tables as text."""
    parts: list[Part] = []
    for step in run.steps:
        if step.verb.split()[0] == "analyze" and step.done:
            parts += [Heading(step.name, 4), *_pictures(run, step), *_pages(step)]
    return parts


def _pictures(run: Run, step: RunStep) -> Iterator[Part]:
    captions: dict[str, str] = {}
    hashes: dict[str, str] = {}
    for path in sorted(step.folder.glob("*.manifest.json")):
        try:
            manifest = read_json(path)
            captions |= _texts(manifest.get("captions"))
            hashes |= _texts(manifest.get("figures"))
        except (InputError, AttributeError):
            run.problems.append(f"{step.name}: {run.relative(path)} is damaged")
    missing = [name for name in hashes if name.endswith(".png") and not (step.folder / name).is_file()]
    run.problems.extend(f"{step.name}: {name} is missing" for name in missing)
    for path in sorted(step.folder.glob("*.png")):
        with open(path, "rb") as file:
            whole = file.read(len(_PNG)) == _PNG
        if not whole or hashes.get(path.name, "") not in ("", sha256_file(path)):
            run.problems.append(f"{step.name}: {path.name} is not the figure that the step drew")
            continue
        yield Picture(path, file_name(f"{run.slug}-{step.name}-{path.name}"), captions.get(path.stem) or path.stem)


def _texts(found: Any) -> dict[str, str]:
    """A mapping of a manifest; nothing where there is none. AttributeError for anything else."""
    return {name: str(text) for name, text in (found or {}).items()}


def _pages(step: RunStep) -> Iterator[Part]:
    for path in sorted(step.folder.glob("*.md")):
        text = path.read_text(encoding="utf-8", errors="replace")
        yield Folded(f"{path.name}: what the figures show, in numbers", [Verbatim(text.strip())])


def samples(run: Run, num: int) -> list[Part]:
    """The first sample of ``num`` problems, evenly spaced, from each evaluation, with its verdict."""
    parts: list[Part] = []
    for step in run.steps if num else ():
        if step.verb.split()[0] != "evaluate" or not step.done:
            continue
        for path in step.results:
            try:
                shown = _chosen(path.parent / "samples.parquet", num)
            except (OSError, ValueError, KeyError):
                run.notes.append(f"{step.name}: {run.relative(path.parent)}/samples.parquet cannot be read")
                continue
            inner: list[Part] = []
            for row in shown:
                kind = row["grade"] if row["grade"] in ("correct", "wrong") else "other"
                inner.append(Text(f"{row['problem_id']}, answer {row['gold']}: {row['grade']}", "quiet"))
                inner.append(Verbatim(_cut(str(row["response"])), kind))
            name = step.name if len(step.results) == 1 else f"{step.name}, {path.parent.name}"
            parts.append(Folded(f"Samples of {name}", inner, html_only=True))
    return parts


def _chosen(path: Path, num: int) -> list[dict[str, Any]]:
    rows = [row for row in read_parquet(path, _COLUMNS).to_pylist() if row["index"] == 0]
    return rows[:: max(1, len(rows) // num)][:num]


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}\n… ({len(text) - _MAX_CHARS} characters more)"
