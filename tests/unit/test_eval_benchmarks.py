"""Benchmarks, the command line's lists, seeds, and what is checked before a model is loaded."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from verl_dft.config import compose
from verl_dft.data.prompts import render_messages
from verl_dft.errors import InputError
from verl_dft.evaluation.benchmarks import load_benchmark, local_file
from verl_dft.evaluation.command import compose_benchmarks, compose_evaluate, parse_models
from verl_dft.evaluation.report import format_table, warnings
from verl_dft.evaluation.run import default_output_dir, evaluate
from verl_dft.paths import configs_dir
from verl_dft.sampling.seeds import sample_seed

_NAMES = sorted(path.stem for path in (configs_dir() / "benchmark").glob("*.yaml"))
_ROWS = {
    "math500": 500, "minerva_math": 272, "olympiadbench": 675, "aime24": 30, "amc23": 40, "amc83": 83, "svamp": 1000,
    "college_math": 2818, "gaokao2023en": 385, "math": 5000, "mmlu_stem": 3018, "sat_math": 32, "mawps": 2065,
    "tabmwp": 1000, "gsm8k": 1319, "gsm8k_train": 7473, "math_train": 7500,
}  # fmt: skip


def _benchmark(*overrides: str) -> dict:
    return OmegaConf.to_container(compose("evaluate", list(overrides)).benchmark, resolve=True)


def _jsonl(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("name", _NAMES)
def test_every_benchmark_composes_with_a_known_prompt(name: str) -> None:
    config = _benchmark(f"benchmark={name}")
    assert config["name"] == name and config["max_tokens"] > 0
    assert render_messages(config["prompt"], "1+1?")[-1]["role"] == "user"


def test_gsm8k_reads_the_hub_layout_and_the_normalised_one(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "g.jsonl", {"question": "q?", "answer": "2+3=5\n#### 5"})
    (raw,) = load_benchmark(_benchmark("benchmark=gsm8k", f"benchmark.path={path}")).problems
    path = _jsonl(tmp_path / "n.jsonl", {"id": "t/0", "problem": "q?", "answer": "5"})
    (normalised,) = load_benchmark(_benchmark("benchmark=gsm8k", f"benchmark.path={path}")).problems
    assert (raw.problem, raw.answer, raw.id) == ("q?", "5", "gsm8k/0")
    assert (normalised.answer, normalised.id, normalised.answer_type) == ("5", "t/0", "number")


def test_local_copies_of_the_real_sets_load(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "benchmarks"
    gsm8k = load_benchmark(_benchmark("benchmark=gsm8k", f"benchmark.path={folder / 'gsm8k_test.jsonl'}"))
    math500 = load_benchmark(_benchmark("benchmark=math500", f"benchmark.path={folder / 'math500.jsonl'}"), limit=7)
    assert (len(gsm8k.problems), gsm8k.problems[0].answer) == (1319, "18")
    assert (len(math500.problems), math500.problems[1].answer) == (7, "p - q")


@pytest.mark.slow
@pytest.mark.parametrize("name", _ROWS)
def test_every_local_set_loads_whole(shared_dir: Path, name: str) -> None:
    config = _benchmark(f"benchmark={name}")
    config["path"] = str(local_file(config, shared_dir / "data" / "benchmarks"))
    benchmark = load_benchmark(config)
    assert len(benchmark.problems) == _ROWS[name]
    assert benchmark.origin["licence"] == config["licence"] != ""
    with_tolerance = {p.id: p.tolerance for p in benchmark.problems if p.tolerance is not None}
    assert with_tolerance == ({"olympiad/2592": 0.1} if name == "olympiadbench" else {})


# A made-up row in the layout of each set's origin, and what is to be read from it: question, gold, type.
_ORIGINAL_ROWS = {
    "minerva_math": ({"problem": "q?", "solution": "So \\boxed{1} or \\boxed{2e3}."}, "q?", "2e3", "latex"),
    "math": ({"problem": "q?", "solution": "It is \\boxed{\\frac{1}{2}}."}, "q?", "\\frac{1}{2}", "latex"),
    "math_train": ({"problem": "q?", "solution": "\\fbox{3}"}, "q?", "3", "latex"),
    "math500": ({"problem": "q?", "solution": "no", "answer": "p", "unique_id": "u"}, "q?", "p", "latex"),
    "gsm8k": ({"question": "q?", "answer": "2+3\n#### 1,005"}, "q?", "1,005", "number"),
    "gsm8k_train": ({"question": "q?", "answer": "2+3\n#### 5"}, "q?", "5", "number"),
    "aime24": ({"id": 6, "problem": "q?", "answer": "204"}, "q?", "204", "number"),
    "amc23": ({"id": 0, "problem": "q?", "answer": 27.0}, "q?", "27", "number"),
    "amc83": ({"id": 0, "problem": "q?", "answer": 142.0}, "q?", "142", "number"),
    "college_math": ({"question": "q?", "answer": "$10-4 n$ or $n$"}, "q?", "10-4 n or n", "latex"),
    "gaokao2023en": ({"question": "q?", "answer": "$145$solution:"}, "q?", "145solution:", "latex"),
    "olympiadbench": (
        {"id": 3, "question": "q?", "final_answer": ["$4.2$"], "answer_type": "Numerical", "error": "1e-1"},
        "q?", "4.2", "latex",
    ),
    "mmlu_stem": (
        {"question": "q?", "choices": ["up ", "down"], "answer": 1},
        "q?\nAnswer Choices: (A) up (B) down", "B", "choice",
    ),
    "sat_math": (
        {"question": "f(A) B?", "options": "A) (A) B) 2", "Answer": "B"},
        "f(A) B?\nAnswer Choices: (A) (A) (B) 2", "B", "choice",
    ),
    "mawps": ({"input": "q?", "target": 2.5}, "q?", "2.5", "number"),
    "svamp": ({"ID": "c-7", "Body": "He has 3.", "Question": "q?", "Answer": 145.0}, "He has 3. q?", "145", "number"),
    "tabmwp": (
        {"question": "q?", "choices": ["yes", "no"], "answer": "no", "table_title": "T", "table": "a | b"},
        "Read the following table regarding \"T\" and answer a question:\na | b\nq? "
        "Please select from the following options: ['yes', 'no']", "no", "auto",
    ),
}  # fmt: skip


def test_every_set_has_a_row_in_its_original_layout() -> None:
    assert set(_ORIGINAL_ROWS) == set(_ROWS)


@pytest.mark.parametrize("name", _ORIGINAL_ROWS)
def test_the_origins_layout_is_read_through_the_hubs_loader(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """As from the hub: ``datasets`` reads the row, so the types are those that it infers."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    row, problem, answer, answer_type = _ORIGINAL_ROWS[name]
    config = _benchmark(f"benchmark={name}")
    config["hub"] = {"name": "json", "files": str(_jsonl(tmp_path / "raw.jsonl", row)), "split": "train"}
    benchmark = load_benchmark(config)
    (read,) = benchmark.problems
    assert (read.problem, read.answer, read.answer_type) == (problem, answer, answer_type)
    assert read.tolerance == (0.1 if name == "olympiadbench" else None)
    assert benchmark.origin["fingerprint"] and benchmark.origin["hub"]["split"] == "train"
    assert (tmp_path / "cache").is_dir()


