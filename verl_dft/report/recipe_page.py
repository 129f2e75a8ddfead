"""The report on one run of a recipe, as parts: what the paper states, what the run gave, where each number is from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.files import sha256_file
from verl_dft.paths import recipes_dir
from verl_dft.provenance import typed
from verl_dft.report import tabulate
from verl_dft.report.beside import STATUSES, Cell, Limits, blocks_of, cells, expected_of, kinds_of
from verl_dft.report.differences import pairs
from verl_dft.report.expected import Block
from verl_dft.report.figures import figures, samples
from verl_dft.report.measured import KINDS, Measured, collect
from verl_dft.report.parts import Folded, Heading, Items, Part, Shown, Text, Verbatim
from verl_dft.report.runs import Run
from verl_dft.report.tables import Table

_SCALES = {
    "tiny": "Tiny world: another model (0.5M parameters) on another benchmark. Nothing here is comparable with the "
    "paper, whose cells are therefore not run; signs of differences are information, not evidence.",
    "laptop": "Laptop scale: another model, less data. Nothing here is comparable with the paper, whose cells are "
    "therefore not run; signs of differences are information, not evidence.",
}
_MEANING = (
    "Commit: of the checkout, with changes: where files differed from it. Code: hash of the package, configs "
    "and recipes. Seconds: of the step when it was made, whoever reuses it."
)
_READ = ("evaluate", "rewrite", "score", "train", "rl", "analyze")


@dataclass(frozen=True)
class Page:
    """A run with what was made of it."""

    run: Run
    measured: Measured
    counts: Mapping[str, int]
    parts: Sequence[Part]
    cells: Sequence[Cell]


def page_of(run: Run, limits: Limits, num_samples: int) -> Page:
    """The report on a run. What is wrong with it goes to ``run.problems``; nothing is raised for it."""
    measured = collect(run)
    blocks: list[Block] = []
    try:
        expected = expected_of(run)
        blocks = blocks_of(run, expected) if expected else []
    except InputError as error:
        run.problems.append(str(error))
    by_block = {block.name: cells(run, block, measured, limits) for block in blocks}
    every = [cell for found in by_block.values() for cell in found]
    counts = tabulate.count(every)
    body: list[Part] = []
    for block in blocks:
        body += _block(run, block, by_block[block.name], measured, limits)
    body += _ours(measured, blocks, run)
    drawn = figures(run)
    body += [Heading("Figures", 3), *drawn] if drawn else []
    body += samples(run, num_samples)
    body += [Folded("Where the numbers come from", list(_provenance(run)))]
    return Page(run, measured, counts, [*_head(run, blocks), *body], every)


def _head(run: Run, blocks: Sequence[Block]) -> Iterator[Part]:
    title = str(run.facts.get("title") or "")
    yield Heading(run.name + (f": {title}" if title else ""), 2, run.slug)
    if run.number > 1:
        yield Text(f"In {run.root}.", "quiet")
    if source := run.facts.get("source"):
        yield Text(f"Source: {source}.", "quiet")
    if run.scale in _SCALES and blocks:
        yield Text(_SCALES[run.scale])
    if not blocks:
        yield Text("No table or figure with numbers of a paper belongs to this recipe: what follows is ours alone.")
    for problem in run.problems:
        yield Text(f"Incomplete: {problem}.", "problem")
    if run.notes:
        yield Items(run.notes)


def _block(run: Run, block: Block, found: Sequence[Cell], measured: Measured, limits: Limits) -> Iterator[Part]:
    yield Heading(f"{block.name}: {block.metric}", 3)
    about = [f"Paper: {block.source}.", f"Unit: {block.unit}."]
    about += [f"Settings there: {block.settings}."] if block.settings else []
    about += [f"No number stated: {block.empty}."] if block.empty else []
    yield Text(" ".join(about), "quiet")
    with_ours = [cell for cell in found if cell.ours is not None]
    if with_ours:
        yield Shown(tabulate.compared(with_ours, block.unit))
    counts = tabulate.count(found)
    said = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    yield Folded(f"The paper's cells: {said}", [Shown(tabulate.papers_values(block, found))])
    at_paper = run.scale == "paper"
    differences = pairs(run, block, measured, limits)
    if differences:
        yield Text("Differences between methods" + ("" if at_paper else ", ours of the tiny world: direction alone"
                   if run.scale == "tiny" else ", ours of another model: direction alone") + ".")  # fmt: skip
        yield Shown(tabulate.differences(differences, at_paper))
    if block.statements:
        yield Shown(tabulate.statements(block))


def _ours(measured: Measured, blocks: Sequence[Block], run: Run) -> Iterator[Part]:
    """Every number of the run; of the kind that its table is of, with the paper's beside it."""
    kinds = [kind for kind in KINDS if measured[kind]]
    if kinds:
        yield Heading(
            "What this run gave" if run.scale != "tiny" else "What this run gave: tiny world, not comparable", 3
        )
    for kind in kinds:
        of_kind = next((block for block in blocks if _is_of(block, kind)), None)
        unit = tabulate.about(measured, kind)
        yield Text(f"{KINDS[kind]}{f' ({unit})' if unit else ''}, with the 95% interval over problems or seeds.")
        yield Shown(tabulate.ours(measured, kind, of_kind))
    if unread := [f"{step.name} ({step.verb})" for step in run.steps if step.verb.split()[0] not in _READ]:
        yield Text(f"No number is taken from {', '.join(unread)}.", "quiet")


