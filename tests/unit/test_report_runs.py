"""Reports of recipe runs: statuses by closed form, incomplete runs, escaping, the same bytes, what is recorded."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from html_helpers import Tags

from verl_dft.cli import main as cli
from verl_dft.errors import InputError
from verl_dft.files import sha256_file, write_json
from verl_dft.recipes.load import load_recipe
from verl_dft.recipes.record import recipe_hash
from verl_dft.report.beside import Limits, allowance, cells
from verl_dft.report.differences import Pair, pairs
from verl_dft.report.expected import load_expected
from verl_dft.report.measured import collect
from verl_dft.report.numbers import accuracy, number_of, paired
from verl_dft.report.recipe_page import page_of
from verl_dft.report.results import entry_of, read_results, record, results_table, status_table
from verl_dft.report.runs import find_runs, read_run

PNG = b"\x89PNG\r\n\x1a\n" + bytes(16)
EXPECTED = """
paper: p
title: A paper
arxiv: "1"
blocks:
  table1:
    source: Table 1
    metric: avg@4
    unit: "%"
    columns: [math500, aime24, avg]
    values:
      m-7b: {base: [50.0, 10.0, 30.0], sft: [60.0, null, 40.0], dft: [70.0, 20.0, 45.0]}
    empty: a cell is missing
    differences:
      - {model: m-7b, method: sft, against: base, column: avg, value: 10.0}
      - {model: m-7b, method: sft, against: base, column: math500, value: 10.0}
      - {model: m-7b, method: dft, against: sft, column: avg, value: 5.0}
    statements: [{what: steps, value: 120}]
