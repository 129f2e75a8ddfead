"""When one engine may go on with another folder's weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from verl_dft.paths import recipes_dir
from verl_dft.sampling.same_shape import model_shape, shape_difference
from verl_dft.tiny import init_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_model(tmp_path_factory.mktemp("models") / "a", seed=0, hidden_size=32, intermediate_size=48)


def _json(name: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, **changes}))

    return change


def _tensors(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = change(load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def _difference(model: Path, other: Path, change: Callable[[Path], object]) -> str | None:
    shutil.copytree(model, other)
    change(other)
    return shape_difference(model_shape(str(model)), model_shape(str(other)))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: None,
        _tensors(lambda tensors: {name: value * 2 for name, value in tensors.items()}),
        _json("config.json", transformers_version="9.9", _name_or_path="elsewhere"),
        _json("tokenizer_config.json", chat_template="{{ messages }}"),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    ],
)
def test_other_weights_and_another_template_are_the_same_shape(model: Path, tmp_path: Path, change: Callable) -> None:
    assert _difference(model, tmp_path / "b", change) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_json("config.json", rms_norm_eps=1e-5), "config.json"),
        (_json("config.json", dtype="bfloat16"), "config.json"),
        (_json("generation_config.json", eos_token_id=[2, 3]), "generation_config.json"),
        (lambda folder: (folder / "generation_config.json").unlink(), "generation_config.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
        (_json("tokenizer_config.json", eos_token="<|endoftext|>"), "tokenizer_config.json"),
        (_tensors(lambda tensors: {name: value.astype(np.float16) for name, value in tensors.items()}), "tensor"),
        (_tensors(lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}), "tensor"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors"),
        (_json("config.json", model_type="mamba"), "new weights are not read"),
        (lambda folder: shutil.rmtree(folder), "is not a folder"),
    ],
)
def test_whatever_else_an_engine_reads_needs_a_new_one(
    model: Path, tmp_path: Path, change: Callable, told: str
) -> None:
    assert told in str(_difference(model, tmp_path / "b", change))


def test_the_shape_is_that_of_the_moment(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    shutil.copytree(model, folder)
    before = model_shape(str(folder))
    _json("config.json", rms_norm_eps=1e-5)(folder)
    assert "config.json" in str(shape_difference(before, model_shape(str(folder))))
    base = recipes_dir() / "tiny" / "base"
    assert shape_difference(model_shape(str(model)), model_shape(str(base))) is not None
