"""Write the generated parts of the documentation anew: what stands between `<!-- generated: … -->` and `<!-- end -->`.

    python scripts/make_docs.py            # or: make docs
    python scripts/make_docs.py --check    # exit code 1 where a document is not up to date

docs/objectives.md gets its table and its sections from the objectives' docstrings and the comments of
configs/objective/*.yaml; docs/extend.md shows the files of tests/plugin_package/; recipes/README.md gets its tables
from the recipes and recipes/results.json, which `verl-dft report … record=recipes/results.json` writes.
"""

import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from verl_dft.errors import InputError  # noqa: E402
from verl_dft.files import atomic_write  # noqa: E402
from verl_dft.objectives import Objective, get_objective, list_objectives, objective_target  # noqa: E402
from verl_dft.report import results  # noqa: E402
from verl_dft.report.tables import Table  # noqa: E402
from verl_dft.training.policy_options import ROLLOUT_IS_REFERENCE, missing_fields  # noqa: E402

DOCUMENTS = ("docs/objectives.md", "docs/extend.md", "recipes/README.md")
ORDER = ("sft", "dft", "iw_sft", "is_sft", "asft", "psft", "gft", "chord", "focal", "eaft", "luffy", "chord_mix")
WIDTH = 120

OFF: dict[str, dict[str, tuple[str, str]]] = {
    "sft": {},
    "dft": {
        "alpha": ("0", "SFT"),
        "floor": ("0", ""),
        "level": ("", ""),
        "length_normalized": ("false", ""),
        "exempt_tokens": ("[]", ""),
    },
    "iw_sft": {
        "level": ("", ""),
        "temperature": ("0", "SFT"),
        "clamp_min": ("0", ""),
        "clamp_max": ("inf", ""),
        "policy": ("current", ""),
        "ema_decay": ("0", ""),
    },
    "is_sft": {"behavior": ("one", "DFT"), "clip": ("null", "")},
    "asft": {"kl_weight": ("0", "DFT"), "kl": ("", ""), "weight": ("", "")},
    "psft": {"eps_low": ("1", ""), "eps_high": ("inf", ""), "use_advantage": ("false", "")},
    "gft": {
        "tau": ("0", ""),
        "strict": ("false", ""),
        "level": ("", ""),
        "length_normalized": ("false", ""),
        "no_dcr": ("false", ""),
        "no_gal": ("false", ""),
    },
    "chord": {"cutoff": ("1", "")},
    "focal": {"gamma": ("0", "SFT"), "stop_gradient": ("false", "")},
    "eaft": {"alpha": ("0", "SFT"), "scale": ("", "")},
    "chord_mix": {"phi": ("false", ""), "eps_low": ("1", ""), "eps_high": ("inf", "")},
    "luffy": {"gamma": ("null", ""), "eps_low": ("1", ""), "eps_high": ("inf", "")},
}
"""Objective -> option -> the value at which it does nothing, and the method that is left if that is another one.

An empty value: the option chooses between forms (or sets a unit) and has no such value."""

PAPERS = {"is_sft": "[Mind the Gap](https://arxiv.org/abs/2509.15157)"}
"""Where a docstring's reference has no link."""


class Option(NamedTuple):
    """One option of an objective as its YAML file has it."""

    name: str
    default: str
    comment: str


class Facts(NamedTuple):
    """What the documentation says of an objective, from its class and its YAML file."""

    name: str
    title: str
    body: list[str]
    """Paragraphs of the docstring; the last are the references."""
    remark: str
    """What the YAML file says below its first line, which repeats the title."""
    options: list[Option]
    paper: str
    equation: str
    variants: list[tuple[str, Objective]]
    """The objective as it is by default (named ""), and with each other value of an option (``kl=k3``)."""


