"""Groups: compositions, advantages, what stands in and what is left out, and the command with scripted sources."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from endpoint_helpers import Server, asked, completion, error, serving
from hypothesis import given
from hypothesis import strategies as st
from sample_helpers import watch_samples
from store_helpers import PLACES, killed

from verl_dft.build.group_plan import (
    Candidates,
    GroupOptions,
    Response,
    own_response,
    parse_composition,
    teacher_response,
)
from verl_dft.build.groups import Groups, advantages, build_groups
from verl_dft.build.groups_command import Sources, expand_composition, main, plan, run
from verl_dft.data import tables
from verl_dft.data.records import Problem, read_problems, read_rows, write_problems
from verl_dft.errors import InputError
from verl_dft.files import sha256_file
from verl_dft.grading.pool import VERDICTS
from verl_dft.paths import recipes_dir
from verl_dft.sampling.configure import compose_sampling, plain
from verl_dft.sampling.record import Sample, read_samples, write_samples
from verl_dft.sampling.source import ScriptedSource

BASE = recipes_dir() / "tiny" / "base"
NAMES = {verdict[0]: verdict for verdict in VERDICTS}
"""First letter -> verdict (n: no_answer)."""


# ---- advantages ----

rewards_lists = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=16)


@given(rewards_lists, st.sampled_from(["sample", "population"]), st.sampled_from([0.0, 1e-6, 0.1]))
def test_advantages_equal_a_direct_computation(rewards: list[float], std: str, epsilon: float) -> None:
    found = advantages(rewards, std, epsilon)
    k, right = len(rewards), sum(rewards)
    if right in (0, k):
        assert found.tolist() == [0.0] * k
        return
    mean = right / k
    variance = sum((reward - mean) ** 2 for reward in rewards) / (k - 1 if std == "sample" else k)
    expected = [(reward - mean) / (math.sqrt(variance) + epsilon) for reward in rewards]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert abs(found.sum()) < 1e-9 and (found > 0).tolist() == [reward == 1 for reward in rewards]


@given(st.integers(2, 16).flatmap(lambda k: st.tuples(st.just(k), st.integers(1, k - 1))))
def test_advantages_of_m_correct_of_k_in_closed_form(case: tuple[int, int]) -> None:
    k, m = case
    rewards = [1.0] * m + [0.0] * (k - m)
    up, down = math.sqrt((k - m) / m), -math.sqrt(m / (k - m))
    np.testing.assert_allclose(advantages(rewards, "population", 0.0), [up] * m + [down] * (k - m))
    smaller = math.sqrt((k - 1) / k)
    np.testing.assert_allclose(advantages(rewards, "sample", 0.0), np.multiply([up] * m + [down] * (k - m), smaller))


def test_equal_rewards_that_are_no_binary_fractions_give_exact_zeros() -> None:
    rewards = [0.1] * 7
    assert np.mean(rewards) != 0.1 and advantages(rewards, "population", 0.0).tolist() == [0.0] * 7


# ---- compositions ----


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("1:3:4", (1, 3, 4)), ("[1,3,4]", (1, 3, 4)), ("0:0:8", (0, 0, 8)), ("no_mix", (1, 0, 7)),
        # Table 5 of the paper: demonstrations : samples
        ("8:0", (1, 7, 0)), ("6:2", (1, 5, 2)), ("4:4", (1, 3, 4)), ("2:6", (1, 1, 6)), ("0:8", (0, 0, 8)),
    ],
)  # fmt: skip
def test_compositions(text: str, counts: tuple[int, int, int]) -> None:
    found = parse_composition(text)
    assert found.counts == counts and found.size == 8 and not found.alone
    overrides = expand_composition([f"composition={text}", "limit=3"])
    assert overrides == [
        *(f"composition.{name}={n}" for name, n in zip(("expert", "teacher", "self"), counts, strict=True)),
        "no_gal=false",
        "limit=3",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2:3:4", "one expert solution"),
        ("1:0:0", "compares at least two"),
        ("0:0:1", "compares at least two"),
        ("1:3:4:5", "use expert:teacher:self"),
        ("a:b", "use expert:teacher:self"),
        ("-1:4", "use expert:teacher:self"),
        ("nomix", "no_mix or no_gal"),
    ],
)
def test_compositions_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_composition(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": "biased"}, "std=biased"),
        ({"epsilon": -1}, "epsilon=-1"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
        ({"expert_reward": "two"}, "expert_reward=two"),
        ({"missing": "self"}, "missing=self"),
        ({"missing_teacher": "drop"}, "error, skip, self"),
        ({"prompt": "arithmetic-guided"}, "shows a reference"),
        ({"verifier": "mine"}, "verifier=mine"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GroupOptions(**options)


# ---- groups ----


def response(kind: str, letter: str, index: int = 0) -> Response:
    """A response whose verdict begins with ``letter``; own ones have tokens."""
    ids = [index, index + 1] if kind == "self" else None
    return Response(f"{kind} {index}", NAMES[letter], ids, [-0.1, -0.2] if ids else None, "stop" if ids else None)


def case(*groups: str) -> tuple[list[Problem], dict[str, Candidates]]:
    """A problem for each ``expert|teacher|self`` of verdicts' letters, e.g. ``c|cw|wwwc``."""
    problems, candidates = [], {}
    for number, letters in enumerate(groups):
        expert, teacher, own = letters.split("|")
        problems.append(Problem(f"p{number}", f"problem {number}?", str(number)))
        candidates[f"p{number}"] = Candidates(
            response("expert", expert) if expert else None,
            [response("teacher", letter, i) for i, letter in enumerate(teacher)],
            [response("self", letter, i) for i, letter in enumerate(own)],
        )
    return problems, candidates


