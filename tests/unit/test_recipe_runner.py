"""Recipes: all compose at every scale; references, loops, scales, options; keys and reuse; mistakes in a line."""

import json
import shlex
from pathlib import Path

import pytest

from verl_dft.cli import main as cli
from verl_dft.errors import InputError
from verl_dft.recipes.estimate import BENCHMARK_SIZES, estimates
from verl_dft.recipes.load import SCALES, load_recipe, recipe_names, shared_scales
from verl_dft.recipes.plan import Planned, plan
from verl_dft.recipes.settings import settings_of
from verl_dft.recipes.show import cluster_lines, commands, listing, page
from verl_dft.recipes.values import filled, literal, override

RECIPE = """
title: a test
keys:
  model: org/model-1.5B
  seeds: [1, 2]
  methods:
    sft: {objective: sft}
    asft: {objective: asft, with: {objective.kl_weight: 0.05}}
steps:
  problems:
    verb: data make
    with: {data: gsm8k, data.source.num_rows: 1000}
  base:
    verb: evaluate
    with: {model: "${model}", benchmark: math500}
  train:
    verb: train
    for: {method: "${methods}", seed: "${seeds}"}
    with:
      - {objective: "${method.objective}", model: "${model}", trainer.seed: "${seed}"}
      - {data.train_files: "${steps.problems.train}"}
      - ${method.with?}
  evaluate:
    verb: evaluate
    for: {method: "${methods}", seed: "${seeds}"}
    with: {model: "${steps.train.model}", benchmark: math500}
  together:
    verb: evaluate
    for: {method: "${methods}"}
    with: {model: "${all.train.model}", benchmark: math500}
scales:
  tiny: {keys: {seeds: [1]}}
  paper: {steps: {train: {with: {trainer.n_gpus_per_node: 8}}}}
options:
  parity:
    default: paper
    paper: {}
    authors: {verbs: {train: {with: {trainer.reduction: sequence_sum}}}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def planned(path: Path | str, *overrides: str) -> dict[str, Planned]:
    return {step.name: step for step in plan(settings_of(load_recipe(str(path)), overrides))}


# ---- the shipped recipes ----


def test_there_are_recipes() -> None:
    names = recipe_names()
    assert {"gft/sft_gft_grpo", "gft/sft_grpo", "gft/gft_grpo"} <= set(names)
    assert [line.split()[0] for line in listing().splitlines()] == names
    assert set(shared_scales()) == set(SCALES)


QUICK = ("data_rewriting/table2",)
"""Recipes that are composed at the tiny scale in every run of the tests; all, at every scale, among the slow ones."""
COMPOSED = [
    pytest.param(name, scale, marks=() if name in QUICK and scale == "tiny" else pytest.mark.slow)
    for name in recipe_names()
    for scale in (SCALES if name != "study/claims" else ("tiny",))  # it trains the tiny world's base anew
]


@pytest.mark.parametrize(("name", "scale"), COMPOSED)
def test_recipe_composes_and_dry_runs(name: str, scale: str) -> None:
    """Each step through its verb's own checks; the dry run has a command for each, which a shell would take apart."""
    settings = settings_of(load_recipe(name), [f"scale={scale}"])
    steps = plan(settings)
    text = commands(settings, steps, estimates(steps, settings.estimate))
    typed = [shlex.split(line) for line in text.splitlines() if line.startswith("verl-dft ")]
    assert [line[1:] for line in typed] == [list(step.command) for step in steps]
    assert all(step.name in page(settings, steps) for step in steps)
    assert ("GPU-hours" in text) == (scale == "paper")
    for config in (config for step in steps if step.verb == "evaluate" for config in step.composed.configs):
        assert config.benchmark.name in BENCHMARK_SIZES


# ---- references and loops ----


