"""What the command refuses before the model is loaded, what it tolerates, and where an export's generation stops."""

import json
from pathlib import Path

import data_helpers
import pytest
from transformers import GenerationConfig
from verl.utils.tracking import Tracking

from verl_dft.errors import InputError
from verl_dft.files import atomic_dir, atomic_write
from verl_dft.training.configure import LOGGERS, compose_training
from verl_dft.training.export import add_end_token
from verl_dft.training.setup import prepare_run

BASE = ["model=/some/folder", "output_dir=/tmp/never-made", "data=/some/rows.parquet"]


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.logger=[console,foo]"], "trainer.logger: 'foo' is not one of console, tensorboard, wandb"),
        (["trainer.logger=foo"], "trainer.logger: 'foo' is not one of"),
        (["trainer.logger=swanlab"], "trainer.logger=swanlab needs a package that is not installed: swanlab"),
        (["hardware=gpu", "engine.strategy=megatron"], "engine.strategy=megatron is not one of fsdp, fsdp2"),
        (
            ["hardware=gpu", "precision=fp32", "model.override_config.attn_implementation=flash_attention_2"],
            "attn_implementation=flash_attention_2 computes in bf16 or fp16",
        ),
        (["trainer.resume_mode=resume_path"], "resume_mode=resume_path needs trainer.resume_from_path"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_refused_with_the_configuration(overrides: list[str], words: str) -> None:
    with pytest.raises(InputError) as error:
        compose_training([*BASE, *overrides])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_is_right_passes() -> None:
    compose_training([*BASE, "hardware=gpu", "engine.strategy=fsdp"])
    compose_training([*BASE, "hardware=gpu", "precision=fp32"])
    for logger in ("console", "[]", "null", "[console,tensorboard,wandb,file]"):
        compose_training([*BASE, f"trainer.logger={logger}"])


def test_loggers_are_verls() -> None:
    assert sorted(LOGGERS) == sorted(Tracking.supported_backend)


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    """A good command line; its model is a tokenizer, which is all that is loaded."""
    data_helpers.family("qwen2").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    row = {"messages": data_helpers.chat("2 + 3 ?", "5"), "origin": "expert"}
    lines = [json.dumps({**row, "problem_id": str(i)}) for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return [f"model={tmp_path / 'model'}", f"data={tmp_path / 'rows.jsonl'}", f"data.cache_dir={tmp_path / 'cache'}",
            "data.max_length=64", "data.train_batch_size=4", f"output_dir={tmp_path / 'out'}"]  # fmt: skip


def test_the_checkpoint_to_start_from_is_looked_at_first(argv: list[str], tmp_path: Path) -> None:
    start = tmp_path / "other" / "global_step_3"
    with pytest.raises(InputError, match="global_step_3 does not exist"):
        prepare_run([*argv, f"trainer.resume_from_path={start}"])
    start.mkdir(parents=True)
    with pytest.raises(InputError, match="global_step_3 is not a whole checkpoint"):
        prepare_run([*argv, f"trainer.resume_from_path={start}"])
    (start / "complete.json").write_text(json.dumps({"step": 3, "world_size": 2}))
    with pytest.raises(InputError, match=r"saved by 2 rank\(s\), this run has 1"):
        prepare_run([*argv, f"trainer.resume_from_path={start}"])
    assert not (tmp_path / "out" / "data").exists(), "rows were made before the checkpoint was looked at"
    prepare_run([*argv, f"trainer.resume_from_path={start}", "trainer.n_gpus_per_node=2"])


def test_what_a_killed_write_leaves_behind_is_no_stranger(argv: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_write(out / "config.yaml"), atomic_dir(out / "model"):
        left = [path.name for path in out.iterdir()]
        assert len(left) == 2
    for name in left:
        (out / name).touch()
    (out / "config.yaml").unlink()
    (out / "model").rmdir()
    prepare_run(argv)
    (out / "metrics.tmp").touch()
    (out / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"holds no run \(metrics\.tmp"):
        prepare_run(argv)


@pytest.mark.parametrize(
    ("family", "base", "expected"),
    [
        ("qwen2-base", "<|endoftext|>", ["<|endoftext|>", "<|im_end|>"]),
        ("qwen2-base", None, "<|im_end|>"),
        ("qwen2-base", ["<|endoftext|>", "<|im_end|>"], ["<|endoftext|>", "<|im_end|>"]),
        ("llama3", "<|end_of_text|>", ["<|end_of_text|>", "<|eot_id|>"]),
        ("qwen2", "<|im_end|>", "<|im_end|>"),
    ],
)
def test_generation_stops_where_the_template_ends_a_turn(
    family: str, base: str | list[str] | None, expected: str | list[str]
) -> None:
    tokenizer = data_helpers.family(family)
    config = GenerationConfig(eos_token_id=base and tokenizer.convert_tokens_to_ids(base))
    add_end_token(config, tokenizer)
    assert config.eos_token_id == tokenizer.convert_tokens_to_ids(expected)


def test_generation_is_left_alone_without_a_template() -> None:
    tokenizer = data_helpers.family("qwen2-base")
    tokenizer.chat_template = None
    config = GenerationConfig(eos_token_id=7)
    add_end_token(config, tokenizer)
    assert config.eos_token_id == 7
