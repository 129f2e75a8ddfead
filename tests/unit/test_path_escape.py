"""Nothing that data, benchmarks, models or arms are called makes a command write outside of its output folder."""

import json
from pathlib import Path

import pytest

from verl_dft.cli import main
from verl_dft.errors import InputError
from verl_dft.evaluation.command import expand_benchmarks
from verl_dft.evaluation.run import default_output_dir
from verl_dft.files import atomic_dir, atomic_write
from verl_dft.sampling.engine import SampleRequest
from verl_dft.sampling.shard_file import shard_id
from verl_dft.sampling.store import sample_key

NAMES = ["../../x", "/etc/x", "..", "a/../../b", "~/x", "x\x00y", "\n"]


@pytest.mark.parametrize("name", [*NAMES[:5], "."])
def test_a_benchmark_is_called_by_a_plain_name(name: str) -> None:
    with pytest.raises(InputError, match="benchmark.name="):
        expand_benchmarks(["benchmark=arithmetic", f"benchmark.name={name}"])


@pytest.mark.parametrize("model", ["../../x", "/etc/x", "..", "a/../../b", "/", "org/name"])
def test_a_model_names_a_folder_below_ours(model: str) -> None:
    folder = Path(default_output_dir(model, "math500"))
    assert folder.parts[:2] == ("runs", "evaluate") and ".." not in folder.parts and len(folder.parts) <= 4


def test_samples_lie_in_files_that_hashes_name() -> None:
    keys = [sample_key(name, SampleRequest((1, 2), 1), 0) for name in NAMES]
    assert all(set(text) <= set("0123456789abcdef") for text in [*keys, shard_id(NAMES)])


def test_ids_and_names_of_a_file_stay_in_the_output_folder(tmp_path: Path) -> None:
    given = tmp_path / "in" / "..%2f..problems.jsonl"
    given.parent.mkdir()
    rows = [{"id": name, "problem": "2 + 3 ?", "answer": "5", "solution": "5", "source": name} for name in NAMES[:-1]]
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "make", f"data={given}", f"output_dir={tmp_path}/a/b/out"]) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 2 and all(path == given or path.is_relative_to(tmp_path / "a" / "b" / "out") for path in files)


def test_a_link_in_the_output_folder_is_replaced_and_not_followed(tmp_path: Path) -> None:
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    out.mkdir()
    (outside / "kept.json").write_text("kept")
    (out / "file.json").symlink_to(outside / "kept.json")
    (out / "folder").symlink_to(outside)
    with atomic_write(out / "file.json") as file:
        file.write("new")
    with atomic_dir(out / "folder") as folder:
        (folder / "made").write_text("new")
    assert [path.name for path in outside.iterdir()] == ["kept.json"]
    assert (outside / "kept.json").read_text() == "kept" and (out / "file.json").read_text() == "new"
    assert not (out / "folder").is_symlink() and (out / "folder" / "made").is_file()


RECIPE = """
title: arms with names that are paths
steps:
  made:
    verb: data make
    for: {arm: {"../../x": {seed: 1}, "/etc/x": {seed: 2}, "..": {seed: 3}}}
    with: {data: arithmetic, data.source.num_rows: 4, data.source.seed: "${arm.seed}"}
"""


def test_arms_of_a_recipe_have_folders_below_the_runs(tmp_path: Path) -> None:
    from verl_dft.recipes.load import load_recipe
    from verl_dft.recipes.plan import plan
    from verl_dft.recipes.settings import settings_of

    (tmp_path / "mine.yaml").write_text(RECIPE)
    settings = settings_of(load_recipe(str(tmp_path / "mine.yaml")), ["scale=tiny", f"output_dir={tmp_path}/runs"])
    steps = plan(settings)
    assert len({step.folder for step in steps}) == 3
    for step in steps:
        assert "/" not in step.name and step.folder.resolve().is_relative_to(settings.root.resolve())
        assert str(step.folder.resolve()).startswith(str(tmp_path))