def test_loops_references_and_order(recipe: Path) -> None:
    steps = planned(recipe, "scale=paper")
    assert list(steps) == [
        "problems", "base", "train-sft-1", "train-sft-2", "train-asft-1", "train-asft-2", "evaluate-sft-1",
        "evaluate-sft-2", "evaluate-asft-1", "evaluate-asft-2", "together-sft", "together-asft",
    ]  # fmt: skip
    train = steps["train-asft-2"]
    assert train.values == {
        "objective": "asft", "model": "org/model-1.5B", "trainer.seed": 2, "objective.kl_weight": 0.05,
        "data.train_files": str(steps["problems"].folder / "train.parquet"), "trainer.n_gpus_per_node": 8,
    }  # fmt: skip
    assert train.needs == ["problems"] and "objective.kl_weight" not in steps["train-sft-1"].values
    assert steps["evaluate-asft-2"].values["model"] == str(train.folder / "model")
    both = [str(steps[f"train-sft-{seed}"].folder / "model") for seed in (1, 2)]
    assert steps["together-sft"].values["model"] == both
    assert len(steps["together-sft"].outputs["results"]) == 2
    assert len({step.folder for step in steps.values()}) == len(steps)


@pytest.mark.slow
def test_scale_options_and_command_line(recipe: Path) -> None:
    assert "trainer.n_gpus_per_node" not in planned(recipe)["train-sft-1"].values
    assert "train-sft-2" not in planned(recipe) and "train-sft-3" in planned(recipe, "seeds=[3]")
    assert planned(recipe, "parity=authors")["train-sft-1"].values["trainer.reduction"] == "sequence_sum"
    assert planned(recipe)["train-sft-1"].values["model"].endswith("recipes/tiny/base")
    assert planned(recipe, "model=a/b")["train-sft-1"].values["model"] == "a/b"
    steps = planned(recipe, "method=sft", "methods.sft.objective=dft", "steps.train.optim.lr=1e-5")
    assert list(steps) == ["problems", "base", "train-sft-1", "evaluate-sft-1", "together-sft"]
    assert steps["train-sft-1"].values["objective"] == "dft" and steps["train-sft-1"].values["optim.lr"] == 1e-5
    assert planned(recipe, "verbs.evaluate.n=2")["base"].values["n"] == 2


def test_the_weaker_of_two_changes_yields(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("objective: asft, with", "objective: asft, seed: 7, with"))
    assert (
        planned(recipe, "verbs.train.optim.lr=1e-5", "steps.train.optim.lr=2e-5")["train-sft-1"].values["optim.lr"]
        == 2e-5
    )
    assert planned(recipe, "method=asft", "methods.asft.seed=9")["train-asft-1"].values["trainer.seed"] == 1


def test_what_is_dropped_is_not_needed(recipe: Path) -> None:
    change = "  tiny: {keys: {seeds: [1]}, steps: {train: {drop: [data.train_files], with: {data: arithmetic}}}}"
    recipe.write_text(RECIPE.replace("  tiny: {keys: {seeds: [1]}}", change))
    steps = planned(recipe, "scale=tiny")
    assert steps["train-sft-1"].needs == [] and not steps["problems"].used


def test_a_field_may_name_a_step(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("objective: asft, with: {", 'objective: asft, with: {reference.path: "${steps.train[method=sft].model}", '))  # fmt: skip  # noqa: E501
    steps = planned(recipe)
    assert steps["train-asft-1"].values["reference.path"] == str(steps["train-sft-1"].folder / "model")
    assert "train-sft-1" in steps["train-asft-1"].needs


def test_dpo_is_not_given_what_is_for_other_trainings(tmp_path: Path) -> None:
    path = tmp_path / "dpo.yaml"
    path.write_text("steps: {dpo: {verb: train, with: {objective: dpo, model: a/b, data: pairs.parquet}}}")
    step = planned(path)["dpo"]
    assert "--config-name" not in step.command and step.composed.get("objective.name") == "dpo"


# ---- keys ----


def test_a_key_is_of_the_configuration_and_of_all_before_it(recipe: Path, tmp_path: Path) -> None:
    base = planned(recipe)
    other_root = planned(recipe, f"output_dir={tmp_path}/elsewhere")
    assert [step.key for step in base.values()] == [step.key for step in other_root.values()]
    changed = planned(recipe, "steps.problems.data.source.seed=2")
    same = {name for name in base if base[name].key == changed[name].key}
    assert same == {"base"}
    changed = planned(recipe, "steps.train.optim.lr=3e-5")
    assert {name for name in base if base[name].key == changed[name].key} == {"problems", "base"}