def build(groups: list[str], composition: str = "1:2:3", **options: Any) -> Groups:
    return build_groups(*case(*groups), parse_composition(composition), GroupOptions(**options))


def test_rows_come_group_by_group_with_rewards_and_advantages() -> None:
    found = build(["c|cw|wwc", "w|cc|ccc"], std="population", epsilon=0.0)
    rows = list(found.rows)
    assert [row.group_id for row in rows] == ["p0"] * 6 + ["p1"] * 6
    assert [row.origin for row in rows[:6]] == ["expert", "teacher", "teacher", "self", "self", "self"]
    assert [row.reward for row in rows] == [1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 1, 1]
    values = [row.advantage for row in rows]
    np.testing.assert_allclose(values[:6], [1, 1, -1, -1, -1, 1])
    np.testing.assert_allclose(values[6:], [-math.sqrt(5), *[math.sqrt(1 / 5)] * 5])
    own, expert = rows[3], rows[0]
    assert own.messages == [{"role": "user", "content": "problem 0?"}, {"role": "assistant", "content": "self 0"}]
    assert (own.response_ids, own.behavior_logp, own.finish_reason) == ([0, 1], [-0.1, -0.2], "stop")
    assert expert.response_ids is None and expert.behavior_logp is None


letters = st.text("cwnte", max_size=6)
group_cases = st.lists(st.tuples(st.sampled_from("cw"), letters, letters), min_size=1, max_size=6)