"""


def result(benchmark: str, counts: list[int], n: int = 4, **more: object) -> dict:
    problems = [{"id": f"p{i}", "level": None, "num_correct": c, "avg": c / n} for i, c in enumerate(counts)]
    return {"model": "m", "benchmark": benchmark, "n": n, "limit": None, "num_problems": len(counts),
            "num_samples": n * len(counts), "std_over_runs": 0.0, "per_problem": problems, **more}  # fmt: skip


class Made:
    """A run as the runner leaves it: step folders, records, run.json."""

    def __init__(self, root: Path, recipe: str = "p/table1", scale: str = "paper", **facts: object) -> None:
        self.root, self.steps = root, []
        self.folder = root / "by_name" / recipe / scale
        recipes = root.parent / "recipes"
        recipes.mkdir(exist_ok=True)
        (recipes / "expected.yaml").write_text(EXPECTED)
        (recipes / "table1.yaml").write_text("steps: {}")
        path = recipes / "table1.yaml"
        self.facts = {"recipe": recipe, "recipe_path": str(path), "recipe_sha256": sha256_file(path), "scale": scale,
                      "title": "a test", "source": "nowhere", "changed": {}, "keep": {}, **facts}  # fmt: skip

    def step(
        self, name: str, verb: str, files: dict[str, object], arm: dict | None = None, state: str = "done"
    ) -> Path:
        folder = self.root / verb.split()[0] / f"{name}0"
        folder.mkdir(parents=True)
        for file, content in files.items():
            path = folder / file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content) if isinstance(content, bytes) else write_json(path, content)
        outputs = {str(folder / file): sha256_file(folder / file) for file in files}
        step_id = f"{verb.split()[0]}-{folder.name}"
        write_json(self.root / "steps" / f"{step_id}.json", {
            "status": state, "command": f"verl-dft {verb}", "seconds": 2.5, "outputs": outputs, "inputs": {},
            "code": "c0de" * 16,
            "made": {"at": "2026-11-21T10:00:00Z", "commit": "abc", "hardware": "a machine", "versions": {"verl": "1"}},
        })  # fmt: skip
        self.steps.append({
            "name": name, "step": name.partition("-")[0], "verb": verb, "arm": arm or {}, "needs": [],
            "folder": f"{verb.split()[0]}/{folder.name}", "record": f"steps/{step_id}.json", "seeds": {"seed": 1},
            "results": [str((folder / file).relative_to(self.root)) for file in files if file.endswith("result.json")],
        })  # fmt: skip
        return folder

    def evaluate(self, method: str, *results: dict, seed: int | None = None, name: str = "evaluate") -> Path:
        arm = {"model": "m-7b", "method": method} | ({"seed": str(seed)} if seed is not None else {})
        files = {f"{one['benchmark']}/result.json": one for one in results}
        return self.step(f"{name}-{method}-{seed}", "evaluate", files, arm)

    def write(self) -> Path:
        write_json(self.folder / "run.json", {**self.facts, "steps": self.steps})
        return self.folder


def found(made: Made, limits: Limits | None = None) -> dict[tuple[str, str], tuple[str, float | None]]:
    run = read_run(made.write())
    block = load_expected(made.root.parent / "recipes").block("table1")
    every = cells(run, block, collect(run), limits or Limits())
    return {(cell.method, cell.column): (cell.status, cell.allowed) for cell in every}


# ---- statuses ----


def test_statuses_by_hand(tmp_path: Path) -> None:
    """math500 of base: 2 of 4 and 2 of 4 are 50, the paper's; sft's 75 is 15 off; nothing of dft ran."""
    made = Made(tmp_path / "out")
    made.evaluate("base", result("math500", [2, 2]), result("aime24", [0, 1]))
    made.evaluate("sft", result("math500", [3, 3]), result("aime24", [1, 1]))
    assert found(made) == {
        ("base", "math500"): ("reproduced", 2.0),
        ("base", "aime24"): ("off", 2.0),  # 12.5 against 10, of which a fifth is 2
        ("base", "avg"): ("reproduced", 2.0),  # 31.25 against 30
        ("sft", "math500"): ("off", 2.0),
        ("sft", "aime24"): ("no number stated", None),
        ("sft", "avg"): ("off", 2.0),
        ("dft", "math500"): ("not run", None),
        ("dft", "aime24"): ("not run", None),
        ("dft", "avg"): ("not run", None),
    }
    assert found(made, Limits(points=1.0))["base", "avg"] == ("off", 1.0)
    assert found(made, Limits(points=2.5))["base", "aime24"] == ("off", 2.0)


def test_of_a_low_value_a_fifth_is_allowed() -> None:
    number = accuracy(result("aime24", [0, 0]), "step")
    assert allowance(1.5, number, "%", Limits()) == pytest.approx(0.3)
    assert allowance(0.0, number, "%", Limits()) == 0 and allowance(60.0, number, "%", Limits()) == 2.0
    assert allowance(-300.0, number, "nats", Limits(share=0.1)) == pytest.approx(30)


def test_what_sampling_alone_changes_is_allowed() -> None:
    """Two means of n runs differ by less than t(n - 1) s sqrt(2 / n), 95% of the time, s the deviation of one side."""
    number = accuracy(result("aime24", [1, 1], n=4) | {"std_over_runs": 0.1}, "step")
    assert number.noise == pytest.approx(100 * 3.182446 * 0.1 * math.sqrt(2 / 4))
    assert accuracy(result("aime24", [1, 1]) | {"std_over_runs": None}, "step").noise is None


def test_noise_widens_what_is_allowed(tmp_path: Path) -> None:
    made = Made(tmp_path / "out")
    made.evaluate("base", result("math500", [2, 2]), result("aime24", [0, 1], std_over_runs=0.1))
    status, allowed = found(made)["base", "aime24"]
    assert status == "reproduced" and allowed == pytest.approx(22.5, abs=0.01)


@pytest.mark.parametrize(
    ("facts", "more", "why"),
    [
        ({"changed": {"verbs.train.optim.lr": 1e-3}}, {}, "other settings: verbs.train.optim.lr"),
        ({"changed": {"models.m-7b.path": "other/m-7b-instruct"}}, {}, "another model: other/m-7b-instruct"),
        ({}, {"limit": 2}, "a part of the benchmark: limit=2"),
        ({}, {"n": 2}, "avg@2 here, avg@4 there"),
    ],
)
def test_what_is_not_the_papers_is_not_compared(tmp_path: Path, facts: dict, more: dict, why: str) -> None:
    made = Made(tmp_path / "out", **facts)
    made.evaluate("base", result("math500", [1, 1], **more))
    run = read_run(made.write())
    block = load_expected(tmp_path / "recipes").block("table1")
    (cell, *_) = cells(run, block, collect(run), Limits())
    assert (cell.status, cell.why, cell.difference) == ("not comparable", why, None)


def test_a_folder_of_the_papers_model_and_more_gpus_are_no_other_setting(tmp_path: Path) -> None:
    changed = {"models.m-7b.path": "/models/M-7B", "verbs.train.trainer.n_gpus_per_node": 4}
    made = Made(tmp_path / "out", changed=changed)
    made.evaluate("base", result("math500", [2, 2]))
    assert found(made)["base", "math500"][0] == "reproduced"


def test_an_average_over_other_benchmarks_is_none(tmp_path: Path) -> None:
    made = Made(tmp_path / "out")
    made.evaluate("base", result("math500", [2, 2]))
    assert found(made)["base", "avg"] == ("not run", None)


def test_at_another_scale_every_cell_is_not_run(tmp_path: Path) -> None:
    made = Made(tmp_path / "out", scale="tiny")
    made.evaluate("base", result("math500", [2, 2]))  # even under the paper's own names
    assert {status for status, _ in found(made).values()} == {"not run", "no number stated"}


# ---- differences ----


def one_pair(found_pairs: list[Pair]) -> Pair:
    return next(pair for pair in found_pairs if (pair.method, pair.against, pair.column) == ("sft", "base", "math500"))


def test_directions_at_another_scale(tmp_path: Path) -> None:
    """sft - base is -25 at every problem but one; dft - sft has no spread, so nothing is known of it."""
    made = Made(tmp_path / "out", scale="tiny")
    made.evaluate("base", result("arithmetic", [3, 3, 3, 4]))
    made.evaluate("sft", result("arithmetic", [2, 2, 2, 2]))
    made.evaluate("dft", result("arithmetic", [3, 3, 3, 3]))
    run = read_run(made.write())
    block = load_expected(tmp_path / "recipes").block("table1")
    directions = {(pair.method, pair.against): pair for pair in pairs(run, block, collect(run), Limits())}
    first = directions["sft", "base"]
    assert first.status == "other direction" and first.stated == (10.0,) and not first.derived
    assert first.ours.value == -31.25 and first.ours.high < 0
    assert directions["dft", "sft"].status == "undecided" and directions["dft", "sft"].ours.low is None
    assert directions["dft", "base"].derived and directions["dft", "base"].stated == (15.0,)


def test_stated_differences_at_the_papers_scale(tmp_path: Path) -> None:
    made = Made(tmp_path / "out")
    made.evaluate("base", result("math500", [2, 2]), result("aime24", [1, 1]))
    made.evaluate("sft", result("math500", [2, 3]), result("aime24", [1, 1]))
    run = read_run(made.write())
    block = load_expected(tmp_path / "recipes").block("table1")
    by_column = {(pair.method, pair.against, pair.column): pair for pair in pairs(run, block, collect(run), Limits())}
    assert by_column["sft", "base", "math500"].ours.value == 12.5  # paired by problem; the paper has 10
    assert by_column["sft", "base", "math500"].status == "off"
    assert by_column["sft", "base", "avg"].ours.value == 6.25
    assert by_column["dft", "sft", "avg"].status == "not run"


def test_a_difference_of_the_other_sign_is_off_however_near(tmp_path: Path) -> None:
    """The paper has +1; ours is -0.625 with an interval below 0: nearer than 2 points, yet of the other sign."""
    made = Made(tmp_path / "out")
    recipes = tmp_path / "recipes" / "expected.yaml"
    recipes.write_text(
        EXPECTED.replace("sft: [60.0,", "sft: [51.0,").replace("math500, value: 10.0", "math500, value: 1.0")
    )
    made.evaluate("base", result("math500", [80] * 16, n=160))
    made.evaluate("sft", result("math500", [78, 80] * 8, n=160))
    run = read_run(made.write())
    block = load_expected(recipes).block("table1")
    pair = one_pair(pairs(run, block, collect(run), Limits()))
    assert pair.ours.value == pytest.approx(-0.625) and pair.ours.high < 0
    assert pair.allowed == 2.0 and pair.status == "not comparable"  # 160 samples here, 4 there
    block = replace(block, metric="avg@160")
    pair = one_pair(pairs(run, block, collect(run), Limits()))
    assert pair.status == "off"


def test_seeds_are_repetitions(tmp_path: Path) -> None:
    """Averages 50 and 75 of two seeds: mean 62.5; differences to the base 25 and 25."""
    made = Made(tmp_path / "out", scale="tiny")
    for seed, (low, high) in enumerate([(1, 2), (2, 3)]):
        made.evaluate("base", result("arithmetic", [low, low]), seed=seed)
        made.evaluate("sft", result("arithmetic", [high, high]), seed=seed)
    arms = collect(read_run(made.write()))["evaluation"]
    number = number_of(arms["m-7b", "sft"], "avg")
    assert number.value == 62.5 and number.over == "2 seeds"
    assert number.high - number.value == pytest.approx(12.7062 * 12.5, rel=1e-4)  # t(.975; 1) s / sqrt(2)
    difference, why = paired(arms["m-7b", "sft"], arms["m-7b", "base"], "avg")
    assert difference.value == 25 and difference.over == "2 seeds" and not why


def test_different_problems_are_not_subtracted(tmp_path: Path) -> None:
    made = Made(tmp_path / "out", scale="tiny")
    made.evaluate("base", result("arithmetic", [1, 2, 3]))
    made.evaluate("sft", result("arithmetic", [1, 2]))
    arms = collect(read_run(made.write()))["evaluation"]
    assert paired(arms["m-7b", "sft"], arms["m-7b", "base"], "avg") == (None, "not of the same problems")


# ---- other measurements ----


def test_stages_log_probs_and_trainings(tmp_path: Path) -> None:
    made = Made(tmp_path / "out", scale="tiny")
    stages = {name: {"count": count} for name, count in (("self", 5), ("guided", 2), ("fallback", 1), ("total", 8))}
    made.step("rewritten-m", "rewrite", {"statistics.json": {"table1": stages}}, {"model": "m"})
    about = {"problems": 9, "sequence_sum": {"mean": -2.0, "se": 0.5}}
    by_stage = {"self": {"expert": about, "rewritten": about, "difference": about}, "expert": {"expert": about}}
    scored = {
        "by_stage": by_stage,
        "by_origin": {"all": {"problems": 9, "kl_model_reference": {"mean": 0.25, "se": 0}}},
    }
    made.step("score-m", "score", {"statistics.json": scored}, {"model": "m"})
    rows = {"problems": 9, "per_token": {"mean": -1.5, "se": 0.1}}
    made.step("score_base", "score", {"statistics.json": {"by_origin": {"all": rows}}})
    lines = b'{"step": 1, "train/rectified_frac": 0.5}\n{"step": 2, "train/loss": 3, "train/rectified_frac": 0.25}\n'
    made.step("gft-tau", "train", {"metrics.jsonl": lines}, {"model": "m", "method": "tau_0.7"})
    run = read_run(made.write())
    measured = collect(run)
    assert not run.problems
    counts = {column: number.value for column, number in measured["stages"]["m", "rewriting"][""].items()}
    assert counts == {"self": 5, "guided": 2, "expert": 1, "total": 8}
    assert measured["logp"]["m", "sft"][""]["self"].low == pytest.approx(-2 - 2.306004 * 0.5)
    assert set(measured["logp"]["m", "rewriting"][""]) == {"self"}
    assert measured["scored"]["", "base"][""]["all"].value == -1.5
    assert measured["kl"]["m", "score"][""]["kl"].value == 0.25
    assert measured["training"]["m", "tau_0.7"][""]["rectified_frac"].value == 37.5
    assert measured["training"]["m", "tau_0.7"][""]["loss"].value == 3


# ---- runs that are incomplete ----


def test_what_is_missing_is_one_line_each_and_the_rest_is_reported(tmp_path: Path) -> None:
    made = Made(tmp_path / "out")
    made.evaluate("base", result("math500", [2, 2]))
    changed = made.evaluate("sft", result("math500", [2, 2]))
    write_json(changed / "math500" / "result.json", result("math500", [4, 4]))
    gone = made.evaluate("dft", result("math500", [2, 2]))
    (gone / "math500" / "result.json").unlink()
    made.step("half", "train", {}, state="started")
    made.step("bad", "rewrite", {"statistics.json": {"table1": {}}})
    made.steps.append({"name": "later", "step": "later", "verb": "rl", "folder": "rl/0"})
    (made.root / "steps" / "rl-0.json").write_text("{")
    page = page_of(read_run(made.write()), Limits(), 0)
    assert len(page.run.problems) == 5 and not any("\n" in line for line in page.run.problems)
    expected = {
        "evaluate-sft-None": "hash has changed", "evaluate-dft-None": "is missing", "half": "started, not finished",
        "bad": "not as verl-dft rewrite writes them", "later": "is damaged",
    }  # fmt: skip
    for name, why in expected.items():
        assert any(line.startswith(f"{name}: ") and why in line for line in page.run.problems), name
    assert page.counts["reproduced"] == 1 and page.counts["off"] == 0


def test_folders_that_were_moved(tmp_path: Path) -> None:
    made = Made(tmp_path / "out")
    made.evaluate("base", result("math500", [2, 2]))
    made.write()
    made.root.rename(tmp_path / "elsewhere")
    run = read_run(tmp_path / "elsewhere" / "by_name" / "p" / "table1" / "paper")
    assert [step.state for step in run.steps] == ["done"] and not run.problems


def test_runs_are_found_and_damaged_ones_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Made(tmp_path / "out")
    made.evaluate("base", result("math500", [2, 2]))
    folder = made.write()
    assert find_runs([folder]) == find_runs([folder / "run.json"]) == find_runs([made.root]) == [folder]
    for wrong in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="does not exist|holds no run.json"):
            find_runs([wrong])
    other = made.root / "by_name" / "p" / "table2" / "paper"
    other.mkdir(parents=True)
    (other / "run.json").write_text('{"recipe": "p/table2"}')
    assert cli(["report", str(made.root), f"output_dir={tmp_path}/report"]) == 0
    assert "run.json is damaged (KeyError: 'scale')" in capsys.readouterr().out
    assert cli(["report", str(other), f"output_dir={tmp_path}/report"]) == 2


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Made(tmp_path / "out").write()
    for arguments, message in (
        ([], "needs a run"),
        ([str(folder), "tolerence=1"], "no key 'tolerence' (did you mean tolerance"),
        ([str(folder), "tolerance=-1"], "tolerance=-1 must be a number of at least 0"),
        ([str(folder), "samples=x"], "samples=x must be a whole number"),
        ([str(tmp_path / "nowhere")], "does not exist"),
    ):
        assert cli(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


# ---- the page ----


EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'


def with_everything(tmp_path: Path) -> Made:
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = Made(tmp_path / "out", title=EVIL, source=EVIL, changed={EVIL: EVIL})
    folder = made.evaluate("sft", result("math500", [2, 2]))
    made.evaluate(EVIL, result("math500", [1, 2]), name="other")
    sample = {"problem_id": EVIL, "index": 0, "grade": "wrong", "gold": EVIL, "response": EVIL}
    pq.write_table(pa.Table.from_pylist([sample]), folder / "math500" / "samples.parquet")
    drawn = made.step("curves", "analyze dynamics", {"dynamics.md": EVIL.encode()})
    (drawn / "loss.png").write_bytes(PNG)
    write_json(drawn / "dynamics.parquet.manifest.json", {
        "captions": {"loss": EVIL}, "figures": {"loss.png": sha256_file(drawn / "loss.png")},
    })  # fmt: skip
    made.write()
    return made


def test_the_page_stands_alone_and_whatever_it_shows_is_text(tmp_path: Path) -> None:
    made = with_everything(tmp_path)
    assert cli(["report", str(made.root), f"output_dir={tmp_path}/report"]) == 0
    page = Tags((tmp_path / "report" / "index.html").read_text())
    assert "script" not in [tag for tag, _ in page.tags] and page.text.count(EVIL) > 5
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object") and not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 1 and images[0]["alt"] == EVIL
    assert ("meta", {"name": "viewport", "content": "width=device-width,initial-scale=1"}) in page.tags
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {attributes["href"][1:] for _, attributes in page.tags if "href" in attributes} <= anchors
    markdown = (tmp_path / "report" / "p-table1-paper.md").read_text()
    figure = markdown.partition("](figures/")[2].partition(")")[0]
    assert (tmp_path / "report" / "figures" / figure).read_bytes() == PNG
    outside_code = "".join(markdown.split("```")[::2])
    assert "<script" not in outside_code.replace("\\<script", "")


def test_a_figure_that_is_not_what_was_drawn_is_a_line(tmp_path: Path) -> None:
    made = with_everything(tmp_path)
    (made.root / "analyze" / "curves0" / "loss.png").write_bytes(PNG + b"x")
    page = page_of(read_run(made.folder), Limits(), 0)
    assert "curves: loss.png is not the figure that the step drew" in page.run.problems


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    made = with_everything(tmp_path)
    texts = []
    for _ in range(2):
        assert cli(["report", str(made.root), f"output_dir={tmp_path}/report"]) == 0
        files = sorted(path for path in (tmp_path / "report").rglob("*") if path.is_file())
        written = json.loads((tmp_path / "report" / "report.json").read_text())["written"]
        texts.append({path.name: path.read_bytes().replace(written.split(" by ")[0].encode(), b"") for path in files})
    assert texts[0] == texts[1] and len(texts[0]) == 5


def test_two_runs_of_one_recipe_are_two_parts(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with_everything(tmp_path / name)
    assert cli(["report", f"{tmp_path}/a/out", f"{tmp_path}/b/out", f"output_dir={tmp_path}/report"]) == 0
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"p-table1-paper.md", "p-table1-paper--2.md"} < names and len(
        list((tmp_path / "report/figures").iterdir())
    ) == 2


def test_a_recipe_without_a_paper_reports_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Made(tmp_path / "out", recipe="mine", scale="tiny", recipe_path=str(tmp_path / "mine.yaml"))
    made.evaluate("sft", result("math500", [1, 3]))
    made.write()
    assert cli(["report", str(made.root), f"output_dir={tmp_path}/report"]) == 0
    text = (tmp_path / "report" / "mine-tiny.md").read_text()
    assert "what follows is ours alone" in text and "| m-7b | sft | 50.0 (0.0 to 100.0) | evaluate-sft-None |" in text


# ---- recipes/results.json ----


def test_finished_runs_are_recorded_and_nothing_else_is_said_to_have_run(tmp_path: Path) -> None:
    recipe = load_recipe("dft/table1")
    facts = {"recipe_path": str(recipe.path), "recipe_hash": recipe_hash(recipe, "tiny")}
    made = Made(tmp_path / "out", recipe="dft/table1", scale="tiny", **facts)
    made.evaluate("sft", result("arithmetic", [1, 3]))
    path = tmp_path / "results.json"
    page = page_of(read_run(made.write()), Limits(), 0)
    assert record(path, [page]) == []
    entries = read_results(path)
    entry = entries["dft/table1"]["tiny"]
    assert (entry["steps"], entry["seconds"], entry["finished"]) == (1, 2.5, "2026-11-21T10:00:00Z")
    assert [(one["method"], one["value"], one["interval"]) for one in entry["results"]] == [("sft", 50.0, [0.0, 100.0])]
    del made.facts["recipe_hash"]  # of a run from before it was kept
    entries["dft/table1"]["laptop"] = entry_of(page_of(read_run(made.write()), Limits(), 0))
    rows = {row[0]: row[3:] for row in status_table(entries).rows}
    ran = "ran in 2 s, 1 step, 2026-11-21 (a)"
    expected = [ran, f"{ran}; of an earlier version of the recipe", "not run"]
    assert rows.pop("[`dft/table1`](dft/table1.yaml)") == expected
    assert rows and all(cells == ["not run"] * 3 for cells in rows.values())
    assert {row[3] for row in results_table(entries).rows} == {"sft 50.0 (0.0 to 100.0)"}


def test_an_incomplete_or_foreign_run_is_not_recorded(tmp_path: Path) -> None:
    made = Made(tmp_path / "out", recipe="dft/table1", scale="tiny")
    made.step("half", "train", {}, state="started")
    (tmp_path / "more").mkdir()
    foreign = Made(tmp_path / "more" / "out", recipe="mine", scale="tiny")
    foreign.evaluate("sft", result("arithmetic", [1, 3]))
    pages = [page_of(read_run(one.write()), Limits(), 0) for one in (made, foreign)]
    left = record(tmp_path / "results.json", pages)
    assert "half: started, not finished" in left[0] and "not one of the shipped recipes" in left[1]
    assert read_results(tmp_path / "results.json") == {}


def test_a_damaged_results_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"dft/table1": {"tiny": {"seconds": 1}}}')
    with pytest.raises(InputError, match="not an entry"):
        read_results(tmp_path / "results.json")
