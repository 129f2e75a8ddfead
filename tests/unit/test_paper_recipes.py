"""The papers' recipes: every table and figure has one, and what a paper states is in what they compose."""

import copy
import importlib.util
import shlex
from functools import lru_cache

import pytest
import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from verl_dft.errors import InputError
from verl_dft.paths import recipes_dir
from verl_dft.recipes.load import load_recipe, recipe_names
from verl_dft.recipes.plan import plan
from verl_dft.recipes.settings import settings_of
from verl_dft.recipes.show import cluster_lines
from verl_dft.report.expected import load_expected, method_of

WANTED = {
    "dft": ["table1", "table2", "table3", "fig1", "fig2", "fig3"],
    "gft": ["fig1", "table1", "table2", "fig3", "table3", "fig5", "table4", "table5", "fig4", "fig6"],
    "data_rewriting": ["table1", "table2", "table3", "fig3", "table4", "fig4"],
}
NAMES = [f"{paper}/{item}" for paper, items in WANTED.items() for item in items]
PIPELINES = ["gft/sft_grpo", "gft/gft_grpo", "gft/sft_gft_grpo"]
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


# ---- verl and its launchers accept them ----


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES + NAMES)
def test_verl_accepts_every_training_at_paper_scale(name):
    """Its own dataclasses are built as its trainers build them, its validators pass, its launchers' commands parse."""
    checked = set()
    for one in planned(name, "scale=paper", *KEPT.get(name, ())):
        for line in cluster_lines(one):
            parse_torchrun(line, one)
        if one.verb not in ("train", "dpo", "rl", "score"):
            continue
        if id(one.composed) not in checked:  # arms that differ in a learning rate are composed once
            checked.add(id(one.composed))
            config = copy.deepcopy(one.composed.configs[0])
            config.model.path = str(recipes_dir() / "tiny" / "base")  # the model's own files are not here
            if one.composed.get("objective.name") == "dpo":
                trl_accepts(config)
            else:
                (verl_accepts_rl if one.verb == "rl" else verl_accepts_training)(config)


def parse_torchrun(line, step):
    """The printed line through torchrun's own parser: 8 ranks of the module with the step's arguments."""
    from torch.distributed.run import config_from_args, parse_args

    words = shlex.split(line)
    assert words[0] == "torchrun"
    found = parse_args(words[1:])
    assert found.module and found.training_script.startswith("verl_dft.training.")
    assert found.training_script_args == list(step.command[1:])
    config, _, _ = config_from_args(found)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (1, 1, 8)
    assert importlib.util.find_spec(found.training_script) is not None


def verl_accepts_training(config):
    from verl.trainer.sft_trainer import SFTTrainer
    from verl.workers.engine_workers import TrainingWorkerConfig

    from verl_dft.training.launch import torchrun_options

    trainer = SFTTrainer.__new__(SFTTrainer)
    trainer.config = config
    trainer._build_config()
    made = TrainingWorkerConfig(
        "language_model", model_config=trainer.model_config, engine_config=trainer.engine_config,
        optimizer_config=trainer.optimizer_config, checkpoint_config=trainer.checkpoint_config,
        profiler_config=trainer.profiler_config,
    )  # fmt: skip
    assert made.engine_config.strategy == config.engine.strategy and made.optimizer_config.lr == config.optim.lr
    assert torchrun_options(config) == ["--standalone", "--nproc-per-node=8"]


def trl_accepts(config):
    """One GPU's part, all but the device: several ranks or a GPU would have to be there."""
    from verl_dft.training.preference_trainer import dpo_arguments

    ranks = config.trainer.n_gpus_per_node
    assert ranks == 8 and config.data.train_batch_size % ranks == 0
    config.data.train_batch_size //= ranks
    config.trainer.update(device="cpu", n_gpus_per_node=1)
    made = dpo_arguments(config, num_steps=100)
    assert made.per_device_train_batch_size * made.gradient_accumulation_steps == config.data.train_batch_size
    assert (made.learning_rate, made.beta, made.max_steps) == (config.optim.lr, config.objective.beta, 100)


def verl_accepts_rl(config):
    from verl.trainer.ppo.utils import need_critic
    from verl.utils.config import omega_conf_to_dataclass

    from verl_dft.training.online.configure import validate_rl

    validate_rl(config)
    both = config.actor_rollout_ref
    actor, rollout = omega_conf_to_dataclass(both.actor), omega_conf_to_dataclass(both.rollout)
    assert actor.optim.lr == both.actor.optim.lr and rollout.n == both.rollout.n
    assert omega_conf_to_dataclass(config.algorithm).adv_estimator == config.algorithm.adv_estimator
    if need_critic(config):
        assert omega_conf_to_dataclass(config.critic).optim.lr == config.critic.optim.lr
    if config.distillation.enabled:
        assert omega_conf_to_dataclass(config.distillation).teacher_models


@pytest.mark.slow
def test_what_verl_refuses_is_one_line():
    from verl_dft.training.online.configure import validate_rl

    step = next(one for one in planned("gft/sft_grpo", "scale=paper") if one.verb == "rl")
    config = copy.deepcopy(step.composed.configs[0])
    config.model.path = str(recipes_dir() / "tiny" / "base")
    config.actor_rollout_ref.actor.use_dynamic_bsz = False
    config.trainer.n_gpus_per_node = 3
    with pytest.raises(InputError, match="verl refuses the configuration: .*must be divisible") as caught:
        validate_rl(config)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_ray_understands_the_lines_for_several_machines():
    from ray.scripts.scripts import start

    steps = planned("gft/sft_grpo", "scale=paper", "verbs.rl.trainer.nnodes=2")
    lines = cluster_lines(next(one for one in steps if one.verb == "rl"))
    commands = [shlex.split(line.partition(": ")[2]) for line in lines if ": ray start" in line]
    assert len(commands) == 2
    for command in commands:
        assert command[:2] == ["ray", "start"]
        given = start.make_context("start", command[2:]).params
        assert given["head"] or given["address"] == "$HEAD:6379"


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


@pytest.mark.slow
def test_recipes_of_different_papers_share_steps_in_the_tiny_world():
    def keys(name, *steps):
        made = {one.name: one.key for one in planned(name, "scale=tiny")}
        return {made[step] for step in steps}

    assert len(keys("dft/table1", "train-tiny-sft") | keys("dft/fig3", "train-sft-lr_1e-4", "train-sft-batch_64")
               | keys("gft/table2", "sft") | keys("gft/fig1", "sft")) == 1  # fmt: skip
    assert (
        len(keys("dft/table1", "base-tiny") | keys("gft/fig4", "base") | keys("data_rewriting/table2", "base-tiny"))
        == 1
    )
    assert len(keys("gft/fig1", "grpo") | keys("gft/fig4", "grpo-grpo") | keys("gft/fig5", "grpo")) == 1
    assert len(keys("data_rewriting/table3", "stages") | keys("data_rewriting/fig3", "stages")) == 1
