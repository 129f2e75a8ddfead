"""``recipes/results.json``: which recipes ran where and what they gave, small enough to commit; and the tables of it.

``recipes/README.md`` is made of this file and the recipes alone (``make docs``), so it says of no recipe that it ran
which is not here.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.files import sha256_file, write_json
from verl_dft.recipes.load import SCALES, Recipe, load_recipe, recipe_names
from verl_dft.recipes.record import recipe_hash
from verl_dft.report.measured import KINDS, Measured
from verl_dft.report.numbers import columns_of, number_of
from verl_dft.report.recipe_page import Page
from verl_dft.report.tables import Table

FILE = "results.json"
_FIELDS = (
    "recipe",
    "finished",
    "commit",
    "hardware",
    "steps",
    "seconds",
    "by_verb",
    "changed",
    "statuses",
    "results",
    "sha256",
)
_KINDS = ("evaluation", "pass@128", "pass@256", "logp", "kl", "scored", "stages")
"""The first that a run has stands in the table."""
Entries = dict[str, dict[str, dict[str, Any]]]
"""Recipe -> scale -> what its run gave."""


def entry_of(page: Page) -> dict[str, Any]:
    """What is kept of a finished run. Raises InputError for one that is incomplete or was made before this was kept."""
    run = page.run
    if run.problems:
        raise InputError(f"{run.name} is not recorded: {run.problems[0]}")
    made = [step.record.get("made") or {} for step in run.steps]
    if not all(one.get("at") for one in made):
        raise InputError(f"{run.name} is not recorded: its steps do not say when they were made; run it anew")
    by_verb: dict[str, dict[str, float]] = {}
    for step in run.steps:
        found = by_verb.setdefault(step.verb, {"steps": 0, "seconds": 0.0})
        found["steps"] += 1
        found["seconds"] = round(found["seconds"] + step.record["seconds"], 1)
    return {
        "recipe": str(run.facts.get("recipe_hash") or "an earlier version"),  # as it was run, whatever it is now
        "finished": max(one["at"] for one in made),
        "commit": list(dict.fromkeys(one.get("commit") for one in made)),
        "hardware": list(dict.fromkeys(one.get("hardware") for one in made)),
        "steps": len(run.steps),
        "seconds": round(sum(step.record["seconds"] for step in run.steps), 1),
        "by_verb": by_verb,
        "changed": {**(run.facts.get("changed") or {}), **(run.facts.get("keep") or {})},
        "statuses": {status: count for status, count in page.counts.items() if count},
        "results": _results(page.measured),
        "sha256": _digest(page),
    }


def record(path: Path, pages: Sequence[Page]) -> list[str]:
    """Put finished runs of shipped recipes into ``path`` in place of what it has of them. Returns what was left out."""
    entries, left = read_results(path), []
    shipped = set(recipe_names())
    for page in pages:
        try:
            if page.run.recipe not in shipped:
                raise InputError(f"{page.run.name} is not recorded: it is not one of the shipped recipes")
            entries.setdefault(page.run.recipe, {})[page.run.scale] = entry_of(page)
        except InputError as error:
            left.append(str(error))
    ordered = {
        name: {scale: entries[name][scale] for scale in SCALES if scale in entries[name]} for name in sorted(entries)
    }
    write_json(path, ordered)
    return left


def read_results(path: Path) -> Entries:
    """The file, empty where it does not exist. Raises InputError for one that is not of this form."""
    if not path.exists():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        for name, scales in raw.items():
            for scale, entry in scales.items():
                if scale not in SCALES or set(entry) != set(_FIELDS):
                    raise ValueError(f"{name} at scale={scale} is not an entry")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is not written by verl-dft report record=… ({error})") from None
    return raw


# ---- recipes/README.md ----


def status_table(entries: Entries) -> Table:
    """All shipped recipes: title, source, and for each scale when and how long it ran, or that it did not."""
    machines = _machines(entries)
    rows = []
    for recipe in map(load_recipe, recipe_names()):
        ran = [_ran(recipe, scale, entries.get(recipe.name, {}).get(scale), machines) for scale in SCALES]
        rows.append([f"[`{recipe.name}`]({recipe.name}.yaml)", recipe.title, _source(recipe), *ran])
    return Table(["recipe", "what it makes", "of", *SCALES], rows)


def machine_lines(entries: Entries) -> list[str]:
    """What the letters of :func:`status_table` stand for."""
    return [f"({letter}) {hardware}" for hardware, letter in _machines(entries).items()]


def results_table(entries: Entries) -> Table:
    """What each recorded run gave, a line each: of its first kind of measurement, averages where it has them."""
    rows = []
    for name in recipe_names():
        for scale, entry in entries.get(name, {}).items():
            shown = [one for one in entry["results"] if _main(one, entry["results"])]
            several = len({one["column"] for one in shown}) > 1
            about = dict.fromkeys(", ".join(filter(None, (one["metric"], one["unit"]))) for one in shown)
            if not several and shown:
                about = {f"{shown[0]['column']}: {text}": None for text in about}
            found = "; ".join(_value(one, several) for one in shown) or "nothing measured"
            commits = ", ".join(str(commit)[:12] + ("*" if "with" in str(commit) else "") for commit in entry["commit"])
            rows.append([f"`{name}`", scale, " / ".join(about), found, commits])
    return Table(["recipe", "scale", "what", "ours (95% interval)", "commit"], rows)


def _results(measured: Measured) -> list[dict[str, Any]]:
    kinds = [kind for kind in _KINDS if measured[kind]] or [kind for kind in KINDS if measured[kind]]
    found = []
    for kind in kinds:
        whole = columns_of(measured[kind])
        for (model, method), seeds in measured[kind].items():
            columns = list(dict.fromkeys(column for one in seeds.values() for column in one))
            for column in [*columns, "avg"] if kind == "evaluation" and len(whole) > 1 else columns:
                number = number_of(seeds, column, whole)
                if number is not None:
                    ends = None if number.low is None or number.high is None else [number.low, number.high]
                    interval = ends and [round(end, 4) for end in ends]
                    found.append({"kind": kind, "model": model, "method": method, "column": column,
                                  "metric": number.metric, "unit": number.unit, "value": round(number.value, 4),
                                  "interval": interval, "over": number.over})  # fmt: skip
    return found


def _digest(page: Page) -> str:
    """One hash over run.json and the files that the numbers were read from."""
    run = page.run
    digests = [sha256_file(run.folder / "run.json")]
    digests += sorted(digest for step in run.steps for digest in (step.record.get("outputs") or {}).values())
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _main(one: Mapping[str, Any], every: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a result stands in the table: of the run's first kind, the average where there is one."""
    mine = [other for other in every if other["kind"] == every[0]["kind"]]
    averages = any(other["column"] == "avg" for other in mine)
    return one["kind"] == every[0]["kind"] and (one["column"] == "avg" or not averages)