def test_a_table_without_title_or_choices_has_neither_in_the_question(tmp_path: Path) -> None:
    row = {"question": "q?", "choices": None, "answer": "3", "table_title": None, "table": "a"}
    path = _jsonl(tmp_path / "t.jsonl", row, row | {"table_title": "T"})
    untitled, titled = load_benchmark(_benchmark("benchmark=tabmwp", f"benchmark.path={path}")).problems
    assert untitled.problem == "Read the following table and answer a question:\na\nq?"
    assert titled.problem == 'Read the following table regarding "T" and answer a question:\na\nq?'


def test_a_benchmark_is_added_with_a_file_alone(tmp_path: Path) -> None:
    (tmp_path / "benchmark").mkdir()
    path = _jsonl(tmp_path / "b.jsonl", {"q": "1+1?", "a": "x=2", "tolerance": 0.5, "level": "Level 3"})
    text = f"name: mine\npath: {path}\ncolumns: {{problem: [q], answer: [a]}}\nrewrite: {{answer: [['x=', '']]}}\n"
    (tmp_path / "benchmark" / "mine.yaml").write_text(text)
    (tmp_path / "benchmark" / "ours.yaml").write_text("name: ours\nsuite: [mine, gsm8k]\n")
    argv = ["model=m", f"--config-dir={tmp_path}", "benchmark=ours"]
    mine, gsm8k = compose_benchmarks(argv)
    assert gsm8k.benchmark.name == "gsm8k" and mine.prompt == "qwen-boxed"
    (problem,) = load_benchmark(OmegaConf.to_container(mine.benchmark, resolve=True)).problems
    assert (problem.id, problem.answer, problem.tolerance, problem.level) == ("mine/0", "2", 0.5, 3)
    with pytest.raises(InputError, match="no folder benchmark/"):
        compose_benchmarks(["model=m", f"--config-dir={tmp_path / 'benchmark'}"])


def test_a_rows_tolerance_reaches_the_grader(repo_root: Path, tmp_path: Path) -> None:
    from verl_dft.sampling.source import ScriptedSource

    rows = [{"problem": "q", "answer": "4.2"}, {"problem": "r", "answer": "4.2", "tolerance": "1e-1"}]
    argv = [f"model={repo_root / 'recipes' / 'tiny' / 'base'}", "benchmark=file", "prompt=raw", "n=1"]
    argv += [f"benchmark.path={_jsonl(tmp_path / 'b.jsonl', *rows)}", f"output_dir={tmp_path / 'out'}"]
    result = evaluate(compose_evaluate(argv), ScriptedSource(["It is \\boxed{4.25}."]))
    assert [problem["num_correct"] for problem in result["per_problem"]] == [0, 1]


