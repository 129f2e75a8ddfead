"""The papers' recipes: every table and figure has one, and what a paper states is in what they compose."""

from functools import lru_cache

import pytest
import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from verl_dft.paths import recipes_dir
from verl_dft.recipes.load import load_recipe, recipe_names
from verl_dft.recipes.plan import plan
from verl_dft.recipes.settings import settings_of
from verl_dft.report.expected import load_expected, method_of

WANTED = {
    "dft": ["table1", "table2", "table3", "fig1", "fig2", "fig3"],
    "gft": ["fig1", "table1", "table2", "fig3", "table3", "fig5", "table4", "table5", "fig4", "fig6"],
    "data_rewriting": ["table1", "table2", "table3", "fig3", "table4", "fig4"],
}
NAMES = [f"{paper}/{item}" for paper, items in WANTED.items() for item in items]
BLOCKS = {"gft/table4": ["table4_pass128", "table4_pass256"]}
"""Blocks of expected.yaml that a recipe is for, where their name is another."""
WITHOUT_METHODS = ("data_rewriting/table1", "data_rewriting/table3", "data_rewriting/fig3")
"""Recipes whose rows are counts and log-probs of one step's statistics."""
PARITY = {"dft": ("train", "trainer.reduction", "micro_batch_sum"), "gft": ("gft", "objective.strict", True),
          "data_rewriting": ("train", "trainer.reduction", "micro_batch_sum")}  # fmt: skip
SAID = ("stated", "code", "ours")
KEPT = {"gft/table1": ("model=[qwen2.5-math-1.5b,llama-3.1-8b]",)}
"""Arms that stand for the others where composing all would take a minute."""


@lru_cache(maxsize=1)
def table():
    return yaml.safe_load((recipes_dir() / "hyper_parameters.yaml").read_text(encoding="utf-8"))


@lru_cache(maxsize=3)
def planned(name, *given):
    return plan(settings_of(load_recipe(name), given))


def rows():
    for name, items in table().items():
        for section, what, says, value, step, key, *rest in items:
            yield pytest.param(name, says, value, step, key, rest[0] if rest else {}, id=f"{name}-{section}-{what}")


def composed_values(name, step, key, arms):
    """The value of ``key`` in every planned command of ``step`` whose arms are among ``arms``."""
    for one in planned(name, "scale=paper", *KEPT.get(name, ())):
        if one.step != step or any(one.arm[variable][0] not in names for variable, names in arms.items()):
            continue
        if key == "benchmark.name":
            yield [config.benchmark.name for config in one.composed.configs]
        else:
            for config in one.composed.configs:
                found = real_value(one, config, key)
                yield (
                    OmegaConf.to_container(found, resolve=True) if isinstance(found, ListConfig | DictConfig) else found
                )


def real_value(one, config, key):
    """Of the composed configuration; a learning rate of the command, since arms that differ in it are composed once."""
    if key.endswith("optim.lr") and key in one.values:
        return one.values[key]
    found = OmegaConf.select(config, key, throw_on_missing=True)
    return OmegaConf.to_container(found, resolve=True) if isinstance(found, ListConfig | DictConfig) else found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "says", "value", "step", "key", "more"), list(rows()))
def test_a_hyper_parameter_is_in_the_composed_configuration(name, says, value, step, key, more):
    assert says in SAID and set(more) <= {"arms", "ours", "why"}
    assert ("ours" in more) == ("why" in more)
    found = list(composed_values(name, step, key, more.get("arms", {})))
    assert found, f"{name} has no step {step} with these arms"
    wanted = more.get("ours", value)
    assert all(one == wanted and type(one) is type(wanted) for one in found), found


def test_every_table_and_figure_has_a_recipe_and_expected_values():
    assert set(NAMES) <= set(recipe_names())
    for name in NAMES:
        paper, item = name.split("/")
        blocks = load_expected(recipes_dir() / paper).blocks
        assert set(BLOCKS.get(name, [item])) <= set(blocks)
    assert set(NAMES) == set(table()), "every recipe has hyper-parameters that are checked"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if load_recipe(name).options])
def test_parity_with_the_authors_composes_and_changes_what_they_do_otherwise(name):
    step, key, value = PARITY[name.split("/")[0]]
    found = {}
    for parity in ("paper", "authors"):
        steps = planned(name, "scale=paper", f"parity={parity}", *KEPT.get(name, ()))
        found[parity] = {real_value(one, one.composed.configs[0], key) for one in steps if one.step == step}
        if not found[parity]:  # recipes that train nothing: which rows are chosen
            found[parity] = {one.values["data.source.subset"] for one in steps if one.verb == "data make"}
    assert found["authors"] in ({value}, {"first_n"})
    assert not found["authors"] & found["paper"]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_lacks_and_that_it_was_not_run(name):
    text = (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8").split("\ntitle:")[0]
    text = " ".join(text.replace("\n#", " ").lower().split())
    assert "missing:" in text and "nothing of this has been run at scale=paper" in text
    assert '"sec." the paper states it' in text


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_METHODS])
def test_steps_are_found_in_the_papers_tables_by_the_names_of_their_arms(name):
    paper, item = name.split("/")
    steps = planned(name, "scale=paper", *KEPT.get(name, ()))
    arms = [(one.step, {variable: arm for variable, (arm, _) in one.arm.items()}) for one in steps]
    made = {method_of(step, names) for step, names in arms}
    for block in BLOCKS.get(name, [item]):
        values = load_expected(recipes_dir() / paper).block(block).values
        assert {method for rows in values.values() for method in rows} <= made
        models = load_recipe(name).keys.get("models")
        assert models is None or set(models) == set(values)


@pytest.mark.slow
def test_recipes_share_the_steps_that_they_have_in_common():
    """One training and one evaluation serve Table 1, Table 3 and two arms of Fig. 3."""

    def keys(name, *steps):
        made = {one.name: one.key for one in planned(name, "scale=paper")}
        return {made[step] for step in steps}

    assert len(keys("dft/table1", "train-qwen2.5-math-1.5b-dft") | keys("dft/table3", "train-dft")
               | keys("dft/fig3", "train-dft-lr_5e-5", "train-dft-batch_256")) == 1  # fmt: skip
    assert len(keys("dft/table1", "base-qwen2.5-math-1.5b") | keys("dft/table3", "base")) == 1
    assert len(keys("gft/table2", "gft-gft") | keys("gft/fig6", "gft-tau_0.7") | keys("gft/fig4", "gft-gft")) == 1