@given(group_cases, st.sampled_from(["sample", "population"]), st.booleans(), st.sampled_from(["graded", "one"]))
def test_groups_equal_a_direct_computation_and_counts_add_up(
    cases: list[tuple[str, str, str]], std: str, keep_expert: bool, expert_reward: str
) -> None:
    cases = [*cases, ("c", "cw", "wwc")]  # one group at least
    options = {"std": std, "keep_expert": keep_expert, "expert_reward": expert_reward}
    found = build(["|".join(one) for one in cases], missing="skip", missing_teacher="self", **options)
    rows = iter(found.rows)
    num_groups = num_gradient = 0
    for number, (expert, teacher, own) in enumerate(cases):
        num_own = 3 + max(0, 2 - len(teacher))
        if len(own) < num_own:
            continue
        group = [next(rows) for _ in range(6)]
        num_groups += 1
        assert {row.group_id for row in group} == {f"p{number}"}
        assert [row.origin for row in group].count("self") == num_own
        last = [sorted(side, key=lambda letter: letter in "te") for side in (teacher, own)]
        taken = [*expert, *last[0][:2], *last[1][:num_own]]
        rewards = [float(letter == "c") for letter in taken]
        rewards[0] = 1.0 if expert_reward == "one" else rewards[0]
        expected = np.zeros(6)
        if len(set(rewards)) > 1:
            array = np.array(rewards)
            expected = (array - array.mean()) / (array.std(ddof=std == "sample") + 1e-6)
        elif keep_expert:
            expected[0] = 1.0
        assert [row.reward for row in group] == rewards
        np.testing.assert_allclose([row.advantage for row in group], expected, rtol=1e-12)
        num_gradient += int((expected != 0).sum())
    assert next(rows, None) is None
    counts = found.statistics
    assert (counts["groups"], counts["rows"]) == (num_groups, 6 * num_groups)
    assert counts["rows_with_gradient"] == num_gradient
    assert counts["groups"] + sum(counts["problems_left_out"].values()) == counts["problems"] == len(cases)
    for part in ("by_composition", "by_origin"):
        assert sum(one["rows"] for one in counts[part].values()) == counts["rows"]
        assert sum(one["rows_with_gradient"] for one in counts[part].values()) == num_gradient
    equal = sum(one["groups_all_equal"] for one in counts["by_composition"].values())
    assert equal == counts["groups_all_correct"] + counts["groups_none_correct"]


def test_equal_rewards_give_no_advantage_and_are_counted() -> None:
    found = build(["c|cc|ccc", "w|wn|wnt", "c|ww|www"])
    assert [row.advantage for row in list(found.rows)[:12]] == [0.0] * 12
    counts = found.statistics
    assert (counts["groups_all_correct"], counts["groups_none_correct"], counts["groups"]) == (1, 1, 3)
    assert counts["rows_with_gradient"] == 6
    assert counts["by_composition"] == {
        "1:2:3": {"groups": 3, "groups_all_equal": 2, "rows": 18, "rows_with_gradient": 6}
    }


def test_keeping_the_expert_and_dropping_equal_groups() -> None:
    kept = build(["c|cc|ccc", "w|ww|www", "c|ww|www"], keep_expert=True)
    assert [row.advantage for row in list(kept.rows)[:12]] == [1.0, 0, 0, 0, 0, 0] * 2
    assert kept.statistics["rows_with_gradient"] == 8
    dropped = build(["c|cc|ccc", "w|ww|www", "c|ww|www"], drop_equal=True)
    assert {row.group_id for row in dropped.rows} == {"p2"} and dropped.statistics["groups_dropped_equal"] == 2
    both = build(["c|cc|ccc", "c|ww|www"], drop_equal=True, keep_expert=True)
    assert both.statistics["groups"] == 2, "a group in which the expert keeps its advantage is not without one"
    without = build(["|cc|ccc", "|cw|ccc"], "0:2:3", keep_expert=True)
    assert [row.advantage for row in list(without.rows)[:5]] == [0.0] * 5
    with pytest.raises(InputError, match="in all 1 groups the rewards are equal"):
        build(["c|cc|ccc"], drop_equal=True)


def test_own_responses_stand_in_for_missing_teacher_texts() -> None:
    found = build(["c|c|wwwwc", "c|cw|wwww", "c||wwwww"], missing_teacher="self")
    assert {key: one["groups"] for key, one in found.statistics["by_composition"].items()} == {
        "1:1:4": 1, "1:2:3": 1, "1:0:5": 1,
    }  # fmt: skip
    assert found.statistics["groups_filled_with_self"] == 2 and len(list(found.rows)) == 18


