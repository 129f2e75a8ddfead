"""Recipes that draw: outputs of all arms as one mapping, the verbs analyze and compare, mistakes in a line."""

import json
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from verl_dft.cli import main as cli
from verl_dft.errors import InputError
from verl_dft.recipes.load import load_recipe
from verl_dft.recipes.plan import Planned, plan
from verl_dft.recipes.settings import settings_of
from verl_dft.recipes.values import filled, literal

RECIPE = """
keys:
  seeds: [1, 2]
  methods: {sft: {objective: sft}, dft: {objective: dft}}
  sweep: {lr_1e-5: {lr: 1.0e-5}, lr_1e-4: {lr: 1.0e-4}, batch: {lr: 1.0e-4}}
steps:
  base: {verb: evaluate, with: {model: a/model, benchmark: math500}}
  train:
    verb: train
    for: {method: "${methods}", seed: "${seeds}"}
    with: {objective: "${method.objective}", model: a/model, trainer.seed: "${seed}"}
  swept:
    verb: train
    for: {setting: "${sweep}"}
    with: {model: a/model, optim.lr: "${setting.lr}"}
  evaluate:
    verb: evaluate
    for: {setting: "${sweep}"}
    with: {model: "${steps.swept.model}", benchmark: math500}
  curves:
    verb: analyze dynamics
    with: {runs: "${each.train.folder}", metrics: [loss, "eval/*/avg"], smooth: 4}
  one_seed:
    verb: analyze dynamics
    for: {seed: "${seeds}"}
    with:
      runs:
        best: ${steps.swept[setting=lr_1e-5].folder}
        "${each.train.folder}":
        "also (here)": ${steps.swept[setting=batch].folder}
  rates:
    verb: analyze sweep
    with: {runs: {DFT: "${all.evaluate[setting=lr_*].folder}"}, key: optim.lr, baseline: "${steps.base.folder}"}
  points:
    verb: analyze kl
    with: {runs: {DFT: "${each.evaluate[setting=lr_*].folder}"}}
  against:
    verb: compare
    args: ["${steps.base.folder}", "${steps.evaluate[setting=batch].folder}"]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "drawn.yaml"
    path.write_text(RECIPE)
    return path


def planned(path: Path, *overrides: str) -> dict[str, Planned]:
    return {step.name: step for step in plan(settings_of(load_recipe(str(path)), overrides))}


def test_the_outputs_of_all_arms_as_a_mapping(recipe: Path) -> None:
    steps = planned(recipe)
    folder = {name: str(step.folder) for name, step in steps.items()}
    assert steps["curves"].values["runs"] == {
        method: [folder[f"train-{method}-{seed}"] for seed in (1, 2)] for method in ("sft", "dft")
    }
    assert list(steps["one_seed-2"].values["runs"].items()) == [
        ("best", folder["swept-lr_1e-5"]), ("sft", folder["train-sft-2"]), ("dft", folder["train-dft-2"]),
        ("also (here)", folder["swept-batch"]),
    ]  # fmt: skip
    assert steps["rates"].values["runs"] == {"DFT": [folder["evaluate-lr_1e-5"], folder["evaluate-lr_1e-4"]]}
    assert steps["points"].values["runs"]["DFT"]["lr_1e-4"] == folder["evaluate-lr_1e-4"]
    assert steps["rates"].needs == ["evaluate-lr_1e-5", "evaluate-lr_1e-4", "base"]
    assert planned(recipe, "seeds=[3]")["curves"].values["runs"].keys() == {"sft", "dft"}


def test_arms_that_are_left_out_are_not_drawn(recipe: Path) -> None:
    steps = planned(recipe, "method=dft", "setting=[lr_1e-5,batch]")
    assert steps["curves"].values["runs"].keys() == {"dft"} and len(steps["rates"].values["runs"]["DFT"]) == 1
    assert steps["one_seed-1"].values["runs"].keys() == {"best", "dft", "also (here)"}
    recipe.write_text(RECIPE.replace("each.train.folder", "each.train[method=s*].folder"))
    alone = planned(recipe, "method=dft", "seeds=[1]")["one_seed-1"]
    assert alone.values["runs"].keys() == {"best", "also (here)"}
    assert "points" not in planned(recipe, "setting=batch", "steps.rates.runs=[x]", "steps.one_seed.runs=[x]")


def test_analyze_and_compare_are_commands_with_outputs(recipe: Path) -> None:
    steps = planned(recipe)
    curves, against = steps["curves"], steps["against"]
    assert curves.command[:2] == ("analyze", "dynamics") and curves.folder.parent.name == "analyze"
    assert curves.outputs["table"] == curves.folder / "dynamics.parquet"
    assert curves.composed.get("smooth") == 4 and "analysis" not in curves.values
    assert against.command[0] == "compare" and against.outputs["comparison"] == against.folder / "compare.json"
    assert curves.key != planned(recipe, "steps.curves.smooth=5")["curves"].key
    assert curves.key != planned(recipe, "steps.train.optim.lr=1e-6")["curves"].key


def test_a_mapping_is_written_for_hydra(tmp_path: Path) -> None:
    given = {"GFT (no mix)": "/a/b", "SFT+GRPO": ["x", "y z"], 16: "/c", "a=b, c:d": None}
    read = OverridesParser.create().parse_override(f"runs={literal(given)}").value()
    assert {getattr(key, "text", key): value for key, value in read.items()}.keys() == given.keys()
    assert read["SFT+GRPO"][0] == "x" and read[16] == "/c"


def test_a_key_without_a_value_stands_for_its_entries() -> None:
    given = {"a": 1, "${x}": None, "b": {"${x}": None}, "c": None}
    assert filled(given, lambda text: {"d": text}) == {"a": 1, "d": "x", "b": {"d": "x"}, "c": None}
    with pytest.raises(InputError, match=r"\$\{x\} stands as a key without a value, so it must be a mapping, not 3"):
        filled(given, lambda text: 3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("analyze dynamics", "analyze dynamic", "unknown verb 'analyze dynamic'.*analyze dynamics"),
        ("smooth: 4", "smooth: 0", "step curves: smooth=0"),
        ("smooth: 4", "smoth: 4", "step curves: .*no key 'smoth'"),
        ("key: optim.lr", "metric: accuracy", "metric=accuracy is not one of avg, pass@K"),
        ("[setting=lr_*]", "[seting=lr_*]", "evaluate has no loop over 'seting'.*setting"),
        ("[setting=lr_*]", "[setting=rate_*]", "no such arm.*lr_1e-5"),
        ("${each.evaluate[setting=lr_*].folder}", "${each.base.folder}", "no loop variable is left"),
        ("${each.train.folder}", "${each.train.fold}", "train has no output 'fold'"),
        ('"${steps.evaluate[setting=batch].folder}"]', '"x", "y"]', "compare takes two folders"),
    ],
)
def test_a_mistake_is_one_line(recipe: Path, old: str, new: str, message: str) -> None:
    assert old in RECIPE
    recipe.write_text(RECIPE.replace(old, new))
    with pytest.raises(InputError, match=message) as caught:
        planned(recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_recipe_draws(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "train/loss": 1 / step}) for step in range(1, 5)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    path = tmp_path / "draw.yaml"
    path.write_text(f"""
keys: {{runs: {{A (old): "{tmp_path}/a", B: "{tmp_path}/b"}}}}
steps: {{curves: {{verb: analyze dynamics, with: {{runs: "${{runs}}", metrics: [loss]}}}}}}
""")
    assert cli(["recipe", "run", str(path), f"output_dir={tmp_path}/out"]) == 0
    folder = tmp_path / "out" / "by_name" / "draw" / "tiny" / "curves"
    assert (folder / "dynamics_loss.png").is_file() and "A (old)" in (folder / "dynamics.md").read_text()
