"""Reports: no number replaces another silently, no average is over less, nothing is read or written elsewhere."""

import json
from pathlib import Path

import pytest
from test_report_runs import Made, result, with_everything

from verl_dft.cli import main as cli
from verl_dft.files import write_json
from verl_dft.report.beside import Limits
from verl_dft.report.command import read_pages
from verl_dft.report.differences import pairs
from verl_dft.report.expected import load_expected
from verl_dft.report.measured import collect
from verl_dft.report.parts import Heading, Picture, Shown, Text, to_markdown
from verl_dft.report.recipe_page import page_of
from verl_dft.report.results import entry_of
from verl_dft.report.runs import read_run
from verl_dft.report.tables import Table


def score(made: Made, step: str, value: float, **arm: str) -> None:
    about = {"by_origin": {"all": {"problems": 9, "kl_model_reference": {"mean": value, "se": 0.1}}}}
    made.step("-".join([step, *arm.values()]), "score", {"statistics.json": about}, arm)


# ---- what a number is called ----


def test_scores_of_several_texts_and_steps_do_not_replace_each_other(tmp_path: Path) -> None:
    """As study/claims and gft/fig5 have them: arms that are models and steps of a training, not methods."""
    made = Made(tmp_path / "out", scale="tiny")
    score(made, "expert_texts", 1, scored="sft", seed="1")
    score(made, "own_texts", 2, scored="sft", seed="1")
    score(made, "score_sft", 3, at="75")
    score(made, "score_grpo", 4, at="75")
    score(made, "score_gft", 5, method="gft", at="8")
    run = read_run(made.write())
    found = {(method, *seeds): columns["kl"].value for (_, method), seeds in collect(run)["kl"].items()
             for columns in seeds.values()}  # fmt: skip
    assert found == {("expert_texts-sft", "1"): 1, ("own_texts-sft", "1"): 2, ("sft-75", ""): 3, ("grpo-75", ""): 4,
                     ("gft-8", ""): 5}  # fmt: skip
    assert not run.problems


def test_a_second_number_of_the_same_is_a_line_and_the_first_stands(tmp_path: Path) -> None:
    made = Made(tmp_path / "out", scale="tiny")
    made.evaluate("sft", result("arithmetic", [1, 3]))
    made.evaluate("sft", result("arithmetic", [4, 4]), name="again")
    made.evaluate("sft", result("math500", [4, 4]), name="another")
    run = read_run(made.write())
    columns = collect(run)["evaluation"]["m-7b", "sft"][""]
    assert {name: number.value for name, number in columns.items()} == {"arithmetic": 50, "math500": 100}
    assert run.problems == [
        "again-sft-None: its arithmetic of m-7b, sft (evaluation) is left out, for evaluate-sft-None has one too; "
        "give the steps or their arms other names"
    ]


# ---- averages and differences ----


def test_an_average_is_over_all_benchmarks_of_the_run(tmp_path: Path) -> None:
    made = Made(tmp_path / "out", recipe="mine", scale="tiny", recipe_path=str(tmp_path / "mine.yaml"))
    made.evaluate("sft", result("math500", [1, 1]), result("aime24", [0, 0]))
    made.evaluate("dft", result("math500", [3, 3]))
    page = page_of(read_run(made.write()), Limits(), 0)
    (table,) = [part.table for part in page.parts if isinstance(part, Shown) and "avg" in part.table.header]
    assert {row[1]: row[table.header.index("avg")].split()[0] for row in table.rows} == {"sft": "12.5", "dft": "–"}
    averages = [(one["method"], one["value"]) for one in entry_of(page)["results"] if one["column"] == "avg"]
    assert averages == [("sft", 12.5)]


def test_a_difference_of_averages_over_less_is_not_compared(tmp_path: Path) -> None:
    made = Made(tmp_path / "out")
    made.evaluate("base", result("math500", [2, 2]))
    made.evaluate("sft", result("math500", [2, 3]))
    run = read_run(made.write())
    block = load_expected(tmp_path / "recipes").block("table1")
    found = {pair.column: pair for pair in pairs(run, block, collect(run), Limits()) if pair.method == "sft"}
    assert found["math500"].ours is not None and found["avg"].ours is None
    assert (found["avg"].status, found["avg"].why) == ("not run", "not of all benchmarks")


LOGP = """
paper: p
title: A paper
arxiv: "1"
blocks:
  table1:
    source: Table 1
    metric: average log-prob
    unit: nats
    columns: [self]
    values: {m-7b: {sft: [-184.0], rewriting: [-83.0]}, m-8b: {sft: [-193.0], rewriting: [-127.0]}}
"""


