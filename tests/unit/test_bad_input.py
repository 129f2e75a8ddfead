"""Bad input to ``verl-dft train``: exit code 2 and one clear line, before anything is trained."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from verl_dft.cli import main
from verl_dft.errors import InputError
from verl_dft.objectives import list_objectives

GOOD = {"messages": [{"role": "user", "content": "2 + 3 ?"}, {"role": "assistant", "content": "5"}]}


def rows(path: Path, *changes: dict, count: int = 8) -> Path:
    """A jsonl file of good rows, the first ones changed."""
    lines = [{**GOOD, "problem_id": str(i), "origin": "expert"} for i in range(count)]
    for line, change in zip(lines, changes, strict=False):
        line.update(change)
        for key in [key for key, value in change.items() if value is None]:
            del line[key]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answer(text: str) -> dict:
    return {"messages": [GOOD["messages"][0], {"role": "assistant", "content": text}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from verl_dft.tiny import init_model

    return init_model(tmp_path_factory.mktemp("model") / "tiny", hidden_size=16, intermediate_size=16,
                      num_attention_heads=1, num_key_value_heads=1)  # fmt: skip


@pytest.fixture
def train(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run ``verl-dft train`` with overrides and return its one line; the exit code must be 2."""
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")
    monkeypatch.chdir(tmp_path)

    def run(data: Path | str, *overrides: str) -> str:
        argv = ["train", f"model={model}", f"data={data}", f"data.cache_dir={tmp_path / 'cache'}", "data.max_length=64",
                "data.train_batch_size=4", f"output_dir={tmp_path / 'out'}", *overrides]  # fmt: skip
        assert main(argv) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, lines
        assert not (tmp_path / "out" / "checkpoints").exists()
        return lines[0]

    return run


CASES = {
    "missing file": (lambda p: p / "no.parquet", [], ["no.parquet", "does not exist"]),
    "missing column": (lambda p: rows(p / "r.jsonl", {"messages": None}), [], ["r.jsonl", "messages"]),
    "empty response": (lambda p: rows(p / "r.jsonl", {}, answer("")), [], ["r.jsonl", "row 1", "empty"]),
    "too long under error": (
        lambda p: rows(p / "r.jsonl", {}, {}, answer("1 + " * 80)),
        ["data.overlong=error"],
        ["r.jsonl", "row 2", "max_length"],
    ),
    "all rows dropped": (lambda p: rows(p / "r.jsonl"), ["data.max_length=3"], ["max_length"]),
    "no rows": (lambda p: rows(p / "r.jsonl", count=0), [], ["r.jsonl"]),
    "fewer rows than a batch": (lambda p: rows(p / "r.jsonl", count=3), [], ["3 training rows", "train_batch_size=4"]),
    "unknown objective": (lambda p: rows(p / "r.jsonl"), ["objective=dtf"], ["'dtf'", ", ".join(list_objectives())]),
    "unknown option": (lambda p: rows(p / "r.jsonl"), ["objective.alfa=1"], ["objective.alfa", "objective.alpha"]),
    "batch not divisible": (
        lambda p: rows(p / "r.jsonl"),
        ["trainer.n_gpus_per_node=3"],
        ["data.train_batch_size=4", "not divisible by 3"],
    ),
    "validation without rows": (lambda p: rows(p / "r.jsonl"), ["trainer.test_freq=1"], ["test_freq=1", "val_files"]),
    "no model": (lambda p: rows(p / "r.jsonl"), ["model=./nowhere"], ["model.path=./nowhere"]),
    "model not given": (lambda p: rows(p / "r.jsonl"), ["model.path=null"], ["model.path is not set; give"]),
    "not json": (lambda p: (p / "r.jsonl").write_text("{") and p / "r.jsonl", [], ["r.jsonl"]),
}


@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "-"))
def test_one_clear_line(name: str, train: Callable[..., str], tmp_path: Path) -> None:
    make, overrides, words = CASES[name]
    line = train(make(tmp_path), *overrides)
    for word in words:
        assert word in line, line


def test_tokenizer_without_chat_template(train: Callable[..., str], model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    line = train(rows(tmp_path / "r.jsonl"), f"model={bare}")
    assert "chat template" in line


def test_a_column_the_objective_requires(
    train: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the builder that makes the column, before the model is loaded."""
    (tmp_path / "weighing.py").write_text(
        "class Weighing:\n    requires = frozenset({'advantage'})\n    def __call__(self, batch): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = train(rows(tmp_path / "r.jsonl"), "objective._target_=weighing.Weighing")
    assert "'advantage'" in line and "groups" in line


def test_output_directory_of_another_run(train: Callable[..., str], model: Path, tmp_path: Path) -> None:
    """It names the key that differs; the same configuration goes on."""
    from verl_dft.training.setup import prepare_run

    data = rows(tmp_path / "r.jsonl")
    argv = [f"model={model}", f"data={data}", f"data.cache_dir={tmp_path / 'cache'}", "data.max_length=64",
            "data.train_batch_size=4", f"output_dir={tmp_path / 'out'}"]  # fmt: skip
    prepare_run(argv)
    prepare_run([*argv, "optim.lr=5e-5"])  # nothing was trained yet: a new configuration takes the directory
    (tmp_path / "out" / "metrics.jsonl").touch()
    line = train(data, "optim.lr=1e-3")
    assert "optim.lr: 5e-05 there, 0.001 here" in line and "choose another output_dir" in line
    prepare_run([*argv, "trainer.logger=[]"])  # what may differ between a run and its continuation
    rows(tmp_path / "r.jsonl", answer("6"))
    with pytest.raises(InputError, match="rows or the tokenizer have changed"):
        prepare_run(argv)


def test_after_a_mistake_the_same_directory_serves(train: Callable[..., str], model: Path, tmp_path: Path) -> None:
    from verl_dft.training.setup import prepare_run

    data = rows(tmp_path / "r.jsonl", count=3)
    assert "do not fill one batch" in train(data)
    argv = [f"model={model}", f"data={data}", f"data.cache_dir={tmp_path / 'cache'}", "data.max_length=64"]
    assert prepare_run([*argv, "data.train_batch_size=2", f"output_dir={tmp_path / 'out'}"]).data.train_batch_size == 2


def test_output_directory_of_something_else(train: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("irreplaceable")
    assert "thesis.txt" in train(rows(tmp_path / "r.jsonl"))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "irreplaceable"


def test_mini_batches_that_do_not_fit(train: Callable[..., str], tmp_path: Path) -> None:
    data = rows(tmp_path / "r.jsonl")
    assert "data.mini_batch_size=3 must divide data.train_batch_size=4" in train(data, "data.mini_batch_size=3")
    assert "multiple of the 2 data-parallel ranks" in train(
        data, "data.mini_batch_size=1", "trainer.n_gpus_per_node=2", "trainer.nnodes=1"
    )
    assert "data.mini_batch_size=0 must be" in train(data, "data.mini_batch_size=0")