@lru_cache
def facts(name: str) -> Facts:
    """Everything about one objective."""
    objective = get_objective(name)
    title, *body = inspect.cleandoc(type(objective).__doc__ or "").split("\n\n")
    source = (ROOT / "configs" / "objective" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    remark = " ".join(line.removeprefix("# ") for line in source[1:] if line.startswith("#"))
    options = yaml_options(source)
    paper, equation = reference(body)
    variants = [("", objective), *(v for option in options for v in variants_of(objective, option))]
    return Facts(name, title, body, remark, options, PAPERS.get(name, paper), equation, variants)


def yaml_options(lines: list[str]) -> list[Option]:
    """The options in a YAML file's lines. Raises ValueError for one without a comment."""
    options = []
    for line in lines:
        if line.startswith("#") or line.startswith("_target_"):
            continue
        match = re.fullmatch(r"(\w+): (.*?) +# (.+)", line)
        if not match:
            raise ValueError(f"an option needs a value and a comment: {line!r}")
        options.append(Option(*match.groups()))
    return options


def reference(body: list[str]) -> tuple[str, str]:
    """Link and equations of the first reference of a docstring."""
    (text,) = [" ".join(part.split()) for part in body if part.startswith("References:")]
    first = text.removeprefix("References:").split(";")[0]
    link = re.search(r"`([^`<]+?)\s*<(\S+)>`_", first)
    equation = re.search(r"Eqs?\. ([\d, and]*\d)", first)
    return (f"[{link[1]}]({link[2]})" if link else ""), (equation[1] if equation else "")


def variants_of(objective: Any, option: Option) -> list[tuple[str, Objective]]:
    """The objective with each other value of an option that its YAML comment explains."""
    default = yaml.safe_load(option.default)
    values: list[Any] = [not default] if isinstance(default, bool) else re.findall(r"(\w+) = ", option.comment)
    if isinstance(default, list):
        values = [["end_of_turn"]]
    found = []
    for value in values:
        value = yaml.safe_load(value) if isinstance(value, str) else value
        shown = "…" if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else value
        try:
            found.append((f"{option.name}={shown}", dataclasses.replace(objective, **{option.name: value})))
        except InputError:  # a value that needs another option too
            continue
    return [variant for variant in found if variant[1] != objective]


def fields(objective: Objective) -> str:
    """What it requires, as code."""
    return ", ".join(f"`{field}`" for field in sorted(objective.requires)) or "nothing"


def reads(about: Facts) -> str:
    """Fields beside ``logp`` and ``mask``, by default and where an option changes them."""
    default = fields(about.variants[0][1])
    changed: dict[str, list[str]] = {}
    for name, objective in about.variants[1:]:
        if fields(objective) != default:
            changed.setdefault(fields(objective), []).append(name)
    return "; ".join([default, *(f"`{'`, `'.join(names)}`: {needed}" for needed, names in changed.items())])


def online(about: Facts) -> str:
    """Whether verl's online trainer can run it."""
    name = about.name
    works = [not missing_fields(name, objective) for _, objective in about.variants]
    yes = "yes, the rollout policy as reference" if name in ROLLOUT_IS_REFERENCE else "yes"
    if not any(works):
        return "no"
    others = [variant for (variant, _), good in zip(about.variants[1:], works[1:], strict=True) if good != works[0]]
    if not others:
        return yes
    return f"{yes}; not with `{'`, `'.join(others)}`" if works[0] else f"with `{'`, `'.join(others)}`"


def cell(text: str) -> str:
    """Text for a table."""
    return " ".join(text.split()).replace("|", "\\|")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines)


def overview(_: str) -> str:
    """The table of all objectives."""
    rows = []
    for about in map(facts, ORDER):
        off = [f"`{o}={value}`" for o, (value, _) in OFF[about.name].items() if value]
        rows.append(
            [f"[`{about.name}`](#{about.name})", about.paper or "see below", about.equation or "–", reads(about),
             ", ".join(off) or "–", online(about)]
        )  # fmt: skip
    return table(
        ["objective", "paper", "equation", "reads beside `logp`", "what is off at which value", "online"], rows
    )


