"""Composition and its error messages; every shipped group option composes; checks before anything is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from verl_dft.cli import main, usage
from verl_dft.config import compose, group_options
from verl_dft.errors import InputError
from verl_dft.objectives import list_objectives
from verl_dft.training.configure import compose_training

BASE = ["model=/some/folder", "output_dir=/tmp/never-made", "data=/some/rows.parquet"]


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")


def test_verls_and_our_keys_are_overridden_alike() -> None:
    config = compose("sft", ["optim.lr=1e-6", "objective.alpha=0.5", "+trainer.wandb_proxy=x", "data.max_length=99"])
    assert config.optim.lr == 1e-6 and config.objective.alpha == 0.5 and config.data.max_length == 99


def test_model_and_data_take_paths() -> None:
    config = compose("sft", ["model=/a b/c", "data=x/rows.jsonl"])
    assert config.model.path == "/a b/c" and config.data.train_files == "x/rows.jsonl"
    assert compose("sft", ["model=org/name"]).model.path == "org/name"


def test_a_class_of_yours_brings_its_own_options() -> None:
    config = compose("sft", ["objective._target_=my.Loss", "objective.tau=0.7"])
    assert dict(config.objective) == {"_target_": "my.Loss", "tau": 0.7}


PLUGIN = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Loss:
    tau: float = 0.5
    requires = frozenset()
    def __call__(self, batch): ...
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An objective ``theirs`` of an installed package (whose metadata is all that makes it one)."""
    (tmp_path / "their_package.py").write_text(PLUGIN)
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[verl_dft.objectives]\ntheirs = their_package:Loss\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_an_objective_of_a_package_is_chosen_by_its_name(plugin: None, tmp_path: Path) -> None:
    assert "theirs" in group_options("objective") and "theirs" in usage("train")
    config = compose_training([*BASE, "objective=theirs", "objective.tau=0.7"])
    assert dict(config.objective) == {"_target_": "their_package.Loss", "tau": 0.7}
    config = compose_training([*BASE, "objective.tau=0.7", "objective=theirs"])
    assert dict(config.objective) == {"_target_": "their_package.Loss", "tau": 0.7}
    with pytest.raises(InputError, match="objective their_package.Loss has no option 'rho'; valid: tau"):
        compose_training([*BASE, "objective=theirs", "objective.rho=1"])
    with pytest.raises(InputError, match="unknown objective 'thiers'.* Did you mean 'theirs'?"):
        compose_training([*BASE, "objective=thiers"])


def test_a_config_file_of_yours_names_an_objective_of_a_package(plugin: None, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "defaults: [sft, {override objective: custom}, _self_]\n"
        "objective: {_target_: their_package.Loss, tau: 0.7}\noptim: {lr: 1e-6}\n"
    )
    config = compose_training(["--config-name", str(file), *BASE, "objective.tau=0.9"])
    assert dict(config.objective) == {"_target_": "their_package.Loss", "tau": 0.9} and config.optim.lr == 1e-6


def test_a_package_that_takes_one_of_our_names_is_refused(plugin: None, tmp_path: Path) -> None:
    points = tmp_path / "their_package-1.0.dist-info" / "entry_points.txt"
    points.write_text("[verl_dft.objectives]\ndft = their_package:Loss\n")
    for overrides in (["objective=dft"], ["objective=sft"], []):
        with pytest.raises(InputError, match="reuse the built-in name.s. dft; rename them"):
            compose_training([*BASE, *overrides])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.lrr=1"], "no key 'optim.lrr' (did you mean optim.lr?)"),
        (["lr=1e-5"], "did you mean optim.lr?"),
        (["objective.alfa=1"], "did you mean objective.alpha?"),
        (["objectiv=dft"], "did you mean objective?"),
        (["objective=dtf"], f"unknown objective 'dtf'; valid: {', '.join(list_objectives())}. Did you mean 'dft'?"),
        (["hardware=tpu"], "config group 'hardware' has no option 'tpu'"),
        (["model=qwen2.5-math"], "did you mean qwen2.5-math-"),
        (["data=gsm8"], "did you mean gsm8k"),
        (["trainer.seed=${nowhere}"], "nowhere"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_answered_with_the_valid_names(overrides: list[str], words: str) -> None:
    with pytest.raises(InputError) as error:
        compose("sft", overrides)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.reduction=mean"], "trainer.reduction=mean is not one of token_mean"),
        (["launcher=slurm"], "launcher=slurm is not one of torchrun, ray"),
        (["data.overlong=cut"], "data.overlong=cut is not one of drop"),
        (["engine.strategy=fsdp"], "engine.strategy=fsdp is not one of fsdp2"),
        (["data.train_batch_size=9", "trainer.n_gpus_per_node=2"], "data.train_batch_size=9 is not divisible by 2"),
        (["data.train_batch_size=8", "data.micro_batch_size_per_gpu=3"], "does not divide a rank's 8 rows"),
        (["data.max_length=0"], "data.max_length=0 must be a whole number"),
        (["trainer.test_freq=0"], "trainer.test_freq=0 must be a number of steps"),
        (["engine.ulysses_sequence_parallel_size=2"], "needs flash attention"),
        (["trainer.reduction=micro_batch_sum", "data.use_dynamic_bsz=true"], "set data.use_dynamic_bsz=false"),
        (["data.use_dynamic_bsz=true", "data.max_length=9000"], "would not fit a forward pass"),
        (["trainer.seed=-1"], "trainer.seed=-1 must be"),
        (["trainer.total_training_steps=0"], "trainer.total_training_steps=0 must be at least 1"),
        (["optim.clip_grad=null"], "optim.clip_grad=None must be above 0"),
        (["optim.lr_scheduler_type=linear"], "optim.lr_scheduler_type=linear is not one of constant, cosine"),
        (["objective.alpha=-1"], "objective.alpha must be >= 0"),
        (["objective._target_=no.such.Loss"], "cannot import objective 'no.such.Loss'"),
        (["model.path=null"], "model.path is not set"),
        (["nonsense"], "'nonsense' is not an override"),
        (["--fast"], "unknown option '--fast'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(overrides: list[str], words: str) -> None:
    with pytest.raises(InputError) as error:
        compose_training([*BASE, *overrides])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_objective_that_nothing_provides_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text(
        "class Needy:\n    requires = frozenset({'hidden_states'})\n    def __call__(self, batch): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="`requires` must be a frozenset of advantage, .*'hidden_states'"):
        compose_training([*BASE, "objective._target_=needy.Needy"])


def test_auto_values() -> None:
    config = compose_training([*BASE, "data.train_batch_size=24"])
    assert config.data.micro_batch_size_per_gpu == 12
    config = compose_training([*BASE, "data.train_batch_size=24", "trainer.n_gpus_per_node=2"])
    assert config.data.micro_batch_size_per_gpu == 12
    gpu = compose_training([*BASE, "hardware=gpu"])
    assert gpu.trainer.device == "cuda" and gpu.precision == "bf16"
    assert gpu.model.override_config.attn_implementation in ("sdpa", "flash_attention_2")


def test_help_is_fast_and_shows_examples() -> None:
    code = (
        "import sys, verl_dft.cli as c; c.main(['--help']); c.main(['train', '--help']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ})
    assert done.stdout.rstrip().endswith("False") and "verl-dft train objective=dft" in done.stdout
    assert f"objective: {', '.join(sorted(['custom', *list_objectives()]))}" in usage("train")


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["trian"], "did you mean 'train'?"), (["train", "optim.lrr=1"], "error: config 'sft' has no key"), ([], "")],
    ids=str,
)
def test_exit_code_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert words in capsys.readouterr().err
