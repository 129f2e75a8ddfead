"""Rejection sampling: which samples become rows and pairs, how they are chosen, counted and written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_helpers import watch_samples

from verl_dft.build import reject as building
from verl_dft.build.reject import Pair, RejectOptions, balanced_pairs, by_problem, sort_out
from verl_dft.build.reject_command import main, pair_schema
from verl_dft.build.reject_statistics import Tally, statistics
from verl_dft.data import tables
from verl_dft.data.records import Row, read_rows
from verl_dft.errors import InputError
from verl_dft.files import sha256_file
from verl_dft.grading.pool import VERDICTS
from verl_dft.sampling.record import Sample, write_samples


def sample(problem: int, index: int, grade: str, text: str | None = None, **fields: Any) -> Sample:
    text = f"text {index} \\boxed{{{problem}}}" if text is None else text
    ids = list(text.encode()[:5])
    given = {"finish_reason": "stop", "problem": f"problem {problem}?", "prompt_name": "raw", "qwen": grade}
    given |= {"token_ids": ids, "logp": [-0.5] * len(ids), "num_tokens": len(ids), "model": "base"}
    return Sample(f"p{problem}", index, text, grade=grade, **{**given, **fields})


def samples_of(*problems: str) -> dict[str, list[Sample]]:
    """A problem for each word, a sample for each of its letters, the letter being a verdict's first (n: no_answer)."""
    names = {verdict[0]: verdict for verdict in VERDICTS}
    return by_problem(
        [sample(p, i, names[letter]) for p, letters in enumerate(problems) for i, letter in enumerate(letters)]
    )


def rft_rows(problems: Mapping[str, list[Sample]], options: RejectOptions) -> list[Row]:
    """Of all problems."""
    return [row for key, group in problems.items() for row in building.rft_rows(key, sort_out(group, options), options)]


def preference_pairs(problems: Mapping[str, list[Sample]], options: RejectOptions) -> list[Pair]:
    """Of all problems."""
    return [
        pair
        for key, group in problems.items()
        for pair in building.preference_pairs(key, sort_out(group, options), options)
    ]


def counted(problems: Mapping[str, list[Sample]], options: RejectOptions) -> dict[str, Any]:
    """The statistics of all problems."""
    tally = Tally(options)
    for key, group in problems.items():
        alone = {key: group}
        tally.add(group, sort_out(group, options), rft_rows(alone, options), preference_pairs(alone, options))
    return statistics(tally)


# ---- rows ----


def test_every_correct_response_is_a_row_with_its_tokens_and_their_log_probs() -> None:
    rows = rft_rows(samples_of("cwcnte", "www"), RejectOptions())
    assert [row.messages[-1]["content"] for row in rows] == ["text 0 \\boxed{0}", "text 2 \\boxed{0}"]
    row = rows[0]
    assert row.messages[0] == {"role": "user", "content": "problem 0?"} and row.messages[1]["role"] == "assistant"
    assert (row.problem_id, row.origin, row.finish_reason) == ("p0", "self", "stop")
    assert row.response_ids == list(b"text ") and row.behavior_logp == [-0.5] * 5
    assert row.advantage is None and row.group_id is None


def test_at_most_k_rows_of_a_problem_drawn_by_the_seed() -> None:
    problems = samples_of("c" * 12, "cw", "c" * 12)

    def chosen(seed: int) -> list[str]:
        rows = rft_rows(problems, RejectOptions(max_per_problem=3, seed=seed))
        assert Counter(row.problem_id for row in rows) == {"p0": 3, "p1": 1, "p2": 3}
        return [row.messages[-1]["content"] for row in rows]

    assert chosen(1) == chosen(1)
    assert len({tuple(chosen(seed)) for seed in range(5)}) == 5
    firsts = Counter(text for seed in range(300) for text in chosen(seed) if text.endswith("{0}"))
    assert len(firsts) == 12 and min(firsts.values()) > 40, "each of 12 should be drawn about 75 times"
    picked = {text.split()[1] for text in chosen(1)[:3]}, {text.split()[1] for text in chosen(1)[4:]}
    assert picked[0] != picked[1], "problems must not share their draw"


def test_a_draw_does_not_depend_on_other_problems() -> None:
    problems, options = samples_of("c" * 9, "c" * 9), RejectOptions(max_per_problem=2)
    alone = rft_rows({"p1": problems["p1"]}, options)
    assert alone == rft_rows(problems, options)[2:]


