"""Suites: what ``benchmark=NAME`` stands for, its local files, licences and result folders."""

from pathlib import Path

import pytest

from verl_dft.errors import InputError
from verl_dft.evaluation.command import compose_benchmarks, compose_evaluate, single_evaluations, suite_averages

_DFT = ["math500", "minerva_math", "olympiadbench", "aime24", "amc23"]


def _names(*overrides: str) -> list[str]:
    return [config.benchmark.name for config in compose_benchmarks(["model=m", *overrides])]


@pytest.mark.slow
def test_suites_hold_what_the_papers_measured() -> None:
    assert _names("benchmark=dft") == _DFT
    gft = "amc23 college_math gaokao2023en math minerva_math tabmwp olympiadbench mmlu_stem sat_math mawps svamp"
    assert _names("benchmark=gft") == gft.split()
    assert _names("benchmark=gft_forgetting") == ["mawps", "svamp", "mmlu_stem"]
    assert _names("benchmark=[gft_forgetting,dft,svamp]") == ["mawps", "svamp", "mmlu_stem", *_DFT]
    assert _names("benchmark=dft", "benchmark.suite=[aime24]") == ["aime24"]


def test_overrides_hold_for_every_member() -> None:
    for config in compose_benchmarks(["model=m", "benchmark=dft", "benchmark.limit=3", "max_tokens=7"]):
        assert (config.limit, config.max_tokens) == (3, 7)


def test_licences_filter(capsys: pytest.CaptureFixture) -> None:
    assert _names("benchmark=dft", "licences=[mit,Apache-2.0]") == ["math500", "olympiadbench"]
    assert "left out: aime24 (licence: none stated)" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"licences=\['GPL'\] leaves no benchmark \(theirs: 'CC BY-NC-SA 4.0'\)"):
        _names("benchmark=tabmwp", "licences=GPL")


@pytest.mark.slow
def test_data_dir_finds_each_members_file(tmp_path: Path) -> None:
    for file in ("mawps.jsonl", "svamp.jsonl.gz", "mmlu_stem.parquet", "gsm8k_test.jsonl"):
        (tmp_path / file).touch()
    configs = compose_benchmarks(["model=m", "benchmark=[gft_forgetting,gsm8k,arithmetic]", f"data_dir={tmp_path}"])
    files = [config.benchmark.path and Path(config.benchmark.path).name for config in configs]
    assert files == ["mawps.jsonl", "svamp.jsonl.gz", "mmlu_stem.parquet", "gsm8k_test.jsonl", None]
    with pytest.raises(InputError, match="has no math500.jsonl, math500.jsonl.gz or math500.parquet"):
        _names("benchmark=dft", f"data_dir={tmp_path}")
    with pytest.raises(InputError, match="is not a folder"):
        _names("benchmark=dft", f"data_dir={tmp_path / 'none'}")


def test_wrong_suites(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="benchmark.path is given for 5 benchmarks; use data_dir"):
        _names("benchmark=dft", "benchmark.path=x.jsonl")
    with pytest.raises(InputError, match="no option 'dtf'.*dft"):
        _names("benchmark=dtf")
    with pytest.raises(InputError, match="one benchmark is wanted here"):
        compose_evaluate(["model=m", "benchmark=dft"])
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "loop.yaml").write_text("name: loop\nsuite: [gsm8k, loop]\n")
    with pytest.raises(InputError, match="loop contains itself"):
        _names("benchmark=loop", f"--config-dir={tmp_path}")


def test_every_pair_of_model_and_benchmark_has_a_folder(repo_root: Path, tmp_path: Path) -> None:
    base = repo_root / "recipes" / "tiny" / "base"
    other = tmp_path / "other"
    other.symlink_to(base)

    def folders(*overrides: str) -> list[str]:
        return [one.output_dir for one in single_evaluations(compose_benchmarks(overrides))]

    both, suite = f"model=[{base},{other}]", "benchmark=[aime24,amc23]"
    assert folders(f"model={base}", suite) == ["runs/evaluate/tiny-base/aime24", "runs/evaluate/tiny-base/amc23"]
    assert folders(f"model={base}", suite, "output_dir=o") == ["o/aime24", "o/amc23"]
    assert folders(f"model={base}", "benchmark=aime24", "output_dir=o") == ["o"]
    models = ["tiny-base", f"{tmp_path.name}-other"]
    assert folders(both, suite, "output_dir=o") == [f"o/{m}/{b}" for m in models for b in ("aime24", "amc23")]
    assert folders(both, "benchmark=aime24", "output_dir=o") == [f"o/{m}" for m in models]


def test_the_mean_of_a_suite_is_unweighted() -> None:
    results = [{"model": m, "avg": avg, "num_problems": k} for m, avg, k in (("a", 0.1, 1), ("a", 0.4, 9), ("b", 1, 1))]
    assert suite_averages(results) == ["mean of the 2 benchmarks: 25.0  a"]