def section(name: str) -> str:
    """The section of one objective: docstring, options, where it runs."""
    about = facts(name)
    parts = [f"**{about.title}**", *map(paragraph, about.body)]
    references = parts.pop()
    if about.remark:
        parts.append(paragraph(about.remark))
    if about.options:
        rows = []
        for option in about.options:
            value, left = OFF[name][option.name]
            off = f"`{value}`{f' ({left})' if left else ''}" if value else "–"
            rows.append([f"`{option.name}`", f"`{option.default}`", off, option.comment])
        parts.append(table(["option", "default", "off", "values"], rows))
    else:
        parts.append("No options.")
    parts.append(f"**Needs beside `logp`:** {reads(about)}. **Online:** {online(about)}.")
    return "\n\n".join([*parts, references])


def paragraph(text: str) -> str:
    """One paragraph of a docstring as Markdown, at most 120 characters a line."""
    if text.startswith(".. math::"):
        return "```math\n" + inspect.cleandoc(text.removeprefix(".. math::")) + "\n```"
    pieces = re.split(r"\n(?=(?:Limits|Differs from [^:\n]*|References):)", text)
    return "\n\n".join(map(_prose, pieces))


def _prose(text: str) -> str:
    text = re.sub(r"^(Limits|Differs from [^:]*|References):", r"**\1:**", " ".join(text.split()))
    text = re.sub(r":math:`([^`]*)`", lambda m: f"$`{m[1]}`$", text)
    text = re.sub(r"``([^`]*)``", r"`\1`", text)
    text = re.sub(r"(?<![$`])`([^`<]+?)\s*<(\S+)>`_", r"[\1](\2)", text)
    # what must not be broken, and " - ", which would begin a list at the start of a line
    for pattern in (r"\$`.*?`\$", r"`[^`]*`", r"\[[^\]]*\]\(\S+\)", r" [-+*] "):
        text = re.sub(pattern, lambda m: m[0].replace(" ", "\u00a0"), text)
    lines = textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\u00a0", " ")


def file(path: str) -> str:
    """A file's content as a code block."""
    language = {".py": "python", ".toml": "toml", ".yaml": "yaml"}[Path(path).suffix]
    return f"```{language}\n{(ROOT / path).read_text(encoding='utf-8').rstrip()}\n```"


def recipe_part(kind: str) -> str:
    """A part of recipes/README.md: ``status`` or ``results``."""
    entries = results.read_results(ROOT / "recipes" / results.FILE)
    if kind == "status":
        lines = [f"- {line}" for line in results.machine_lines(entries)]
        return "\n".join([left_aligned(results.status_table(entries)), "", *lines])
    return left_aligned(results.results_table(entries)) if entries else "No run is recorded yet."


def left_aligned(found: Table) -> str:
    """A table of words."""
    return table(list(found.header), [list(row) for row in found.rows])


PARTS: dict[str, Callable[[str], str]] = {
    "table": overview, "objective": section, "file": file, "recipes": recipe_part,
}  # fmt: skip


def generate(text: str) -> str:
    """A document with its generated parts written anew."""

    def replace(match: re.Match[str]) -> str:
        kind, _, argument = match[1].partition(" ")
        return f"<!-- generated: {match[1]} -->\n{PARTS[kind](argument).strip()}\n<!-- end -->"

    return re.sub(r"<!-- generated: (\S+(?: \S+)?) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


def built_in() -> list[str]:
    """Names of this package's objectives."""
    return [name for name in list_objectives() if objective_target(name).startswith("verl_dft.objectives.")]


def main(argv: list[str]) -> int:
    """Write the documents, or with ``--check`` only compare them. Returns the exit code."""
    assert sorted(ORDER) == built_in(), "ORDER must have every objective"
    stale = []
    for document in DOCUMENTS:
        path = ROOT / document
        old = path.read_text(encoding="utf-8")
        new = generate(old)
        if new == old:
            continue
        stale.append(document)
        if "--check" not in argv:
            with atomic_write(path) as stream:
                stream.write(new)
    print("\n".join(f"{'not up to date' if '--check' in argv else 'written'}: {document}" for document in stale))
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