def _is_of(block: Block, kind: str) -> bool:
    """Whether a block's values are of a kind of measurement."""
    return kind in kinds_of(block, block.columns[0])[:1]


# ---- provenance ----


def _provenance(run: Run) -> Iterator[Part]:
    done = [step for step in run.steps if step.record.get("status") == "done"]
    rows = []
    for step in run.steps:
        made: Mapping[str, Any] = step.record.get("made") or {}
        seeds = ", ".join(f"{key}={value}" for key, value in step.seeds.items())
        seconds = step.record.get("seconds")
        commit = str(made.get("commit") or "")
        rows.append([step.name, step.verb, step.state, f"{seconds:,.0f}" if seconds is not None else "",
                     str(made.get("at") or ""), f"{commit[:12]}{' with changes' if 'with' in commit else ''}",
                     str(step.record.get("code") or "")[:12], seeds])  # fmt: skip
    yield Shown(Table(["step", "verb", "state", "seconds", "made (UTC)", "commit", "code", "seeds"], rows))
    yield Text(_MEANING, "quiet")
    hardware = dict.fromkeys(str(step.record["made"]["hardware"]) for step in done if step.record.get("made"))
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in step.record["made"]["versions"].items())
        for step in done
        if step.record.get("made")
    )
    hashes = {"run.json": sha256_file(run.folder / "run.json")}
    hashes["the recipe's file"] = str(run.facts.get("recipe_sha256") or "not recorded")
    yield Items([*(f"hardware: {text}" for text in hardware), *(f"versions: {text}" for text in versions),
                 *(f"SHA-256 of {name}: {digest}" for name, digest in hashes.items())])  # fmt: skip
    yield Folded("Commands", [Verbatim("\n".join(f"# {step.name}\n{_command(run, step.record)}" for step in done))])
    yield Folded("Files, by SHA-256", [Verbatim("\n".join(_files(run)))])


def _command(run: Run, record: Mapping[str, Any]) -> str:
    command = typed(str(record.get("command", ""))).replace(f"{recipes_dir()}/", "recipes/")
    return command.replace(str(run.root), "OUTPUT_DIR")


def _files(run: Run) -> list[str]:
    found: dict[str, str] = {}
    for step in run.steps:
        for role in ("inputs", "outputs"):
            for path, digest in (step.record.get(role) or {}).items():
                inside = path.rpartition(f"/{step.folder.relative_to(run.root)}/")[2]
                name = run.relative(step.folder / inside) if role == "outputs" else _shown_input(run, path)
                found[name] = digest
    return [f"{digest}  {name}" for name, digest in sorted(found.items())]


def _shown_input(run: Run, path: str) -> str:
    inside = Path(path).is_relative_to(recipes_dir())
    return f"recipes/{Path(path).relative_to(recipes_dir())}" if inside else run.relative(path)