def test_equal_texts_and_cut_off_responses_are_left_out_unless_asked_for() -> None:
    group = [sample(0, 0, "correct", "same"), sample(0, 1, "correct", "same"), sample(0, 2, "correct", "other")]
    group.append(sample(0, 3, "correct", "endless", finish_reason="length"))
    group.append(sample(1, 0, "correct", "same"))
    problems = by_problem(group)

    def texts(**options: Any) -> list[str]:
        return [row.messages[-1]["content"] for row in rft_rows(problems, RejectOptions(**options))]

    assert texts() == ["same", "other", "same"], "equal texts of different problems are different rows"
    assert texts(dedup=False) == ["same", "same", "other", "same"]
    assert texts(keep_truncated=True) == ["same", "other", "endless", "same"]
    counts = counted(problems, RejectOptions())
    assert (counts["correct"], counts["correct_truncated"], counts["correct_duplicates"]) == (5, 1, 1)


def test_log_probs_under_another_prompt_are_not_the_rows() -> None:
    problems = by_problem([sample(0, 0, "correct", prompt_name="qwen-boxed")])
    (raw,) = rft_rows(problems, RejectOptions())
    assert raw.behavior_logp is None and raw.response_ids is not None
    assert [turn["role"] for turn in raw.messages] == ["user", "assistant"]
    (sampled,) = rft_rows(problems, RejectOptions(prompt="sampled"))
    assert sampled.behavior_logp == [-0.5] * 5
    assert [turn["role"] for turn in sampled.messages] == ["system", "user", "assistant"]


def test_samples_without_tokens_make_rows_of_text() -> None:
    (row,) = rft_rows(by_problem([sample(0, 0, "correct", token_ids=[], logp=None)]), RejectOptions())
    assert row.response_ids is None and row.behavior_logp is None and row.messages[-1]["content"]


def test_the_verifier_decides() -> None:
    problems = by_problem([sample(0, 0, "wrong", qwen="correct"), sample(0, 1, "wrong"), sample(0, 2, "correct")])
    assert [row.messages[-1]["content"][:6] for row in rft_rows(problems, RejectOptions())] == ["text 2"]
    assert len(rft_rows(problems, RejectOptions(verifier="qwen"))) == 2
    (pair,) = preference_pairs(problems, RejectOptions(verifier="qwen"))
    assert pair.rejected.index == 1
    with pytest.raises(InputError, match="no verdict of verifier=qwen"):
        rft_rows(by_problem([sample(0, 0, "correct", qwen="")]), RejectOptions(verifier="qwen"))


# ---- pairs ----


@given(st.integers(0, 12), st.integers(0, 12), st.one_of(st.none(), st.integers(0, 150)))
def test_pairs_are_distinct_and_use_each_side_evenly(left: int, right: int, most: int | None) -> None:
    pairs = list(balanced_pairs(left, right, most))
    assert len(pairs) == len(set(pairs)) == min(left * right, left * right if most is None else most)
    for side, size in ((0, left), (1, right)):
        used = Counter(pair[side] for pair in pairs)
        counts = [used[i] for i in range(size)]
        assert not counts or max(counts) - min(counts) <= 1


problem_lists = st.lists(st.text("cwnte", min_size=1, max_size=8), min_size=1, max_size=6)


@given(problem_lists, st.one_of(st.none(), st.integers(0, 20)), st.sampled_from([("wrong",), ("wrong", "no_answer")]))
def test_pairs_are_a_correct_and_a_rejected_response_of_one_problem(
    words: list[str], most: int | None, rejected: tuple[str, ...]
) -> None:
    problems, options = samples_of(*words), RejectOptions(pairs_per_problem=most, rejected=rejected)
    pairs = preference_pairs(problems, options)
    assert pairs == preference_pairs(problems, options)
    for pair in pairs:
        assert pair.chosen.problem_id == pair.rejected.problem_id
        assert pair.chosen.grade == "correct" and pair.rejected.grade in rejected
        assert pair.prompt == [{"role": "user", "content": pair.chosen.problem}]
    for problem, word in enumerate(words):
        possible = word.count("c") * sum(word.count(verdict[0]) for verdict in rejected)
        mine = [pair for pair in pairs if pair.chosen.problem_id == f"p{problem}"]
        assert len(mine) == (possible if most is None else min(most, possible))
        assert len({(pair.chosen.index, pair.rejected.index) for pair in mine}) == len(mine)


def test_an_empty_answer_without_tokens_is_no_half_of_a_pair() -> None:
    empty = [sample(0, 1, "no_answer", "", token_ids=[], logp=None), sample(0, 2, "no_answer", "", token_ids=[2])]
    pairs = preference_pairs(by_problem([sample(0, 0, "correct"), *empty]), RejectOptions(pairs_per_problem=None))
    assert [pair.rejected.index for pair in pairs] == [2]