def test_what_is_missing_is_named_or_left_out() -> None:
    groups = ["c|cw|wwc", "|cw|wwc", "c|c|wwc", "c|cw|ww"]
    for skip, message in (
        ({}, r"1 of 4 problems have no expert solution for groups of 1:2:3 \(first: p1\)"),
        ({"missing": "skip"}, r"1 of 4 problems have too few teacher texts .*\(first: p2\)"),
        ({"missing_teacher": "skip"}, "no expert solution"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            build(groups, **skip)
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match=r"too few own responses .*\(first: p2\)"):
        build([groups[0], groups[0], groups[3]])
    found = build(groups, missing="skip", missing_teacher="skip")
    assert found.statistics["problems_left_out"] == {
        "no expert solution": 1, "too few teacher texts": 1, "too few own responses": 1,
    }  # fmt: skip
    assert len(list(found.rows)) == 6
    with pytest.raises(InputError, match="no group can be made of 1 problems: 1 x too few own responses"):
        build(["c|cw|w"], missing="skip")


def test_problems_whose_gold_is_of_no_use_are_left_out_and_counted() -> None:
    problems, candidates = case("c|cw|wwc", "c|cw|wwc", "c|cw|wwc")
    problems[0].answer = " "
    candidates["p2"] = replace(candidates["p2"], unusable="gold cannot be parsed")
    found = build_groups(problems, candidates, parse_composition("1:2:3"), GroupOptions())
    assert found.statistics["problems_left_out"] == {"gold is empty": 1, "gold cannot be parsed": 1}
    assert len(list(found.rows)) == 6


def test_responses_without_text_or_verdict() -> None:
    problems, candidates = case("c|wtcw|wewwc")
    blank = Response("  ", "no_answer")
    ended_at_once = Response("", "no_answer", [2], [-0.3], "stop")
    candidates["p0"] = replace(candidates["p0"], teacher=[blank, *candidates["p0"].teacher],
                               own=[ended_at_once, *candidates["p0"].own])  # fmt: skip
    found = build_groups(problems, candidates, parse_composition("1:2:3"), GroupOptions())
    texts = [row.messages[-1]["content"] for row in found.rows]
    assert texts == ["expert 0", "teacher 0", "teacher 2", "", "self 0", "self 2"], "ungraded ones only if need be"
    needed = build_groups(problems, candidates, parse_composition("1:4:6"), GroupOptions())
    assert needed.statistics["by_origin"]["teacher"]["verdicts"] == {"correct": 1, "wrong": 2, "timeout": 1}
    assert [row.reward for row in needed.rows if row.messages[-1]["content"] in ("teacher 1", "self 1")] == [0.0, 0.0]


def test_no_gal_is_the_expert_alone_with_advantage_one() -> None:
    problems, candidates = case("w|cw|", "||ww", "c||")
    problems[2].answer = ""
    found = build_groups(problems, candidates, parse_composition("no_gal"), GroupOptions(missing="skip"))
    assert [(row.problem_id, row.origin, row.advantage, row.reward) for row in found.rows] == [
        ("p0", "expert", 1.0, None), ("p2", "expert", 1.0, None),
    ]  # fmt: skip
    assert found.statistics["problems_left_out"] == {"no expert solution": 1}
    assert found.statistics["groups_all_correct"] == found.statistics["groups_none_correct"] == 0


def test_a_samples_log_probs_belong_to_the_prompt_it_answers() -> None:
    sample = Sample("p0", 0, "x", "length", "wrong", prompt_name="raw", token_ids=[5], logp=[-1.0], qwen="correct")
    assert own_response(sample, GroupOptions()) == Response("x", "wrong", [5], [-1.0], "length")
    assert own_response(sample, GroupOptions(prompt="boxed")).behavior_logp is None
    assert own_response(sample, GroupOptions(verifier="qwen")).verdict == "correct"
    assert teacher_response(sample, GroupOptions()) == Response("x", "wrong", finish_reason="length")


# ---- the command ----

RIGHT, WRONG, NONE = "The answer is \\boxed{5}.", "The answer is \\boxed{6}.", "I do not know."


def make_problems(folder: Path, teachers: int = 3, number: int = 6) -> Path:
    texts = [RIGHT, WRONG, "Surely \\boxed{5}"][:teachers]
    problems = [
        Problem(f"q{i}", f"What is {i} + {5 - i}?", "5", f"It is \\boxed{{{5 if i else 4}}}.", texts or None)
        for i in range(number)
    ]
    write_problems(folder / "problems.jsonl", problems)
    return folder / "problems.jsonl"


def config(folder: Path, *more: str) -> dict[str, Any]:
    argv = [f"data={folder / 'problems.jsonl'}", f"output_dir={folder / 'out'}", "grading.num_workers=1", *more]
    return plain(compose_sampling("groups", expand_composition(argv), need_model=False))


def scripted() -> ScriptedSource:
    return ScriptedSource([RIGHT, WRONG, NONE])


MODEL = f"model={BASE}"


@pytest.fixture(name="server")
def server_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    yield from serving(monkeypatch)


def test_groups_from_the_teacher_column_and_a_model(tmp_path: Path) -> None:
    path, source = make_problems(tmp_path), scripted()
    found = run(config(tmp_path, MODEL, "want_logp=false"), Sources(own=source))
    table = read_rows(tmp_path / "out" / "rows.parquet").to_pylist()
    assert sum(source.calls) == 6 * 4 and len(table) == 6 * 8 == found["rows"]
    for start in range(0, len(table), 8):
        group = table[start : start + 8]
        assert len({row["group_id"] for row in group}) == 1
        rewards = [float("\\boxed{5}" in row["messages"][-1]["content"]) for row in group]
        assert [row["reward"] for row in group] == rewards, "expert and teacher texts are graded like any other"
        array = np.array(rewards)
        expected = (array - array.mean()) / (array.std(ddof=1) + 1e-6)
        np.testing.assert_allclose([row["advantage"] for row in group], expected, rtol=1e-6)
    assert table[0]["reward"] == 0.0, "the expert of q0 is wrong"
    assert [row["response_ids"] is None for row in table[:8]] == [True] * 4 + [False] * 4
    samples = read_samples(tmp_path / "out" / "self")
    assert [list(one.response.encode()) for one in samples[:4]] == [row["response_ids"] for row in table[4:8]]
    manifest = json.loads((tmp_path / "out" / "rows.parquet.manifest.json").read_text())
    assert manifest["inputs"]["problems"]["sha256"] == sha256_file(path)
    assert manifest["sampled"]["self"]["num_generated"] == 24
    assert manifest["statistics"] == found == json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert "| 1:3:4 | 6 |" in (tmp_path / "out" / "statistics.md").read_text()


def test_run_again_samples_nothing_and_writes_the_same_bytes(tmp_path: Path) -> None:
    make_problems(tmp_path)
    run(config(tmp_path, MODEL), Sources(own=scripted()))
    before = {name: (tmp_path / "out" / name).read_bytes() for name in ("rows.parquet", "statistics.json")}
    source = scripted()
    run(config(tmp_path, MODEL), Sources(own=source))
    assert source.calls == []
    assert before == {name: (tmp_path / "out" / name).read_bytes() for name in before}
    with pytest.raises(InputError, match="std differ"):
        run(config(tmp_path, MODEL, "std=population"), Sources(own=source))


@pytest.mark.parametrize(
    "place",
    [place for place, _ in PLACES[::2]] + [pytest.param(place, marks=pytest.mark.slow) for place, _ in PLACES[1::2]],
)
def test_killed_anywhere_groups_end_with_the_same_bytes(tmp_path: Path, place: str) -> None:
    make_problems(tmp_path, teachers=0)
    more = [MODEL, f"teacher.model={BASE}", "shard_size=7"]

    def build(folder: Path) -> None:
        run(config(tmp_path, *more, f"output_dir={folder}"), Sources(own=scripted(), teacher=scripted()))

    build(tmp_path / "whole")
    for nth in (2, 4):  # among the teacher's shards, then among the model's own
        assert killed(f"{place}:{nth}", lambda: build(tmp_path / "killed"))
        assert not (tmp_path / "killed" / "statistics.json").exists()
    build(tmp_path / "killed")
    for name in ("rows.parquet", "statistics.json", "statistics.md"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_samples_of_a_file_give_the_groups_of_the_same_samples_made_here(tmp_path: Path) -> None:
    make_problems(tmp_path)
    run(config(tmp_path, MODEL), Sources(own=scripted()))
    here = (tmp_path / "out" / "rows.parquet").read_bytes()
    given = [f"samples={tmp_path / 'out' / 'self'}", f"output_dir={tmp_path / 'given'}"]
    run(config(tmp_path, *given))
    assert (tmp_path / "given" / "rows.parquet").read_bytes() == here
    manifest = json.loads((tmp_path / "given" / "rows.parquet.manifest.json").read_text())
    assert manifest["inputs"]["samples"]["sha256"] == sha256_file(tmp_path / "out" / "self" / "samples.parquet")


def test_part_by_part_the_same_groups_whatever_the_order_of_the_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_problems(tmp_path, number=120)
    problems = read_problems(tmp_path / "problems.jsonl")
    samples = [
        Sample(p.id, i, [RIGHT, WRONG, NONE][(i + n) % 3], "stop", ["correct", "wrong", "no_answer"][(i + n) % 3],
               problem=p.problem, token_ids=[i, n], num_tokens=2, logp=[-1.0, -n], prompt_name="raw")
        for n, p in enumerate(problems) for i in (2, 0, 1)
    ]  # fmt: skip
    random.Random(0).shuffle(problems)
    write_problems(tmp_path / "problems.jsonl", problems)
    written = {}
    for part in (4096, 8):
        monkeypatch.setattr(tables, "PART", part)
        write_samples(tmp_path / "s.parquet", samples)
        alive = watch_samples(monkeypatch)
        folder = tmp_path / f"out{part}"
        run(config(tmp_path, f"samples={tmp_path / 's.parquet'}", "composition=1:0:2", f"output_dir={folder}"))
        written[part] = pq.read_table(folder / "rows.parquet"), (folder / "statistics.json").read_bytes()
        assert len(alive) == 360 + 360 + 240 and max(alive) < 20
    assert written[8][0].equals(written[4096][0]) and written[8][1] == written[4096][1]
    assert pq.ParquetFile(tmp_path / "out8" / "rows.parquet").num_row_groups == 45
    rows = written[8][0].to_pylist()
    assert [row["problem_id"] for row in rows] == [problem.id for problem in problems for _ in range(3)]
    number = int(rows[1]["problem_id"][1:])
    assert [row["response_ids"] for row in rows[:3]] == [None, [0, number], [1, number]]


def test_a_teacher_is_sampled_into_a_store_of_its_own_with_other_seeds(tmp_path: Path) -> None:
    make_problems(tmp_path, teachers=0)
    sources = Sources(own=scripted(), teacher=ScriptedSource([RIGHT, NONE]))
    more = [f"teacher.model={BASE}", "teacher.max_tokens=12", "composition=0:3:3"]
    found = run(config(tmp_path, MODEL, *more), sources)
    teacher, own = (read_samples(tmp_path / "out" / who) for who in ("teacher", "self"))
    assert len(teacher) == len(own) == 18 and {one.finish_reason for one in teacher} == {"length"}
    assert {one.prompt_name for one in teacher} == {"qwen-boxed"} and {one.prompt_name for one in own} == {"raw"}
    assert not {one.seed for one in teacher} & {one.seed for one in own}
    assert found["by_origin"]["teacher"]["truncated"] == 18 and found["by_origin"]["expert"]["rows"] == 0
    rows = read_rows(tmp_path / "out" / "rows.parquet").to_pylist()
    assert all(row["response_ids"] is None for row in rows if row["origin"] == "teacher")
    again = [f"teacher.samples={tmp_path / 'out' / 'teacher'}", f"samples={tmp_path / 'out' / 'self'}"]
    run(config(tmp_path, *again, "composition=0:3:3", f"output_dir={tmp_path / 'again'}"))
    assert (tmp_path / "again" / "rows.parquet").read_bytes() == (tmp_path / "out" / "rows.parquet").read_bytes()


def test_a_teacher_behind_an_endpoint(tmp_path: Path, server: Server) -> None:
    make_problems(tmp_path, teachers=0)
    server.script = lambda body, n: completion(RIGHT if "0 + 5" in asked(body) else "")
    more = [f"teacher.endpoint={server.url}", "teacher.model=teacher", "composition=1:2:2", "teacher.max_tokens=9"]
    with pytest.raises(InputError, match="5 of 6 problems have too few teacher texts"):
        run(config(tmp_path, MODEL, *more), Sources(own=scripted()))
    found = run(config(tmp_path, MODEL, *more, "teacher.missing=self"), Sources(own=scripted()))
    assert len(server.bodies) == 12, "what was answered is kept"
    assert {body["max_tokens"] for body in server.bodies} == {9}
    assert {key: one["groups"] for key, one in found["by_composition"].items()} == {"1:2:2": 1, "1:0:4": 5}
    rows = read_rows(tmp_path / "out" / "rows.parquet").to_pylist()
    texts = [row["messages"][-1]["content"] for row in rows if row["origin"] == "teacher"]
    assert texts == [RIGHT, RIGHT] and found["writers"]["teacher"]["models"] == ["teacher"]


def test_a_dead_endpoint_is_one_line_and_loses_nothing(tmp_path: Path, server: Server) -> None:
    make_problems(tmp_path, teachers=0)
    server.script = lambda body, n: completion(RIGHT) if n < 4 else error(500, "out of order")
    more = [f"teacher.endpoint={server.url}", "teacher.model=teacher", "composition=1:1:2", "shard_size=2"]
    more += ["teacher.requests.retries=1", "teacher.requests.backoff_s=0", "teacher.requests.concurrency=1"]
    with pytest.raises(InputError, match="500") as raised:
        run(config(tmp_path, MODEL, *more), Sources(own=scripted()))
    assert "\n" not in str(raised.value) and not (tmp_path / "out" / "rows.parquet").exists()
    before, server.script = len(server.bodies), lambda body, n: completion(WRONG)
    run(config(tmp_path, MODEL, *more), Sources(own=scripted()))
    assert len(server.bodies) - before == 2, "the two shards that were answered are kept"
    assert [one.grade for one in read_samples(tmp_path / "out" / "teacher")] == ["correct"] * 4 + ["wrong"] * 2


def test_filling_up_samples_as_many_as_are_missing(tmp_path: Path) -> None:
    make_problems(tmp_path, teachers=1)
    source = scripted()
    found = run(config(tmp_path, MODEL, "teacher.missing=self"), Sources(own=source))
    assert sum(source.calls) == 6 * 6 and list(found["by_composition"]) == ["1:1:6"]


def test_ablations_need_no_teacher_and_no_gal_needs_no_model(tmp_path: Path) -> None:
    make_problems(tmp_path, teachers=0)
    found = run(config(tmp_path, MODEL, "composition=no_mix"), Sources(own=scripted()))
    assert found["composition"] == "1:0:7" and found["rows"] == 48
    found = run(config(tmp_path, "composition=no_gal", f"output_dir={tmp_path / 'gal'}"))
    rows = read_rows(tmp_path / "gal" / "rows.parquet")
    assert rows["advantage"].to_pylist() == [1.0] * 6 and set(rows["origin"].to_pylist()) == {"expert"}


def test_nothing_is_sampled_for_problems_whose_gold_is_of_no_use(tmp_path: Path) -> None:
    golds = ("5", "", "\\frac{1}{", "6")
    problems = [Problem(f"q{i}", f"Problem {i}?", gold, "It is 5.") for i, gold in enumerate(golds)]
    write_problems(tmp_path / "problems.jsonl", problems)
    source = scripted()
    found = run(config(tmp_path, MODEL, "composition=no_mix"), Sources(own=source))
    assert sum(source.calls) == 2 * 7 and found["groups"] == 2
    assert found["problems_left_out"] == {"gold is empty": 1, "gold cannot be parsed": 1}


def test_a_dry_run_plans_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_problems(tmp_path, teachers=0)
    more = [MODEL, f"teacher.model={BASE}", "self.max_tokens=7", "limit=4"]
    found = plan(config(tmp_path, *more))
    assert found["groups"] == 4
    assert (found["teacher"]["samples"], found["self"]["samples"]) == (12, 16)
    assert found["self"]["max_response_tokens"] == 7 * 16
    assert main([f"data={tmp_path / 'problems.jsonl'}", f"output_dir={tmp_path / 'out'}", *more, "--dry-run"]) == 0
    assert "4 groups of 1:3:4 from 4 problems\nteacher: 12 samples (0 stored already)" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def refused(folder: Path, message: str, *more: str) -> None:
    source = scripted()
    with pytest.raises(InputError, match=message) as raised:
        run(config(folder, *more), Sources(own=source, teacher=source))
    assert "\n" not in str(raised.value)
    assert source.calls == [] and not (folder / "out" / "rows.parquet").exists()


def test_bad_input_is_found_before_anything_is_sampled(tmp_path: Path) -> None:
    make_problems(tmp_path, teachers=0)
    refused(tmp_path, "none of 6 problems has teacher texts", MODEL)
    refused(tmp_path, "need the model's own responses", "composition=no_mix")
    refused(tmp_path, "both given", MODEL, "composition=no_mix", "samples=x")
    refused(tmp_path, "needs teacher.model=NAME", MODEL, "teacher.endpoint=http://localhost:1/v1")
    refused(tmp_path, "teacher.samples is given, and", MODEL, "teacher.samples=x", "teacher.model=y")
    refused(tmp_path, "teacher.temperature=0 gives", MODEL, f"teacher.model={BASE}", "teacher.temperature=0")
    refused(tmp_path, "self.top_p=2", MODEL, "composition=no_mix", "self.top_p=2")
    refused(tmp_path, "self.prompt=arithmetic-guided", MODEL, "composition=no_mix", "self.prompt=arithmetic-guided")
    refused(tmp_path, "self.max_tokens=0", MODEL, f"teacher.model={BASE}", "self.max_tokens=0")
    refused(tmp_path, "cannot be loaded", "model=/nowhere/at/all", f"teacher.model={BASE}")
    refused(tmp_path, "keep_expert=1", MODEL, "keep_expert=1")
    refused(tmp_path, "composition.expert=2", MODEL, "composition.expert=2")
    refused(tmp_path, "teacher.num_replicas=0", MODEL, f"teacher.model={BASE}", "teacher.num_replicas=0")
    make_problems(tmp_path, teachers=2)
    refused(tmp_path, "6 of 6 problems have too few teacher texts", MODEL)


def test_samples_that_do_not_fit_the_problems(tmp_path: Path) -> None:
    make_problems(tmp_path)

    def samples(**fields: Any) -> str:
        one = {"problem_id": "q0", "response": "x", "finish_reason": "stop", "grade": "wrong", "model": "a"}
        write_samples(tmp_path / "s.parquet", [Sample(**{**one, "index": i, **fields}) for i in range(4)])
        return f"samples={tmp_path / 's.parquet'}"

    refused(tmp_path, "5 of 6 problems have too few own responses .*first: q1", samples())
    refused(tmp_path, "another problem there", samples(problem="What is 1 + 1?"))
    refused(tmp_path, "another gold there", samples(gold="6"))
    refused(tmp_path, "no sample is of one of the 6 problems", samples(problem_id="other"))
    found = [Sample("q0", 0, "x", "stop", "wrong", model=model) for model in "ab"]
    write_samples(tmp_path / "s.parquet", found)
    refused(tmp_path, "responses of 2 models or prompts", f"samples={tmp_path / 's.parquet'}")
