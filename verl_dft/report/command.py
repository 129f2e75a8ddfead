"""``verl-dft report RUN… [key=value …]``: paper beside ours, as Markdown and as one page of HTML. docs/report.md."""

import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.files import atomic_write, write_json, writing
from verl_dft.provenance import now
from verl_dft.report import html
from verl_dft.report.beside import STATUSES, Limits, check_limits
from verl_dft.report.parts import (
    HEAD,
    Folded,
    Heading,
    Items,
    Part,
    Picture,
    Shown,
    Text,
    plain_text,
    to_html,
    to_markdown,
)
from verl_dft.report.recipe_page import Page, page_of
from verl_dft.report.runs import find_runs, read_run
from verl_dft.report.tables import Table

_TITLE = "Recipes: the papers' numbers and ours"
_USAGE = "verl-dft report RUN… [output_dir=FOLDER] [tolerance=2.0] [record=FILE]"


def main(argv: Sequence[str]) -> int:
    """Write the report and print the overview. Returns 0; incomplete runs are lines of the report, not errors.

    Raises:
        InputError: no run, an unknown key or a value that cannot be.
    """
    from verl_dft.config import command_line, compose, split_config_name
    from verl_dft.sampling.configure import plain

    paths, rest = _split(argv)
    name, overrides = split_config_name(rest, "report")
    if not paths:
        raise InputError(f"verl-dft report needs a run; usage: {_USAGE}")
    config = plain(compose(name, overrides))
    limits = check_limits(config["tolerance"], config["relative_tolerance"])
    if isinstance(config["samples"], bool) or not isinstance(config["samples"], int) or config["samples"] < 0:
        raise InputError(f"samples={config['samples']} must be a whole number of at least 0")
    pages, broken = read_pages(paths, limits, config["samples"])
    folder = Path(config["output_dir"]).expanduser()
    with writing(folder):
        write(pages, broken, folder, limits, command_line())
    print(overview(pages).text())
    for line in [*broken, *(f"{page.run.name}: {problem}" for page in pages for problem in page.run.problems)]:
        print(f"incomplete: {line}")
    print(f"page: {folder / 'index.html'}   Markdown: {folder / 'report.md'}")
    if config["record"]:
        from verl_dft.report.results import record

        left = record(Path(config["record"]), pages)
        print("\n".join([*left, f"recorded: {config['record']}; make docs writes recipes/README.md anew"]))
    return 0


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Runs, and everything else: overrides, ``--config-name NAME``."""
    paths: list[str] = []
    rest: list[str] = []
    items = iter(argv)
    for item in items:
        if item == "--config-name":
            rest += [item, *islice(items, 1)]
        else:
            (rest if item.startswith("-") or ("=" in item and not Path(item).exists()) else paths).append(item)
    return paths, rest


def read_pages(paths: Sequence[str], limits: Limits, num_samples: int) -> tuple[list[Page], list[str]]:
    """The runs that can be read, and a line for each that cannot. Raises InputError where no run is left."""
    runs, broken = [], []
    for folder in find_runs(paths):
        try:
            runs.append(read_run(folder))
        except InputError as error:
            broken.append(str(error))
    if not runs:
        raise InputError(broken[0])
    counts: Counter[tuple[str, str]] = Counter()
    slugs: Counter[str] = Counter()
    pages = []
    for run in sorted(runs, key=lambda run: (run.recipe, run.scale, str(run.root))):
        counts[run.recipe, run.scale] += 1
        slugs[run.slug] += 1
        numbered = replace(run, number=counts[run.recipe, run.scale], same_slug=slugs[run.slug])
        pages.append(page_of(numbered, limits, num_samples))
    return pages, broken


def overview(pages: Sequence[Page]) -> Table:
    """A row for each run: how far it came, and the paper's cells by status."""
    rows = []
    for page in pages:
        run, made = page.run, [step.record.get("made") or {} for step in page.run.steps]
        done = sum(step.done for step in run.steps)
        seconds = sum(step.record.get("seconds") or 0 for step in run.steps)
        last = max((str(one["at"])[:10] for one in made if one.get("at")), default="")
        rows.append([run.recipe, run.scale, f"{done} of {len(run.steps)}", f"{seconds:,.0f}", last,
                     *(str(page.counts[status]) for status in STATUSES)])  # fmt: skip
    return Table(["recipe", "scale", "steps done", "seconds", "made", *STATUSES], rows)


