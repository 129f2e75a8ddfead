"""``verl-dft rewrite`` with a script in the model's place: what it writes, refuses, resumes and plans."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from store_helpers import PLACES, killed

from verl_dft.build.rewrite import NO_SOLUTION
from verl_dft.build.rewrite_command import main, plan, rewrite_options, run
from verl_dft.build.rewrite_gold import EMPTY, UNPARSED, UNREADABLE, unusable_golds
from verl_dft.build.rewrite_statistics import markdown
from verl_dft.data.prompts import PROMPTS, find_prompt
from verl_dft.data.records import Problem, read_rows
from verl_dft.errors import InputError
from verl_dft.paths import recipes_dir
from verl_dft.sampling.configure import compose_sampling, plain
from verl_dft.sampling.engine import GeneratedText, SampleRequest
from verl_dft.sampling.record import read_samples
from verl_dft.sampling.source import ScriptedSource

BASE = recipes_dir() / "tiny" / "base"
FILES = ("rows.parquet", "expert.parquet", "samples.parquet", "statistics.json", "statistics.md", "config.json")


class Answers(ScriptedSource):
    """Right once in 16, with log-probs."""

    def __init__(self) -> None:
        super().__init__([f"So it is \\boxed{{ {number} }} ." for number in range(1, 31)] + ["no idea", "long " * 20])

    def _text(self, request: SampleRequest, u: float) -> GeneratedText:
        text = super()._text(request, u)
        logp = [-1 - i / 7 for i in range(len(text.token_ids))] if request.want_logp else None
        return GeneratedText(text.token_ids, text.text, text.finish_reason, logp)


def _config(folder: Path, *changes: str) -> dict:
    argv = [f"model={BASE}", f"output_dir={folder}", "guided.prompt=arithmetic-guided", "shard_size=16"]
    argv += ["self.max_tokens=60", "guided.max_tokens=60"]
    data = [] if any(change.startswith("data=") for change in changes) else ["data=arithmetic", "limit=24"]
    return plain(compose_sampling("rewrite", [*argv, *data, *changes]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewrite") / "whole"
    statistics = run(_config(folder), Answers())
    assert all(statistics["table1"][stage]["count"] for stage in ("self", "guided", "fallback"))
    return folder


def test_what_is_written(finished: Path) -> None:
    statistics = json.loads((finished / "statistics.json").read_text())
    rows, samples = read_rows(finished / "rows.parquet").to_pylist(), read_samples(finished / "samples.parquet")
    assert len(rows) == statistics["table1"]["total"]["count"] == 24
    assert Counter(row["origin"] for row in rows) == statistics["rows"]["by_origin"]
    drawn = {
        name: [s for s in samples if s.prompt_name == stage["prompt"]] for name, stage in statistics["sampling"].items()
    }
    for name, stage in statistics["sampling"].items():
        assert stage["samples"] == len(drawn[name]) == sum(stage["waves"]) < stage["samples_literal"]
        assert stage["tokens"] == sum(s.num_tokens for s in drawn[name]) and stage["truncated"] > 0
        assert stage["verdicts"]["no_answer"] > 0 and sum(stage["verdicts"].values()) == len(drawn[name])
        assert stage["solved"] == statistics["table1"][name]["count"]
    by_origin = {row["origin"]: row for row in rows}
    for origin in ("self", "guided"):
        row = by_origin[origin]
        assert len(row["behavior_logp"]) == len(row["response_ids"]) and row["finish_reason"] == "stop"
        same = [s for s in drawn[origin] if s.problem_id == row["problem_id"] and s.correct]
        assert row["response_ids"] == list(same[0].token_ids) and row["messages"][-1]["content"] == same[0].response
    assert by_origin["expert"]["response_ids"] is None
    experts = {row["problem_id"]: row for row in read_rows(finished / "expert.parquet").to_pylist()}
    assert [row["problem_id"] for row in rows] == list(experts) and by_origin["expert"] in experts.values()
    assert all(row["messages"][:-1] == experts[row["problem_id"]]["messages"][:-1] for row in rows)
    assert not any("Reference" in turn["content"] for row in rows for turn in row["messages"])
    manifest = json.loads((finished / "rows.parquet.manifest.json").read_text())
    assert manifest["seed"] == 0 and manifest["config"]["self"]["n"] == 8 and manifest["num_generated"] == len(samples)
    page = (finished / "statistics.md").read_text()
    assert "| Self-alignment | Guided-alignment | Fallback | Total |" in page and "By level" in page
    assert page == markdown(statistics, str(BASE))


KILLS = [pytest.param(f"{place}:3", marks=pytest.mark.slow) for place, _ in PLACES]
KILLS += [f"{place}:{17 if often == 4 else 250}" for place, often in PLACES[::2]]
KILLS += [pytest.param(f"{place}:{17 if often == 4 else 250}", marks=pytest.mark.slow) for place, often in PLACES[1::2]]
"""Every place of the store: in the first wave, and in one of the guided stage's."""