def test_equal_steps_of_two_recipes_share_a_folder() -> None:
    first, second = planned("gft/sft_grpo"), planned("gft/sft_gft_grpo")
    for name in ("data", "few", "sft", "evaluate-base", "evaluate-sft"):
        assert first[name].folder == second[name].folder, name
    assert first["grpo"].folder != second["grpo"].folder


# ---- a run ----


def make_rows(tmp_path: Path, rows: int = 8) -> Path:
    path = tmp_path / "rows.yaml"
    path.write_text(f"""
keys: {{sizes: [{rows}, {rows + 8}]}}
steps:
  rows:
    verb: data make
    for: {{size: "${{sizes}}"}}
    with: {{data.source.num_val: 0}}
scales: {{tiny: {{steps: {{rows: {{with: {{data.source.num_rows: "${{size}}"}}}}}}}}}}
""")
    return path


def test_a_run_reuses_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, root = make_rows(tmp_path), tmp_path / "out"
    command = ["recipe", "run", str(path), f"output_dir={root}"]
    assert cli(command) == 0
    assert "rows-8" in capsys.readouterr().out
    facts = json.loads((root / "by_name" / "rows" / "tiny" / "run.json").read_text())
    assert [(step["name"], step["arm"], step["reused"]) for step in facts["steps"]] == [
        ("rows-8", {"size": "8"}, False),
        ("rows-16", {"size": "16"}, False),
    ]
    assert (root / "by_name" / "rows" / "tiny" / "rows-8" / "train.parquet").is_file()
    assert cli([*command, "sizes=[8,24]", "redo=rows-8"]) == 0
    facts = json.loads((root / "by_name" / "rows" / "tiny" / "run.json").read_text())
    assert [(step["name"], step["reused"]) for step in facts["steps"]] == [("rows-8", False), ("rows-24", False)]
    assert cli(command) == 0
    out = capsys.readouterr().out
    assert out.count("reused") == 2 and "started" not in out.split("done in")[-1]


@pytest.mark.slow
def test_a_scale_for_gpus_is_not_run_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["recipe", "run", "gft/sft_grpo", "scale=paper"]) == 2
    assert "--dry-run" in capsys.readouterr().err


# ---- what is shown ----


@pytest.mark.slow
def test_lines_for_a_cluster(recipe: Path) -> None:
    step = planned(recipe, "scale=paper")["train-sft-1"]
    (line,) = cluster_lines(step)
    assert line.startswith("torchrun --standalone --nproc-per-node=8 -m verl_dft.training.sft objective=sft")
    step = planned(recipe, "scale=paper", "verbs.train.trainer.nnodes=2")["train-sft-1"]
    assert [line.split()[0] for line in cluster_lines(step)] == ["torchrun", "scripts/slurm_torchrun.sh"]
    assert "--nnodes=2" in cluster_lines(step)[0]
    steps = planned("gft/sft_grpo", "scale=paper", "verbs.rl.trainer.nnodes=2")
    lines = cluster_lines(steps["grpo"])
    assert "ray start --head" in lines[0] and lines[-1].startswith("scripts/slurm_ray.sh verl-dft rl algorithm=grpo")


def test_estimates(recipe: Path) -> None:
    settings = settings_of(load_recipe(str(recipe)), ["scale=paper", "seeds=[1]", "estimate.mfu_training=0.5"])
    costs = estimates(plan(settings), settings.estimate)
    train = costs["train-sft-1"]  # 1000 rows, batches of 256: 3 steps, 650 tokens a row
    assert (train.steps, train.trained_tokens) == (3, 3 * 256 * 650)
    assert train.gpu_hours == pytest.approx(6 * 1.5e9 * train.trained_tokens / (989e12 * 3600 * 0.5))
    assert costs["train-asft-1"].gpu_hours == pytest.approx(train.gpu_hours * 8 / 6)
    assert costs["evaluate-sft-1"].sampled_tokens == 500 * 16 * 500
    assert costs["evaluate-sft-1"].gpu_hours == pytest.approx(2 * 1.5e9 * 4e6 / (989e12 * 3600 * 0.1))