def test_which_responses_are_paired_depends_on_the_seed() -> None:
    problems = samples_of("cccccwwwww")
    found = {
        tuple((p.chosen.index, p.rejected.index) for p in preference_pairs(problems, RejectOptions(seed=seed)))
        for seed in range(30)
    }
    assert len(found) > 10


# ---- counts ----


@given(problem_lists, st.one_of(st.none(), st.integers(1, 4)), st.booleans(), st.booleans())
def test_counts_add_up(words: list[str], most: int | None, dedup: bool, keep_truncated: bool) -> None:
    options = RejectOptions(max_per_problem=most, dedup=dedup, keep_truncated=keep_truncated)
    problems = {
        key: [replace(one, response=f"text {one.index % 3}", finish_reason="stop length".split()[one.index % 2])
              for one in group]
        for key, group in samples_of(*words).items()
    }  # fmt: skip
    rows, pairs = rft_rows(problems, options), preference_pairs(problems, options)
    found = counted(problems, options)
    left_out = found["correct_truncated"] + found["correct_duplicates"] + found["correct_over_max"]
    assert found["correct"] == found["verdicts"]["correct"] == found["rows"] + left_out
    assert sum(found["verdicts"].values()) == found["samples"] == sum(map(len, words))
    assert sum(found["solve_rates"].values()) == found["problems"] == len(words)
    assert found["problems_none_correct"] == sum("c" not in word for word in words)
    assert found["problems_all_correct"] == sum(set(word) == {"c"} for word in words)
    assert found["rows"] == len(rows) and found["pairs"] == len(pairs) <= found["pairs_possible"]
    assert keep_truncated or not any(row.finish_reason == "length" for row in rows)


def test_solve_rates_by_count_where_problems_have_as_many_samples_and_by_tenths_where_not() -> None:
    def rates(*words: str) -> dict[str, int]:
        return counted(samples_of(*words), RejectOptions())["solve_rates"]

    assert rates("cw", "ww", "cc", "wc") == {"0/2": 1, "1/2": 2, "2/2": 1}
    found = rates("cw", "w", "ccc", "c" * 9 + "w", "cwwwwwwwww")
    assert {key: count for key, count in found.items() if count} == {
        "0%": 1, "10-20%": 1, "50-60%": 1, "90-100%": 1, "100%": 1,
    }  # fmt: skip


