"""Writing an analysis: tables as parquet with a manifest beside each, figures, and a page to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_dft.analysis import style
from verl_dft.errors import InputError
from verl_dft.files import atomic_write, sha256_file, write_manifest, writing
from verl_dft.report.tables import Table

FORMATS = ("png", "svg", "pdf")


@dataclass(frozen=True)
class Figure:
    """``draw`` gets a matplotlib Axes; ``caption`` says what smoothing, bands and units it shows."""

    draw: Callable[[Any], None]
    caption: str


@dataclass(frozen=True)
class Analysis:
    """What an analysis found.

    Attributes:
        tables: file name without ending -> records; every figure's data is among them.
        figures: file name without ending -> figure.
        shown: title -> table of what a reader wants to see as text.
        inputs: name -> file that was read.
        notes: what was left out, a line each.
    """

    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    figures: Mapping[str, Figure]
    shown: Mapping[str, Table]
    inputs: Mapping[str, Path]
    notes: Sequence[str] = field(default_factory=list)

    def markdown(self, title: str) -> str:
        """The page ``<what>.md``."""
        lines = [f"# {title}"]
        for name, table in self.shown.items():
            lines += ["", f"## {name}", "", table.markdown()]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        for name, figure in self.figures.items():
            lines += ["", f"{name}: {figure.caption}"]
        return "\n".join(lines) + "\n"


def check_formats(formats: Any) -> list[str]:
    """The endings of figures. Raises InputError for one that is not written."""
    formats = [formats] if isinstance(formats, str) else formats
    if not isinstance(formats, list) or not formats or any(one not in FORMATS for one in formats):
        raise InputError(f"formats={formats}; it takes one or more of {', '.join(FORMATS)}")
    return formats


def write(analysis: Analysis, what: str, folder: Path, formats: Sequence[str], command: str | None) -> list[Path]:
    """Write everything into ``folder`` and return the files: figures first, the page last."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    written: list[Path] = []
    with writing(folder):
        for name, figure in analysis.figures.items():
            written += style.save(figure.draw, folder / name, figure.caption, formats)
        facts: dict[str, Any] = {"inputs": analysis.inputs, "command": command, "notes": list(analysis.notes)}
        facts["figures"] = {path.name: sha256_file(path) for path in written}
        facts["captions"] = {name: figure.caption for name, figure in analysis.figures.items()}
        for name, records in analysis.tables.items():
            path = folder / f"{name}.parquet"
            with atomic_write(path, "wb") as file:
                pq.write_table(pa.Table.from_pylist([dict(record) for record in records]), file)
            write_manifest(path, num_rows=len(records), rows_sha256=sha256_file(path), **facts)
            written.append(path)
        page = folder / f"{what}.md"
        with atomic_write(page) as file:
            file.write(analysis.markdown(f"verl-dft analyze {what}"))
    return [*written, page]