def test_differences_of_log_probs_at_the_papers_scale_are_shown_and_not_compared(tmp_path: Path) -> None:
    made = Made(tmp_path / "out")
    (tmp_path / "recipes" / "expected.yaml").write_text(LOGP)
    about = {name: {"problems": 9, "sequence_sum": {"mean": value, "se": 1.0}}
             for name, value in (("expert", -50), ("rewritten", -20), ("difference", 30))}  # fmt: skip
    made.step("score-m-7b", "score", {"statistics.json": {"by_stage": {"self": about}, "by_origin": {"all": {}}}},
              {"model": "m-7b"})  # fmt: skip
    run = read_run(made.write())
    block = load_expected(tmp_path / "recipes").block("table1")
    found = {pair.model: pair for pair in pairs(run, block, collect(run), Limits())}
    ours = found["m-7b"].ours
    assert (ours.value, ours.low) == (30, pytest.approx(30 - 2.306004)) and found["m-7b"].stated == (101,)
    assert found["m-7b"].status == "not comparable" and "raw text" in found["m-7b"].why
    assert (found["m-8b"].status, found["m-8b"].ours) == ("not run", None)


# ---- files ----


@pytest.mark.parametrize("name", ["dynamics.md", "math500/samples.parquet"])
def test_a_page_or_samples_that_were_changed_are_a_line(tmp_path: Path, name: str) -> None:
    made = Made(tmp_path / "out")
    verb = "analyze dynamics" if name.endswith(".md") else "evaluate"
    folder = made.step("one", verb, {name: b"as written"})
    (folder / name).write_bytes(b"other bytes")
    (problem,) = read_run(made.write()).problems
    assert problem.startswith("one: ") and problem.endswith(
        f"{name} is not the file that the step wrote: its hash has changed"
    )


@pytest.mark.parametrize("captions", ["text", ["a", "b"], 3])
def test_captions_that_are_none_are_a_line(tmp_path: Path, captions: object) -> None:
    made = with_everything(tmp_path)
    write_json(made.root / "analyze" / "curves0" / "dynamics.parquet.manifest.json", {"captions": captions})
    problems = page_of(read_run(made.folder), Limits(), 0).run.problems
    assert problems == ["curves: analyze/curves0/dynamics.parquet.manifest.json is damaged"]


def test_names_of_a_run_stay_in_the_reports_folder(tmp_path: Path) -> None:
    made = with_everything(tmp_path)
    path = made.folder / "run.json"
    content = json.loads(path.read_text())
    content["steps"][-1]["name"] = "x/../../../../y) [z"
    path.write_text(json.dumps(content | {"recipe": "p/../../table1"}))
    assert cli(["report", str(made.root), f"output_dir={tmp_path}/a/b/report"]) == 0
    report = tmp_path / "a" / "b" / "report"
    assert [path.name for path in (tmp_path / "a").rglob("*.png")] == [
        "p-..-..-table1-paper-x-..-..-..-..-y-z-loss.png"
    ]
    assert (report / "p-..-..-table1-paper.md").is_file() and [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize(
    "changed",
    [{"folder": "../else"}, {"folder": "/else"}, {"record": "steps/../../x.json"}, {"results": ["../result.json"]}],
)
def test_steps_that_lie_elsewhere_are_refused(tmp_path: Path, changed: dict) -> None:
    made = Made(tmp_path / "out")
    made.evaluate("sft", result("math500", [2, 2]))
    made.steps[-1] |= changed
    page = page_of(read_run(made.write()), Limits(), 2)
    (problem,) = page.run.problems
    assert problem.startswith("evaluate-sft-None: ") and "is not below the output folder" in problem
    assert not page.measured["evaluation"]


def test_recipes_whose_names_differ_in_a_slash_are_two_files(tmp_path: Path) -> None:
    made = [Made(tmp_path / "out", recipe=recipe, scale="tiny", recipe_path="") for recipe in ("dft-one", "dft/one")]
    for one in made:
        one.write()
    pages, _ = read_pages([str(made[0].root)], Limits(), 0)
    assert [(page.run.name, page.run.slug) for page in pages] == [
        ("dft-one at scale=tiny", "dft-one-tiny"), ("dft/one at scale=tiny", "dft-one-tiny--2"),
    ]  # fmt: skip


def test_a_configuration_of_ones_own_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(Made(tmp_path / "out").write())
    for words in (["--config-name", "none"], ["--config-name=none"]):
        assert cli(["report", run, *words]) == 2
        error = capsys.readouterr().err
        assert "none" in error and "does not exist; give a run" not in error
    assert cli(["report", *["--config-name", "report"], run, f"output_dir={tmp_path}/report"]) == 0


def test_text_is_no_image_or_link_in_markdown(tmp_path: Path) -> None:
    evil = "![](http://example.org/x.png) [a](http://example.org)"
    parts = [Heading(evil), Text(evil), Text(evil, "problem"), Shown(Table(["a", evil], [[evil, "x"]])),
             Picture(tmp_path / "x.png", "x.png", evil)]  # fmt: skip
    markdown = to_markdown(parts, "figures")
    assert "![](" not in markdown and "[a](" not in markdown
    assert markdown.count("](") == markdown.count("\\](") + 1 and markdown.count("](figures/x.png)") == 1