@pytest.mark.parametrize("place", KILLS)
def test_a_killed_rewriting_ends_with_the_same_bytes(tmp_path: Path, finished: Path, place: str) -> None:
    folder = tmp_path / "killed"
    assert killed(place, lambda: run(_config(folder), Answers()))
    assert not (folder / "statistics.json").exists()
    source = Answers()
    run(_config(folder), source)
    facts, before = (json.loads((f / "rows.parquet.manifest.json").read_text()) for f in (folder, finished))
    assert facts["num_generated"] == sum(source.calls) == before["num_generated"] - facts["num_reused"]
    assert place.endswith(":3") or facts["num_reused"] > 200
    for name in FILES:
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_finished_run_is_repeated_without_sampling(tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    source = Answers()
    run(_config(folder, "grading.num_workers=1"), source)
    assert source.calls == []
    assert all((folder / name).read_bytes() == (finished / name).read_bytes() for name in FILES)
    with pytest.raises(InputError, match=r"holds a result made with another configuration \(wave_size differ\)"):
        run(_config(folder, "wave_size=4"), source)


def test_dry_run_tells_how_much_at_most(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "dry"
    found = plan(_config(folder))
    assert found["problems"] == 24 and not folder.exists()
    for stage in found["stages"].values():
        assert (stage["samples"], stage["stored"], stage["max_response_tokens"]) == (24 * 8, 0, 24 * 8 * 60)
        assert stage["expected_if_uniform"] == round(24 * 3.352381 * (1 if stage is found["stages"]["self"] else 1 / 9))
    statistics = json.loads((finished / "statistics.json").read_text())
    assert plan(_config(finished))["stages"]["self"]["stored"] == statistics["sampling"]["self"]["samples"]
    argv = [f"model={BASE}", "data=arithmetic", "limit=2", f"output_dir={folder}", "stages=self_only", "--dry-run"]
    assert main(argv) == 0 and not folder.exists()
    shown = capsys.readouterr().out
    assert (
        "dry run: 2 problems" in shown
        and "self: at most 16 samples (0 stored already)" in shown
        and "guided" not in shown
    )


def test_a_file_of_problems(tmp_path: Path) -> None:
    """Golds that cannot be judged, and a missing solution: refused with its place, or dropped and counted."""
    records = [
        {"id": "p0", "problem": "1 + 1 ?", "answer": "2", "solution": "It is \\boxed{2}."},
        {"id": "p1", "problem": "What ?", "answer": "", "solution": "Nobody knows."},
        {"id": "p2", "problem": "Who ?", "answer": "77", "solution": None},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(InputError, match=r"mine\.jsonl: row 2: problem 'p2' has no expert solution .*drop"):
        run(_config(tmp_path / "out", f"data={file}"), Answers())
    assert not (tmp_path / "out").exists()
    dropping = [f"data={file}", "missing_solution=drop"]
    statistics = run(_config(tmp_path / "out", *dropping), ScriptedSource(["\\boxed{2}"]))
    assert statistics["fallback_reasons"] == {EMPTY: 1} and statistics["dropped"] == {NO_SOLUTION: 1}
    assert [row["origin"] for row in pq.read_table(tmp_path / "out" / "rows.parquet").to_pylist()] == ["self", "expert"]
    file.write_text(json.dumps(records[2]) + "\n")
    with pytest.raises(InputError, match="no problem is left to write a row of"):
        run(_config(tmp_path / "none", *dropping), ScriptedSource(["\\boxed{2}"]))
    file.write_text(json.dumps(records[1]) + "\n")  # nothing to sample is not an error
    assert run(_config(tmp_path / "all", *dropping), Answers())["table1"]["fallback"]["count"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["online=true"], "online=true: this command rewrites before training"),
        (["stages=both"], "stages=both; use one of full, self_only, guided_only"),
        (["missing_solution=skip"], "missing_solution=skip; use one of refuse, drop"),
        (["keep_truncated=1"], "keep_truncated=1; it must be true or false"),
        (["early_stop=2"], "early_stop=2; it must be true or false"),
        (["wave_size=0"], "wave_size=0; it must be a whole number of at least 1"),
        (["self.n=0"], "self.n=0; it must be a whole number of at least 1"),
        (["guided.temperature=0"], "guided.temperature=0 gives the same text 8 times; use guided.n=1"),
        (["guided.temperature=-1", "guided.n=1"], "guided.temperature=-1; it must be a number of at least 0"),
        (["self.top_p=0"], "self.top_p=0; it must be above 0"),
        (["self.verifier=kind"], "self.verifier=kind; use one of strict, qwen"),
        (["guided.prompt=raw"], r"guided.prompt=raw must have \{reference\} in it"),
        (["self.prompt=digest-and-retell"], "self.prompt=digest-and-retell shows the solution"),
        (["prompt=digest-and-retell"], "prompt=digest-and-retell shows the solution, which training rows must not"),
        (["guided.prompt=nothing"], "no prompt 'nothing'; use one of raw, "),
        (["limit=0"], "limit=0; it is the number of problems"),
    ],
)
def test_bad_input(tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(_config(tmp_path / "out", *changes), Answers())
    assert not (tmp_path / "out").exists()


def test_model_and_folder_are_needed() -> None:
    with pytest.raises(InputError, match="no model was given"):
        main(["data=arithmetic", "output_dir=x"])
    with pytest.raises(InputError, match="output_dir is not set"):
        main(["data=arithmetic", f"model={BASE}"])


# ---- golds and prompts ----
@pytest.mark.slow
def test_golds_that_no_response_can_be_judged_against() -> None:
    golds = ["72", r"\frac{1}{2}", "east", "(3, 4)", "x^2+1", "", r"\frac{1}{", "???", "5\\"]
    golds.append(r"\sum_{n=0}^{\infty} \frac{(-1)^{n}}{n+1} x^{n+1}")  # slow to compare, but sound
    problems = [Problem(str(i), "q", gold) for i, gold in enumerate(golds)]
    found = unusable_golds(problems, {"num_workers": 1})
    assert found == {"5": EMPTY, "6": UNPARSED, "7": UNPARSED, "8": UNREADABLE}


def test_prompts_by_name_text_and_file(tmp_path: Path) -> None:
    assert find_prompt("boxed") == ("boxed", PROMPTS["boxed"])
    text = "Given {reference}: answer {problem} in \\boxed{}."
    name, prompt = find_prompt(text)
    assert name.startswith("own-") and prompt.needs_reference
    assert prompt.messages("Q{1}", "S{2}") == [{"role": "user", "content": "Given S{2}: answer Q{1} in \\boxed{}."}]
    file = tmp_path / "prompt.txt"
    file.write_text(text + "\n")
    assert find_prompt(str(file)) == (name, prompt)
    file.write_text("no place")
    with pytest.raises(InputError, match=r"prompt\.txt has no \{problem\} in it"):
        find_prompt(str(file))
    file.write_bytes(b"\xff\xfe {problem}")
    with pytest.raises(InputError, match="cannot be read as a prompt"):
        find_prompt(str(file))
    options = rewrite_options(_config(tmp_path / "x", "guided.prompt='{reference} {problem}'", "prompt=boxed"))
    assert options.guided_stage.prompt_name.startswith("own-") and options.self_stage.prompt_name == "boxed"


def test_digest_and_retell_shows_both_and_asks_for_a_box() -> None:
    [turn] = PROMPTS["digest-and-retell"].messages("the problem?", "the solution!")
    assert "the problem?" in turn["content"] and "the solution!" in turn["content"] and "\\boxed{}" in turn["content"]
