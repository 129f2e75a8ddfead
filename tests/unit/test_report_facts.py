"""What a run says of itself: settings that the command line changed, seeds, the plan before the first step."""

from pathlib import Path

from verl_dft.provenance import commit, hardware, made_here, typed
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


def test_where_and_by_what_a_number_was_made() -> None:
    made = made_here()
    assert made["hardware"] == hardware() and "logical core" in hardware()
    assert made["commit"] == commit() and (commit() is None or len(commit().split()[0]) == 40)
    assert made["versions"]["verl_dft"] and made["at"].endswith("Z")
    assert typed("python x") == "python x"