def test_limit_takes_the_first_problems() -> None:
    samples = [sample(p, i, "correct") for i in range(2) for p in (3, 1, 2)]
    assert {key: len(group) for key, group in by_problem(samples, 2).items()} == {"p3": 2, "p1": 2}


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_per_problem": 0}, "max_per_problem=0"),
        ({"pairs_per_problem": -1}, "pairs_per_problem=-1"),
        ({"pairs_per_problem": 1.5}, "whole number"),
        ({"rejected": ["wrong", "timeout"]}, "may be right"),
        ({"rejected": ["correct"]}, "use one or both of wrong, no_answer"),
        ({"rejected": []}, "use one or both"),
        ({"prompt": "digest-and-retell"}, "shows a reference"),
        ({"prompt": "nonsense"}, "no prompt 'nonsense'"),
        ({"verifier": "mine"}, "strict, qwen"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RejectOptions(**options)


def test_samples_that_do_not_tell_their_problem_or_prompt() -> None:
    with pytest.raises(InputError, match="sample 0 of problem p0 has no problem text"):
        rft_rows(by_problem([replace(sample(0, 0, "correct"), problem=" ")]), RejectOptions())
    with pytest.raises(InputError, match="does not tell its prompt"):
        rft_rows(by_problem([sample(0, 0, "correct", prompt_name="")]), RejectOptions(prompt="sampled"))


# ---- the command ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    group = [one for group in samples_of("cwwc", "ccww", "wnte", "cccc").values() for one in group]
    (tmp_path / "samples").mkdir()
    write_samples(tmp_path / "samples" / "samples.parquet", group)
    return tmp_path


def reject(folder: Path, *more: str, out: str = "out") -> dict[str, Any]:
    assert main([f"samples={folder / 'samples'}", f"output_dir={folder / out}", *more]) == 0
    return json.loads((folder / out / "statistics.json").read_text())


def test_files_rows_pairs_manifests_and_statistics(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = reject(folder, "pairs_per_problem=null")
    assert (found["rows"], found["pairs"], found["pairs_possible"]) == (8, 8, 8)
    out = folder / "out"
    table = read_rows(out / "rft.parquet")
    assert table.num_rows == 8 and set(table["origin"].to_pylist()) == {"self"}
    pairs = pq.read_table(out / "pairs.parquet")
    assert pairs.schema.equals(pair_schema())
    first = pairs.to_pylist()[0]
    assert first["prompt"] == [{"role": "user", "content": "problem 0?"}]
    assert first["chosen"][0]["role"] == first["rejected"][0]["role"] == "assistant"
    assert first["chosen_ids"] == list(b"text ") and first["rejected_finish_reason"] == "stop"
    for name in ("rft.parquet", "pairs.parquet"):
        manifest = json.loads((out / f"{name}.manifest.json").read_text())
        assert manifest["inputs"]["samples"]["sha256"] == sha256_file(folder / "samples" / "samples.parquet")
        assert manifest["rows_sha256"] == sha256_file(out / name) and manifest["seed"] == 0
        assert manifest["num_rows"] == 8 and "verl_dft" in manifest["versions"]
    page = (out / "statistics.md").read_text()
    assert "| rows in rft.parquet | 8 | 50.0% |" in page and page.strip() in capsys.readouterr().out
    assert "| 4/4 | 1 | 25.0% |" in page


def test_the_same_command_writes_the_same_bytes(folder: Path) -> None:
    reject(folder, "max_per_problem=1"), reject(folder, "max_per_problem=1", out="again")
    for name in ("rft.parquet", "pairs.parquet", "statistics.json", "statistics.md"):
        assert (folder / "out" / name).read_bytes() == (folder / "again" / name).read_bytes(), name


def test_another_configuration_is_refused_and_leaves_nothing_of_the_old_one_when_forced(folder: Path) -> None:
    reject(folder)
    with pytest.raises(InputError, match="pairs_per_problem differ"):
        reject(folder, "pairs_per_problem=0")
    assert (folder / "out" / "pairs.parquet").is_file()
    reject(folder, "pairs_per_problem=0", "overwrite=true")
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "config.json", "rft.parquet", "rft.parquet.manifest.json", "statistics.json", "statistics.md",
    ]  # fmt: skip


def test_part_by_part_the_same_rows_pairs_and_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = [one for group in samples_of(*["cwwc", "ncww", "cccc", "wwtw"] * 30).values() for one in group]
    path = folder / "samples" / "samples.parquet"
    write_samples(path, group)
    whole = reject(folder, "pairs_per_problem=null")
    monkeypatch.setattr(tables, "PART", 8)
    write_samples(path, group)
    alive = watch_samples(monkeypatch)
    assert reject(folder, "pairs_per_problem=null", out="parts") == whole
    for name in ("rft.parquet", "pairs.parquet"):
        assert pq.ParquetFile(folder / "parts" / name).num_row_groups > 10
        assert pq.read_table(folder / "parts" / name).equals(pq.read_table(folder / "out" / name)), name
    assert len(alive) == 2 * 480, "once to check them, once to make rows and pairs"
    assert max(alive) < 60, "samples of all problems are kept"


def test_an_error_in_the_last_problem_leaves_the_old_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reject(folder)
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    monkeypatch.setattr(tables, "PART", 2)
    group = [one for group in samples_of("cwwc", "cccc", "ccww").values() for one in group]
    write_samples(folder / "samples" / "samples.parquet", [*group, replace(sample(9, 0, "correct"), problem="")])
    with pytest.raises(InputError, match="sample 0 of problem p9 has no problem text"):
        reject(folder)
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before


def test_a_dry_run_counts_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"samples={folder / 'samples'}", f"output_dir={folder / 'out'}", "--dry-run", "limit=2"]) == 0
    text = capsys.readouterr().out
    assert "| problems | 2 |" in text and "dry run: nothing written" in text
    assert not (folder / "out").exists()


def test_bad_input_is_one_line_and_writes_nothing(folder: Path) -> None:
    write_samples(folder / "wrong.parquet", [sample(0, 0, "wrong"), sample(0, 1, "no_answer")])
    for more, message in (
        ([f"samples={folder / 'wrong.parquet'}"], "no response can be kept \\(1 wrong, 1 no_answer"),
        ([f"samples={folder / 'nothing'}"], "does not exist"),
        (["samples=[]"], "samples is empty"),
        (["limit=0"], "limit=0"),
        (["dedup=3"], "dedup=3"),
        (["rejected=error"], "may be right"),
        (["rejectd=wrong"], "did you mean rejected"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            reject(folder, *more)
        assert "\n" not in str(raised.value)
    assert not (folder / "out").exists()