def write(pages: Sequence[Page], broken: Sequence[str], folder: Path, limits: Limits, command: str) -> None:
    """``index.html``, ``report.md``, a Markdown file for each run with its figures, ``report.json``."""
    written = f"Written {now()} by {command}"
    head = list(_head(pages, broken, limits))
    with atomic_write(folder / "index.html") as file:
        parts = [*head, *(part for page in pages for part in page.parts), Text(written, "quiet")]
        file.write(html.page(_TITLE, to_html(parts), HEAD))
    for page in pages:
        for picture in _pictures(page.parts):
            (folder / "figures").mkdir(exist_ok=True)
            with atomic_write(folder / "figures" / picture.name, "wb") as file, open(picture.path, "rb") as source:
                shutil.copyfileobj(source, file)
        with atomic_write(folder / f"{page.run.slug}.md") as file:
            file.write(to_markdown([*page.parts, Text(written)], "figures", raised=1))
    links = "\n".join(f"- [{plain_text(page.run.name)}]({page.run.slug}.md)" for page in pages)
    with atomic_write(folder / "report.md") as file:
        plain = [part for part in head if not isinstance(part, Items)]
        file.write(f"# {_TITLE}\n\n{to_markdown(plain, 'figures')}\n{links}\n\n{written}\n")
    write_json(folder / "report.json", {"written": written, "limits": asdict(limits), "broken": list(broken),
                                        "runs": [_facts(page) for page in pages]})  # fmt: skip


def _head(pages: Sequence[Page], broken: Sequence[str], limits: Limits) -> Iterable[Part]:
    from verl_dft.recipes.load import recipe_names

    yield Heading("Overview")
    yield Shown(overview(pages))
    for line in broken:
        yield Text(f"Incomplete: {line}.", "problem")
    for page in pages:
        if page.run.problems:
            more = f" (and {len(page.run.problems) - 1} more, below)" if len(page.run.problems) > 1 else ""
            yield Text(f"Incomplete: {page.run.name}: {page.run.problems[0]}{more}.", "problem")
    names = [page.run.name for page in pages]
    yield Items(names, dict(zip(names, (page.run.slug for page in pages), strict=True)))
    yield Text(
        f"Reproduced: at scale=paper, with the paper's model, benchmark, metric and settings, our value is within "
        f"{limits.points:g} points of the paper's (a fifth of it where that is less; other numbers within "
        f"{100 * limits.share:g}%), or within what sampling alone changes between two evaluations on the same problems "
        "where that is more. Off: it is not. "
        "Not run: this run has no such number; at other scales that is every cell, for their models and benchmarks are "
        "others. Intervals are 95%, over problems, or over seeds where there are several."
    )
    if missing := [name for name in recipe_names() if name not in {page.run.recipe for page in pages}]:
        yield Folded(f"{len(missing)} shipped recipes are not among these runs", [Items(missing)], html_only=True)


def _pictures(parts: Iterable[Part]) -> Iterable[Picture]:
    for part in parts:
        if isinstance(part, Picture):
            yield part
        elif isinstance(part, Folded):
            yield from _pictures(part.parts)


def _facts(page: Page) -> dict[str, Any]:
    """A run for other programs: cells, numbers, and the records of its steps, which say where they come from."""
    run = page.run
    cells = [asdict(cell) | {"ours": cell.ours and _number(cell.ours)} for cell in page.cells]
    numbers = [
        {"kind": kind, "model": model, "method": method, "seed": seed, "column": column, **_number(number)}
        for kind, arms in page.measured.items()
        for (model, method), seeds in arms.items()
        for seed, columns in seeds.items()
        for column, number in columns.items()
    ]
    steps = [{"name": step.name, "verb": step.verb, "arm": step.arm, "state": step.state, "seeds": step.seeds,
              "record": step.record} for step in run.steps]  # fmt: skip
    return {"recipe": run.recipe, "scale": run.scale, "folder": str(run.folder), "facts": run.facts,
            "problems": run.problems, "notes": run.notes, "counts": page.counts, "cells": cells, "numbers": numbers,
            "steps": steps}  # fmt: skip


def _number(number: Any) -> dict[str, Any]:
    """Without the shares of every problem, which are in the results themselves."""
    return {key: value for key, value in vars(number).items() if key != "shares"}
