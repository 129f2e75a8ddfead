"""An evaluation on the sample store: killed and resumed, graded again, with presets; texts come from a script."""

import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from store_helpers import PLACES, killed

from verl_dft.errors import InputError
from verl_dft.evaluation.command import compose_evaluate
from verl_dft.evaluation.run import evaluate
from verl_dft.paths import recipes_dir
from verl_dft.sampling.source import ScriptedSource

_RUN_DEPENDENT = {"written_at", "seconds", "command", "num_reused", "num_generated"}


def _config(folder: Path, **changes: object) -> dict:
    argv = [f"model={recipes_dir() / 'tiny' / 'base'}", "benchmark=arithmetic", f"output_dir={folder}", "n=4"]
    argv += ["benchmark.generator.num_problems=6", "max_tokens=60"]
    config = OmegaConf.to_container(compose_evaluate(argv), resolve=True)
    return config | {"shard_size": 5} | changes


def _answers() -> ScriptedSource:
    return ScriptedSource([f"So it is \\boxed{{{number}}}." for number in range(30)] + ["no idea", "long " * 20])


def _table(folder: Path) -> dict:
    result = json.loads((folder / "result.json").read_text())
    return {key: value for key, value in result.items() if key not in _RUN_DEPENDENT}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation") / "whole"
    result = evaluate(_config(folder), _answers())
    assert result["num_generated"] == 24 and 0 < result["truncated_frac"] < 1 and result["verdicts"]["no_answer"] > 0
    assert sum(result["verdicts_qwen"].values()) == 24 and result["avg_qwen"] >= result["avg"]
    return folder


@pytest.mark.parametrize("place", [place for place, _ in PLACES])
def test_a_killed_evaluation_ends_with_the_same_bytes_and_the_same_table(
    tmp_path: Path, finished: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "killed"
    assert killed(f"{place}:3", lambda: evaluate(_config(folder), _answers()))
    assert not (folder / "result.json").exists()
    source = _answers()
    result = evaluate(_config(folder), source)
    assert sum(source.calls) == result["num_generated"] == 24 - result["num_reused"]
    lost = place in ("store.before_append", "store.after_append", "store.shard_commit")
    assert ("1 unfinished shard(s) dropped" in capsys.readouterr().err) == lost
    assert (folder / "samples.parquet").read_bytes() == (finished / "samples.parquet").read_bytes()
    assert _table(folder) == _table(finished)


def test_grading_again_never_generates(tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "graded"
    shutil.copytree(finished, folder)
    grading = {"num_workers": 1, "timeout_s": 5, "memory_mb": 1024}
    source = _answers()
    result = evaluate(_config(folder, grading=grading), source)
    assert source.calls == [] and result["num_reused"] == 24 and _table(folder) == _table(finished)
    # another answer type is another configuration, but the same samples
    config = _config(folder, regrade=True, overwrite=True)
    config["benchmark"]["answer_type"] = "text"
    assert evaluate(config)["num_reused"] == 24
    with pytest.raises(InputError, match="24 of 24 samples are not in"):
        evaluate(_config(folder, regrade=True, overwrite=True, seed=1))
    with pytest.raises(InputError, match="holds no samples"):
        evaluate(_config(tmp_path / "empty", regrade=True))
    assert not (tmp_path / "empty").exists()


def test_samples_of_two_engine_setups_are_told_of(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Other(ScriptedSource):
        def facts(self) -> dict:
            return {"source": "scripted", "num_threads": 4}

    folder = tmp_path / "mixed"
    shutil.copytree(finished / "store", folder / "store")
    next((folder / "store").glob("*.jsonl")).unlink()
    assert evaluate(_config(folder), Other(_answers().texts))["num_generated"] > 0
    assert "samples of 2 engine setups" in capsys.readouterr().err


def test_presets_fill_what_is_left_open_and_nothing_else(tmp_path: Path) -> None:
    for preset, given, expected in (("dft", None, 1.0), ("gft", None, 0.5), ("gft", 0.7, 0.7)):
        folder = tmp_path / f"{preset}{given}"
        result = evaluate(_config(folder, preset=preset, temperature=given, n=1), _answers())
        assert result["temperature"] == expected
    with pytest.raises(InputError, match="preset=best is not one of dft, gft"):
        evaluate(_config(tmp_path / "x", preset="best"))
    with pytest.raises(InputError, match="shard_size=0; it must be a whole number"):
        evaluate(_config(tmp_path / "x", shard_size=0))
