"""Every configuration and recipe that is shipped composes, and says what it needs to say."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from verl_dft.config import compose
from verl_dft.errors import InputError
from verl_dft.files import sha256_file
from verl_dft.paths import configs_dir, recipes_dir

PRIMARY = sorted(path.stem for path in configs_dir().glob("*.yaml"))
"""Files directly in configs/ are primary; those in its folders are options of a group."""
RECIPES = sorted(path.relative_to(recipes_dir()).with_suffix("").as_posix() for path in recipes_dir().rglob("*.yaml")
                 if "\ndefaults:" in path.read_text(encoding="utf-8"))  # fmt: skip
"""Configurations of one command; those that list steps (verl-dft recipe) are tested elsewhere."""
GROUPS = {"sft": ("objective", "data", "model", "hardware"), "evaluate": ("benchmark",), "data": ("data",),
          "rl": ("algorithm", "hardware/rl")}  # fmt: skip
"""Groups a primary config has options of; an option is composed with the first config that has its group."""
OPTIONS = sorted(
    (config, group, path.stem)
    for config, groups in GROUPS.items()
    for group in groups
    for path in (configs_dir() / group).glob("*.yaml")
    if path.stem != "custom"  # the class is the user's
)
ONLINE = [name for name in RECIPES if "- /rl\n" in (recipes_dir() / f"{name}.yaml").read_text()]
"""Recipes of ``verl-dft rl``; the others are of ``verl-dft train``."""
ONLINE_KEYS = ("actor_rollout_ref.actor.optim.lr", "data.train_batch_size", "data.max_response_length", "seed",
               "actor_rollout_ref.actor.policy_loss.loss_mode")  # fmt: skip
TRAINING_KEYS = ("optim.lr", "data.train_batch_size", "data.max_length", "trainer.seed", "objective._target_")


def test_there_is_something_to_test():
    assert {"sft", "evaluate", "data", "demo"} <= set(PRIMARY)
    assert {"tiny/base", "tiny/post", "laptop/gsm8k_dft"} <= set(RECIPES)


@pytest.mark.parametrize("name", PRIMARY)
def test_primary_config_composes(name):
    assert len(compose(name, []))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_composes(name):
    config = compose(name, [])
    for key in ONLINE_KEYS if name in ONLINE else TRAINING_KEYS:
        assert OmegaConf.select(config, key) is not None, key


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_checked_as_a_run_would_be(name, tmp_path, monkeypatch):
    from verl_dft.training.configure import compose_training
    from verl_dft.training.online.configure import compose_rl

    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")
    composed = compose_rl if name in ONLINE else compose_training
    config = composed(["--config-name", name, "model=a/model", f"output_dir={tmp_path}"])
    assert config.model.path == "a/model"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_how_it_is_run(name):
    """First line `# @package _global_`; then what it is, the command with its own name, and what it needs."""
    text = (recipes_dir() / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n# ")
    comment = text.split("\ndefaults:")[0]
    assert f"--config-name {name}" in comment and "# Needs: " in comment


@pytest.mark.slow
@pytest.mark.parametrize(("config", "group", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_of_a_group_composes(config, group, option):
    assert len(compose(config, [f"{group}={option}"]))


def test_a_key_that_no_recipe_has_is_refused():
    with pytest.raises(InputError, match="optim.lr"):
        compose("tiny/post", ["optim.lrr=1"])


# ---- the shipped base ----


@pytest.fixture(scope="module")
def base() -> Path:
    return recipes_dir() / "tiny" / "base"


def test_shipped_base_is_what_its_provenance_says(base):
    facts = json.loads((base / "PROVENANCE.json").read_text())
    assert {path.name for path in base.iterdir()} == {*facts["sha256"], "PROVENANCE.json"}
    for name, digest in facts["sha256"].items():
        assert sha256_file(base / name) == digest, f"{name} was changed after `make base`"
    assert sum(path.stat().st_size for path in base.iterdir()) < 1.2e6
    assert "--config-name tiny/base" in facts["commands"][1]
    recipe = compose("tiny/base", [])
    assert facts["steps"] * recipe.data.train_batch_size == recipe.data.source.num_rows, "made by another recipe"
    assert facts["measured"]["benchmark"] == "arithmetic" and facts["measured"]["n"] == 16
    assert 0.2 < facts["measured"]["avg"] < 0.7, "a base that solves nearly none or nearly all shows no difference"


def test_shipped_tokenizer_reads_numbers_as_one_token(base):
    """transformers replaces the pre-tokenizer of qwen2 models by one that splits numbers into digits."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    for number in range(61):
        assert len(tokenizer.encode(f" {number}")) == 1, number
    text = "a 15 - 2 = 13 ; b 13 * 2 = 26 ; Answer \\boxed{ 26 }"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) == 20
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "How many ?"}], tokenize=False,
                                         add_generation_prompt=True)  # fmt: skip
    assert chat == "<|im_start|>user\nHow many ?<|im_end|>\n<|im_start|>assistant\n"


def test_shipped_base_prefers_right_steps(base):
    """Under the weights, a right native solution of an easy problem is likelier than the same with a wrong step."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    question = [{"role": "user", "content": "Eve has 15 keys : a loses 2 , b finds 5 . How many ?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)

    def logp(answer: str) -> float:
        response = tokenizer.encode(answer)
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logits = model(ids).logits[0].log_softmax(-1)
        steps = range(len(prompt) - 1, ids.shape[1] - 1)
        return sum(logits[i, ids[0, i + 1]].item() for i in steps)

    right = logp("a 15 - 2 = 13 ; b 13 + 5 = 18 ; Answer \\boxed{ 18 }")
    wrong = logp("a 15 - 2 = 13 ; b 13 + 5 = 17 ; Answer \\boxed{ 17 }")
    assert right > wrong + 1