def _value(one: Mapping[str, Any], with_column: bool) -> str:
    digits = {"%": 1, "problems": 0, "nats per response": 1}.get(one["unit"], 4)
    ends = f" ({one['interval'][0]:.{digits}f} to {one['interval'][1]:.{digits}f})" if one["interval"] else ""
    over = f", {one['over']}" if "seeds" in one["over"] else ""
    return f"{one['method']}{' ' + one['column'] if with_column else ''} {one['value']:.{digits}f}{ends}{over}"


def _ran(recipe: Recipe, scale: str, entry: Mapping[str, Any] | None, machines: Mapping[str, str]) -> str:
    if entry is None:
        return "not run"
    where = ", ".join(machines[hardware] for hardware in entry["hardware"])
    changed = (
        f"; with {', '.join(f'{key}={value}' for key, value in entry['changed'].items())}" if entry["changed"] else ""
    )
    old = "" if entry["recipe"] == recipe_hash(recipe, scale) else "; of an earlier version of the recipe"
    steps = f"{entry['steps']} step{'s' if entry['steps'] > 1 else ''}"
    return f"ran in {entry['seconds']:,.0f} s, {steps}, {entry['finished'][:10]} ({where}){changed}{old}"


def _machines(entries: Entries) -> dict[str, str]:
    found = dict.fromkeys(hardware for scales in entries.values() for entry in scales.values()
                          for hardware in entry["hardware"])  # fmt: skip
    return {str(hardware): chr(ord("a") + number) for number, hardware in enumerate(found)}


def _source(recipe: Recipe) -> str:
    return recipe.source.rpartition("), ")[2] if "), " in recipe.source else recipe.source
