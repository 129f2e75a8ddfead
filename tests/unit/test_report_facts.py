"""What a run says of itself: settings that the command line changed, seeds, the plan before the first step."""

import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

from verl_dft.provenance import commit, made_here, now, typed
from verl_dft.recipe import write_run
from verl_dft.recipes.load import load_recipe
from verl_dft.recipes.plan import plan
from verl_dft.recipes.record import changed, run_facts
from verl_dft.recipes.settings import settings_of
from verl_dft.report.runs import read_run

RECIPE = """
title: a test
keys: {sizes: {small: {rows: 8}}, seeds: [1, 2]}
steps:
  rows:
    verb: data make
    for: {size: "${sizes}", seed: "${seeds}"}
    with: {data.source.num_val: 0, data.source.num_rows: "${size.rows}", data.source.seed: "${seed}"}
options:
  parity: {default: paper, paper: {}, authors: {verbs: {data: {with: {data.source.num_val: 4}}}}}
"""


def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def test_what_the_command_line_changed(tmp_path: Path) -> None:
    path = str(recipe(tmp_path))

    def of(*overrides: str) -> dict:
        return changed(settings_of(load_recipe(path), overrides))

    assert of() == of("scale=tiny", "output_dir=x", "at_once=2", "parity=paper", "seed=1") == {}
    assert of("sizes.small.rows=16", "seeds=[3]") == {"sizes.small.rows": 16, "seeds": [3]}
    assert of("parity=authors") == {"parity": "authors"}
    assert of("verbs.data.data.source.num_rows=4", "steps.rows.config=other") == {
        "verbs.data.data.source.num_rows": 4,
        "steps.rows.config": "other",
    }


def test_a_run_is_described_before_its_first_step(tmp_path: Path) -> None:
    settings = settings_of(load_recipe(str(recipe(tmp_path))), [f"output_dir={tmp_path}/out", "seed=2"])
    steps = plan(settings)
    folder = write_run(settings, steps, {}, run_facts(settings))
    run = read_run(folder)
    assert [(step.name, step.state, step.seeds) for step in run.steps] == [
        ("rows-small-2", "not run yet", {"data.source.seed": 2})
    ]
    assert run.problems == ["rows-small-2: not run yet"] and run.notes == ["only seed=2"]
    assert run.facts["title"] == "a test" and run.facts["changed"] == {}
    (tmp_path / "mine.yaml").write_text(RECIPE + "# edited\n")
    assert "the recipe's file mine.yaml has changed since this run" in read_run(folder).notes


def test_a_comment_makes_no_other_version_and_a_key_does(tmp_path: Path) -> None:
    def of(text: str) -> str:
        (tmp_path / "mine.yaml").write_text(text)
        return run_facts(settings_of(load_recipe(str(tmp_path / "mine.yaml")), []))["recipe_hash"]

    assert of(RECIPE) == of(RECIPE + "# edited\n") == of(RECIPE + "scales: {paper: {keys: {seeds: [3]}}}\n")
    assert of(RECIPE) != of(RECIPE.replace("rows: 8", "rows: 9"))


def test_where_and_by_what_a_number_was_made() -> None:
    before = now()
    made = made_here("c0de")
    assert made["commit"] == "c0de" and before <= made["at"] <= now()
    assert made["versions"]["python"] == platform.python_version()
    assert re.fullmatch(r".+, [1-9]\d* logical cores(, .+)?", made["hardware"])
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        head = subprocess.run(
            ["git", "-C", root, "log", "-1", "--format=%H"], capture_output=True, text=True, check=True
        )
        assert str(commit()).removesuffix(" with changes") == head.stdout.strip()


def test_commands_are_shown_as_one_would_type_them() -> None:
    python = shlex.quote(sys.executable)
    assert typed(f"{python} -m verl_dft.cli train 'a=b c'") == "verl-dft train 'a=b c'"
    assert typed(f"{python} scripts/x.py") == "python scripts/x.py"