def test_values_as_overrides() -> None:
    assert [literal(value) for value in (None, True, 1e-6, 3, "a/b", [1, "x"], {"a": None})] == [
        "null", "true", "1e-06", "3", "a/b", "[1,x]", "{a:null}",
    ]  # fmt: skip
    assert literal("two words") == "'two words'" and literal("null") == "'null'" and literal("it's") == r"'it\'s'"
    assert override("model", "a b/c") == "model=a b/c" and override("~data", None) == "~data"
    assert filled({"a": "${x}", "b": ["${x}-1"]}, lambda text: [text]) == {"a": ["x"], "b": ["['x']-1"]}


# ---- mistakes ----

WRONG = [
    ("verb: train", "verbs: train", "steps.train: unknown key 'verbs'.*did you mean verb"),
    ("verb: train", "verb: trian", "step train-sft-1: unknown verb 'trian'.*train"),
    ("objective: sft}", "objective: sfft}", "train-sft-1: .*objective"),
    ("trainer.seed:", "trainer.sed:", "train-sft-1: config 'tiny/post' has no key 'trainer.sed'.*trainer.seed"),
    ("${steps.problems.train}", "${steps.problem.train}", "there is no such step.*problems"),
    ("${steps.problems.train}", "${steps.problems.rows}", "data make has no output 'rows'"),
    ("${steps.problems.train}", "${problems.train}", "names nothing"),
    ("model: ${steps.train.model}", "model: ${steps.train.model}", None),
    ("${method.with?}", "${method.with}", "has no field 'with'"),
    ("for: {method: \"${methods}\", seed", "for: {method: \"${method}\", seed", "names nothing"),
    ("title: a test", "titel: a test", "unknown key 'titel'.*title"),
    ("scales:\n  tiny:", "scales:\n  small:", "unknown key 'small'"),
    ("{keys: {seeds: [1]}}", "{keys: {seed: [1]}}", "unknown key 'seed'.*seeds"),
    ("default: paper", "default: papers", "options.parity.default"),
    ("  problems:\n", "  base:\n    verb: sample\n  problems:\n", "given twice"),
    ("keys:\n", "keys: [\n", "not valid YAML"),
    ("{model: \"${all.train.model}\"", "{model: \"${steps.train.model}\"", None),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), [case for case in WRONG if case[2]], ids=lambda text: None)
def test_a_mistake_in_a_recipe_is_one_line(recipe: Path, old: str, new: str, message: str) -> None:
    assert old in RECIPE
    recipe.write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(InputError, match=message) as caught:
        planned(recipe)
    assert "\n" not in str(caught.value) and "mine" in str(caught.value)


def test_a_reference_to_several_arms_is_refused(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("${all.train.model}", "${steps.train.model}"))
    with pytest.raises(InputError, match="must be one step, it is train-sft-1, train-sft-2"):
        planned(recipe, "seeds=[1,2]")


def test_steps_that_need_each_other_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "circle.yaml"
    path.write_text('steps: {a: {verb: train, with: {model: "${steps.b.model}"}}, b: {verb: train, with: {model: "${steps.a.model}"}}}')  # fmt: skip  # noqa: E501
    with pytest.raises(InputError, match="needs itself"):
        planned(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scale=huge"], "scale=huge is not one of tiny, laptop, paper"),
        (["modell=x"], "no key 'modell'.*model"),
        (["method=dft"], "method=dft: no such arm"),
        (["parity=ours"], "parity=ours is not one of paper, authors"),
        (["steps.trian.optim.lr=1"], "one of problems, base, train"),
        (["steps.train.optim.lrr=1"], "has no key 'optim.lrr'.*optim.lr"),
        (["estimate.mfu=1"], "unknown key 'estimate.mfu'"),
        (["at_once=0"], "at_once=0"),
        (["--dry"], "not KEY=VALUE"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(recipe: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        planned(recipe, *overrides)
    assert "\n" not in str(caught.value)


def test_unknown_recipe_and_action(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["recipe", "show", "gft/sft_grppo"]) == 2
    assert "did you mean gft/sft_grpo" in capsys.readouterr().err
    assert cli(["recipe", "show", "tiny/post"]) == 2
    assert "has no steps" in capsys.readouterr().err
    assert cli(["recipe", "make"]) == 2 and cli(["recipe", "run"]) == 2
