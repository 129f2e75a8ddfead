"""A distillation's teachers before the run: named, readable, and with the policy's vocabulary."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from verl_dft.errors import InputError
from verl_dft.paths import recipes_dir
from verl_dft.training.online.configure import compose_rl
from verl_dft.training.online.teachers import check_teachers

BASE = recipes_dir() / "tiny" / "base"
KEY = "distillation.teacher_models.teacher_model.model_path"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


def checked(tokenizer: Any, *overrides: str) -> None:
    check_teachers(
        compose_rl(["--config-name", "tiny/rl", "algorithm=distill", "output_dir=/nowhere", *overrides]), tokenizer
    )


def test_the_same_vocabulary_passes_and_another_does_not(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")
    checked(tokenizer, f"{KEY}={BASE}")
    folder = tmp_path / "teacher"
    shutil.copytree(BASE, folder)
    made = json.loads((folder / "tokenizer.json").read_text())
    added = made["added_tokens"]
    added[-1]["content"], added[-2]["content"] = added[-2]["content"], added[-1]["content"]
    (folder / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(InputError, match="another vocabulary than the policy: 2 of its"):
        checked(tokenizer, f"{KEY}={folder}")


def test_a_teacher_that_is_not_there(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")
    with pytest.raises(InputError, match=f"{KEY} is not set"):
        checked(tokenizer)
    with pytest.raises(InputError, match="no tokenizer could be loaded"):
        checked(tokenizer, f"{KEY}={tmp_path}")