def test_arithmetic_is_held_out_seeded_and_levelled() -> None:
    config = _benchmark("benchmark=arithmetic", "benchmark.generator.num_problems=40")
    first, again = (load_benchmark(config).problems for _ in range(2))
    config["generator"]["seed"] += 1
    other = load_benchmark(config).problems
    assert first == again and first != other
    assert len(first) == 40 and {p.level for p in first} <= {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"problem": "a", "gold": "1"}], r"row 0: no answer \(looked for answer; columns: problem, gold\)"),
        ([{"problem": " ", "answer": "1"}], "row 0 .* empty question"),
        ([{"id": "x", "problem": "a", "answer": "1"}] * 2, "id 'x' is in rows 0 and 1"),
        ([{"problem": "a", "answer": "1", "answer_type": "letter"}], "answer_type 'letter'"),
        ([{"problem": "a", "answer": "1", "tolerance": "-1"}], "row 0: tolerance '-1'; it must be"),
        ([{"problem": "a", "answer": "1", "tolerance": "wide"}], "row 0: tolerance 'wide'; it must be"),
    ],
)
def test_bad_files_name_the_row(tmp_path: Path, records: list[dict], message: str) -> None:
    path = _jsonl(tmp_path / "b.jsonl", *records)
    with pytest.raises(InputError, match=message):
        load_benchmark(_benchmark("benchmark=file", f"benchmark.path={path}"))


def test_a_missing_file_and_no_file_name_the_override() -> None:
    with pytest.raises(InputError, match="nowhere.jsonl does not exist; give benchmark.path="):
        load_benchmark(_benchmark("benchmark=gsm8k", "benchmark.path=nowhere.jsonl"))
    with pytest.raises(InputError, match="benchmark=file has no file; give benchmark.path="):
        load_benchmark(_benchmark("benchmark=file"))


def test_hub_failure_names_the_override(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    config = _benchmark("benchmark=gsm8k", "benchmark.hub.name=no-such-owner/no-such-set")
    with pytest.raises(InputError, match="cannot load no-such-owner/no-such-set .*benchmark.path=FILE"):
        load_benchmark(config)


def test_models_on_the_command_line() -> None:
    assert parse_models("a/b") == ["a/b"]
    assert parse_models("[a/b, 'c']") == ["a/b", "c"]
    assert list(compose_evaluate(["model=[x,y]", "n=4"]).models) == ["x", "y"]
    for wrong in ("", "[a,]", "[a,a]"):
        with pytest.raises(InputError, match="model="):
            parse_models(wrong)
    with pytest.raises(InputError, match="no model was given"):
        compose_evaluate(["benchmark=arithmetic"])
    with pytest.raises(InputError, match="max_tokens"):
        compose_evaluate(["model=x", "max_token=5"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("n=0", "n=0; it must be"),
        ("top_p=0", "top_p=0; it must be above 0"),
        ("temperature=0", "the same text 16 times"),
        ("limit=0", "limit=0"),
        ("prompt=shout", "no prompt 'shout'"),
        ("model=no/such/model", "no/such/model"),
    ],
)
def test_bad_options_are_found_before_a_model_is_loaded(tmp_path: Path, override: str, message: str) -> None:
    argv = ["model=no-model", "benchmark=arithmetic", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(InputError, match=message):
        evaluate(compose_evaluate([*argv, override]))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_another_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"n": 3}))
    with pytest.raises(InputError, match="another configuration .*n.* overwrite=true"):
        evaluate(compose_evaluate(["model=m", "benchmark=arithmetic", f"output_dir={tmp_path}"]))


def test_seeds_depend_on_what_a_sample_is_alone() -> None:
    seeds = {sample_seed(run, problem, i) for run in (0, 1) for problem in ("a", "b") for i in range(16)}
    assert len(seeds) == 64 and all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, "2", 3) == 4522555310588127465  # fixed for ever: stored samples name their seed
    assert sample_seed(1, "11", 1) != sample_seed(1, "1", 11)


def test_output_folders_are_named_after_model_and_benchmark() -> None:
    assert default_output_dir("runs/dft/model", "gsm8k") == "runs/evaluate/dft-model/gsm8k"
    assert default_output_dir("Qwen/Q", "gsm8k") == "runs/evaluate/Qwen-Q/gsm8k"


def test_table_and_warnings() -> None:
    result = {
        "model": "m", "benchmark": "b", "n": 4, "num_problems": 3, "avg": 0.5, "avg_ci95": (0.25, 0.75),
        "pass_at_k": {"4": 1.0}, "no_answer_frac": 0.05, "truncated_frac": 0.0501, "num_context_limited": 2,
        "max_tokens": 9, "engine": {"max_model_len": 64}, "verdicts": {"timeout": 1, "error": 0},
    }  # fmt: skip
    lines = format_table([result]).splitlines()
    assert lines[0].split()[:4] == ["model", "benchmark", "problems", "avg@4"]
    assert lines[2].split() == ["m", "b", "3", "50.0", "25.0", "to", "75.0", "100.0", "5.0%", "5.0%"]
    found = warnings(result)
    assert len(found) == 3 and "cut off" in found[0] and "2 of 3 prompts" in found[1] and "timeout" in found[2]
    assert not warnings(
        result | {"truncated_frac": 0, "num_context_limited": 0, "verdicts": {"timeout": 0, "error": 0}}
    )
