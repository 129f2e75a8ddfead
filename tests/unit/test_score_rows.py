"""``verl-dft score`` without a model: which rows are scored, the file that is written, the store, the statistics."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import data_helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from verl_dft.data.dataset import load_dataset
from verl_dft.data.records import Row, write_rows
from verl_dft.errors import InputError
from verl_dft.training import score_statistics as statistics
from verl_dft.training.score_head import compare
from verl_dft.training.score_rows import KL_COLUMNS, ScoreRows, load_score_rows, scored_table, write_scored
from verl_dft.training.score_setup import compose_score
from verl_dft.training.score_shards import ShardStore, score_missing

QUESTION = {"role": "user", "content": "What is 2 + 3?"}


def text_row(problem: str, answer: str, origin: str = "expert", **columns: Any) -> Row:
    return Row([QUESTION, {"role": "assistant", "content": answer}], problem, origin, **columns)


def load(path: Path, cache: Path, family: str = "qwen2", **options: Any) -> ScoreRows:
    options = {"max_length": 256, "overlong": "drop", **options}
    return load_score_rows([path], data_helpers.family(family), cache_dir=cache, **options)


def fake_values(rows: ScoreRows, lines: int = 1) -> np.ndarray:
    """Different for every token."""
    total = int(rows.responses.sum())
    return -np.arange(1, lines * total + 1, dtype=np.float32).reshape(lines, total)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Texts, stored ids with and without an end token, an unfinished one, and one that is long."""
    tokenizer = data_helpers.family("qwen2")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = tokenizer("y = 6", add_special_tokens=False)["input_ids"]
    rows = [
        text_row("text", "y = 6"),
        Row([QUESTION], "stopped", "self", response_ids=ids, behavior_logp=[-0.5] * len(ids), reward=1.0),
        Row([QUESTION], "ended", "guided", response_ids=[*ids, end], behavior_logp=[-0.25] * (len(ids) + 1)),
        Row([QUESTION], "cut", "self", response_ids=ids, finish_reason="length"),
        text_row("long", "Let x be the number of apples. " * 8, group_id="g"),
    ]
    return write_rows(tmp_path / "mixed.parquet", rows)


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_what_is_written_is_what_training_reads(mixed: Path, tmp_path: Path, overlong: str) -> None:
    """The tokens of a scored file are those that training on the given file would train on."""
    tokenizer, limit = data_helpers.family("qwen2"), 64
    options = {"max_length": limit, "overlong": overlong, "cache_dir": tmp_path / "cache"}
    before = load_dataset(mixed, tokenizer, **options)
    rows = load(mixed, tmp_path / "cache", max_length=limit, overlong=overlong)
    values = fake_values(rows)
    write_scored(tmp_path / "rows.parquet", scored_table(rows, "ref_logp", values))
    after = load_dataset(tmp_path / "rows.parquet", tokenizer, columns=["ref_logp", "behavior_logp"], **options)
    expected = load_dataset(mixed, tokenizer, columns=["behavior_logp"], **options)
    assert len(before) == len(after) == len(rows) == (4 if overlong == "drop" else 5)
    at = 0
    for index in range(len(after)):
        for name in ("input_ids", "loss_mask"):
            assert before[index][name].tolist() == after[index][name].tolist() == rows[index][name].tolist()
        np.testing.assert_array_equal(after[index]["behavior_logp"], expected[index]["behavior_logp"])
        trained = after[index]["loss_mask"].bool()
        count = int(trained.sum())
        assert after[index]["ref_logp"][trained].tolist() == values[0, at : at + count].tolist()
        assert not after[index]["ref_logp"][~trained].any()
        at += count
    assert at == values.shape[1]
    assert after.report["end_tokens_appended"] == 0 and after.report["rows_cut_off"] == 1 + (overlong == "truncate")


def test_rows_that_do_not_fit_are_counted_and_named(mixed: Path, tmp_path: Path) -> None:
    rows = load(mixed, tmp_path / "cache", max_length=64)
    assert (rows.report["rows_read"], rows.report["rows_scored"], rows.report["rows_dropped_overlong"]) == (5, 4, 1)
    assert [d["problem_id"] for d in rows.dropped] == ["long"] and rows.dropped[0]["row"] == f"{mixed}: row 4"
    assert rows.dropped[0]["tokens"] > 64
    with pytest.raises(InputError, match=r"mixed.parquet: row 4: \d+ tokens .* exceed data.max_length=64"):
        load(mixed, tmp_path / "cache", max_length=64, overlong="error")
    with pytest.raises(InputError, match="all 5 rows are longer than data.max_length=5"):
        load(mixed, tmp_path / "cache", max_length=5)


def test_further_columns_stay(mixed: Path, tmp_path: Path) -> None:
    table = pq.read_table(mixed)
    mine = pa.array([{"n": i} for i in range(5)])
    pq.write_table(table.append_column("mine", mine).append_column("ref_logp", pa.nulls(5)), tmp_path / "more.parquet")
    rows = load(tmp_path / "more.parquet", tmp_path / "cache", max_length=64)
    scored = scored_table(rows, "ref_logp", fake_values(rows, 3))
    assert scored["mine"].to_pylist() == [{"n": i} for i in range(4)]
    assert scored["reward"].to_pylist() == [None, 1.0, None, None] and "group_id" not in scored.column_names
    total = int(rows.responses.sum())
    assert scored[KL_COLUMNS[1]].combine_chunks().flatten().to_pylist() == list(
        range(-2 * total - 1, -3 * total - 1, -1)
    )
    # one value an id: the end token that training appends has none of the sampler's
    assert np.isnan(scored["behavior_logp"].to_pylist()[1][-1]) and scored["behavior_logp"].to_pylist()[0] is None


@pytest.mark.parametrize("mixed_types", [False, True])
def test_further_columns_of_jsonl(tmp_path: Path, capsys: pytest.CaptureFixture[str], mixed_types: bool) -> None:
    """What arrow cannot hold is left out with a warning; the rows are scored all the same."""
    messages = [QUESTION, {"role": "assistant", "content": "y = 6"}]
    records = [{"messages": messages, "n": 1}, {"messages": messages, "n": "one" if mixed_types else 2}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = load(tmp_path / "rows.jsonl", tmp_path / "cache")
    table = scored_table(rows, "ref_logp", fake_values(rows))
    assert ("n" in table.column_names) != mixed_types and table.num_rows == 2
    assert ("further columns are left out" in capsys.readouterr().err) == mixed_types
    assert table["problem_id"].to_pylist() == ["rows/0", "rows/1"]


def test_problems_choose_rows(mixed: Path, tmp_path: Path) -> None:
    rows = load(mixed, tmp_path / "cache", problems=frozenset({"ended", "cut", "nowhere"}))
    assert rows.table["problem_id"].to_pylist() == ["ended", "cut"]
    assert rows.report["rows_of_other_problems"] == 3
    with pytest.raises(InputError, match="of other problems; no row is left"):
        load(mixed, tmp_path / "cache", problems=frozenset({"nowhere"}))


@pytest.mark.parametrize("family", ["no-generation", "reasoning"])
def test_texts_that_ids_cannot_stand_for_are_refused(family: str, tmp_path: Path) -> None:
    """No generation prompt; one that opens the reasoning, which the text does not."""
    path = write_rows(tmp_path / "rows.parquet", [text_row("a", "y = 6")])
    with pytest.raises(InputError, match="rows.parquet: row 0: .* does not begin where generation would begin"):
        load(path, tmp_path / "cache", family)


@pytest.mark.parametrize("family", sorted({*data_helpers.FAMILIES} - {"no-generation"}))
def test_ids_stand_for_texts(family: str, tmp_path: Path) -> None:
    answer = "<think>\nHm.\n</think>\n\ny = 6" if family == "reasoning" else "y = 6"
    path = write_rows(tmp_path / "rows.parquet", [text_row("a", answer)])
    rows = load(path, tmp_path / "cache", family)
    write_scored(tmp_path / "scored.parquet", scored_table(rows, "ref_logp", fake_values(rows)))
    again = load(tmp_path / "scored.parquet", tmp_path / "cache", family)
    assert again[0]["input_ids"].tolist() == rows[0]["input_ids"].tolist()
    assert again.report["end_tokens_appended"] == 0


def test_comparison_of_logits_against_float64() -> None:
    torch.manual_seed(0)
    ours, theirs = 5 * torch.randn(7, 1000), 5 * torch.randn(7, 1000)
    ours[0, 1:] = -torch.inf  # ruled out: adds nothing here, and makes the other direction infinite
    theirs[1] = ours[1]
    labels = torch.arange(7)
    p, q = ours.double().softmax(-1), theirs.double().softmax(-1)
    expected = [p.log().gather(-1, labels[:, None])[:, 0]]
    expected += [torch.special.xlogy(a, a).sum(-1) - torch.special.xlogy(a, b).sum(-1) for a, b in ((p, q), (q, p))]
    found = compare(ours, theirs, labels)
    assert found[0, 2] == torch.inf == expected[2][0]
    torch.testing.assert_close(found.double(), torch.stack(expected, -1), atol=1e-5, rtol=1e-5)


# ---- the store ----


def stored(folder: Path, rows: ScoreRows, score: Any, shard_size: int = 2) -> ShardStore:
    store = ShardStore(folder, rows, shard_size, 1)
    score_missing({"rows": store}, {"rows": store.missing()}, score)
    return store


def test_only_missing_and_damaged_shards_are_scored(mixed: Path, tmp_path: Path) -> None:
    rows = load(mixed, tmp_path / "cache")
    seen: list[int] = []

    def score(items: Any) -> list[np.ndarray]:
        seen.append(len(items))
        # a token's own id, so that a value at another token's place shows
        return [-item["input_ids"][-int(item["loss_mask"].sum()) :].float().numpy()[None] for item in items]

    first = stored(tmp_path / "a", rows, score).values()
    assert seen == [2, 2, 1]
    expected = [rows[i]["input_ids"][rows.prompt_lens[i] :].numpy() for i in range(len(rows))]
    np.testing.assert_array_equal(first[0], -np.concatenate(expected))
    store = stored(tmp_path / "a", rows, score)
    assert seen == [2, 2, 1], "nothing was missing"
    store.path(0).write_bytes(store.path(0).read_bytes()[:-4])
    np.save(store.path(2), np.zeros((1, 3), dtype=np.float32))
    assert store.missing() == [0, 2]
    np.testing.assert_array_equal(stored(tmp_path / "a", rows, score).values(), first)
    assert seen == [2, 2, 1, 2, 1]


def test_a_full_disk_is_one_line_and_costs_one_shard(mixed: Path, tmp_path: Path) -> None:
    rows = load(mixed, tmp_path / "cache")
    store = ShardStore(tmp_path / "a", rows, 2, 1)
    values = [[np.full((1, int(rows.responses[i])), -1, dtype=np.float32) for i in shard] for shard in store.shards]
    store.write(0, values[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))  # no file may grow beyond 16 bytes
    try:
        with pytest.raises(InputError, match="cannot be written to .*; what is stored is kept: make room") as error:
            store.write(1, values[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert store.missing() == [1, 2]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["000000.npy"], "no half of a file is left"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95, 0.9999])
def test_a_shard_with_a_turned_bit_is_scored_again(mixed: Path, tmp_path: Path, share: float) -> None:
    rows = load(mixed, tmp_path / "cache")
    store = ShardStore(tmp_path / "a", rows, 2, 1)
    for number, shard in enumerate(store.shards):
        store.write(number, [np.full((1, int(rows.responses[i])), -1, dtype=np.float32) for i in shard])
    assert store.missing() == [] and set(store.values()[0]) == {-1}
    data = bytearray(store.path(1).read_bytes())
    data[int(share * len(data))] ^= 1
    store.path(1).write_bytes(data)
    assert store.missing() == [1]
    store.path(1).write_bytes(b"")
    assert store.missing() == [1]


@pytest.mark.parametrize("bad", [np.nan, -np.inf, 0.5])
def test_what_is_no_log_prob_is_refused(mixed: Path, tmp_path: Path, bad: float) -> None:
    rows = load(mixed, tmp_path / "cache")
    values = [np.full((1, int(count)), -1, dtype=np.float32) for count in rows.responses]
    values[-1][0, -1] = bad
    with pytest.raises(InputError, match="has a log-prob of .*; try precision=fp32"):
        ShardStore(tmp_path / "a", rows, 5, 1).write(0, [values[i] for i in range(5)])
    assert not (tmp_path / "a").exists()


# ---- statistics ----


def some_rows(rng: np.random.Generator, problems: list[str], origin: str, level: float) -> statistics.Scored:
    tokens = rng.integers(5, 50, len(problems))
    logp = tokens * rng.normal(level, 0.1, len(problems))
    return statistics.Scored(problems, [origin] * len(problems), logp, tokens, {})


def test_means_and_errors_of_one_row_a_problem() -> None:
    rows = some_rows(np.random.default_rng(0), [f"p{i}" for i in range(200)], "self", -0.5)
    found = statistics.describe(rows)
    assert (found["problems"], found["rows"], found["tokens"]) == (200, 200, int(rows.tokens.sum()))
    assert found["sequence_sum"]["mean"] == pytest.approx(rows.logp.mean())
    assert found["sequence_sum"]["se"] == pytest.approx(rows.logp.std(ddof=1) / np.sqrt(200))
    assert found["per_token"]["mean"] == pytest.approx(rows.logp.sum() / rows.tokens.sum())


def test_errors_cover_what_repeated_draws_of_problems_show() -> None:
    """Rows of a problem are alike: the clustered error is that of redrawing problems, not rows."""
    rng = np.random.default_rng(1)
    means, errors = [], []
    for _ in range(400):
        size = rng.integers(1, 6, 60)
        problems = [f"p{i}" for i, n in enumerate(size) for _ in range(n)]
        shared = np.repeat(rng.normal(-0.5, 0.2, 60), size)
        tokens = rng.integers(5, 50, len(problems))
        found = statistics.describe(statistics.Scored(problems, ["self"] * len(problems), tokens * shared, tokens, {}))
        means.append(found["per_token"]["mean"])
        errors.append(found["per_token"]["se"])
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.12)
    assert statistics.ratio(np.ones(3), np.ones(3), ["a"] * 3) == {"mean": 1.0, "se": None}


def test_by_stage_compares_the_same_problems() -> None:
    rng = np.random.default_rng(2)
    stages = {"self": -0.3, "guided": -0.6, "expert": -0.9}
    ids = {stage: [f"{stage}{i}" for i in range(40)] for stage in stages}
    parts = [some_rows(rng, ids[stage], stage, level) for stage, level in stages.items()]
    names = [name for part in parts for name in part.problems]
    origins = [origin for part in parts for origin in part.origins]
    logp, tokens = (np.concatenate([getattr(part, name) for part in parts]) for name in ("logp", "tokens"))
    joined = statistics.Scored(names, origins, logp, tokens, {})
    expert = some_rows(rng, [*names[1:], "stranger"], "expert", -0.8)
    found = statistics.by_stage(joined, expert)
    assert list(found) == ["self", "guided", "expert"]
    assert [found[s]["problems_without_expert"] for s in found] == [1, 0, 0]
    assert [found[s]["expert"]["problems"] for s in found] == [39, 40, 40]
    mine = {name: value for name, value in zip(expert.problems, expert.logp, strict=True)}
    at = {name: value for name, value in zip(joined.problems, joined.logp, strict=True)}
    differences = np.array([at[name] - mine[name] for name in ids["self"][1:]])
    assert found["self"]["difference"]["sequence_sum"]["mean"] == pytest.approx(differences.mean())
    assert found["self"]["difference"]["sequence_sum"]["se"] == pytest.approx(differences.std(ddof=1) / np.sqrt(39))
    per_token = [found["guided"][text]["per_token"]["mean"] for text in ("rewritten", "expert")]
    assert found["guided"]["difference"]["per_token"]["mean"] == pytest.approx(per_token[0] - per_token[1])
    text = statistics.markdown(
        {
            "model": "m",
            "reference": None,
            "rows": {"rows_read": 120},
            "by_origin": statistics.by_origin(joined),
            "by_stage": found,
        }
    )
    assert "| guided | 40 | expert | 40 |" in text and "want of an expert text of the problem: self 1" in text


# ---- the command line ----


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["column=advantage"], "column=advantage is not one of ref_logp, behavior_logp"),
        (["backend=hf"], "backend=hf is not one of verl, vllm"),
        (["kl=true"], "kl=true compares two models; give the second as reference.path=FOLDER"),
        (["reference.path=B"], "reference.path is the second model of kl=true"),
        (["kl=true", "reference.path=B", "backend=vllm"], "use backend=verl"),
        (["limit=0"], "limit=0 must be a whole number of at least 1"),
        (["shard_size=3", "trainer.n_gpus_per_node=2"], "not divisible by 2 data-parallel ranks"),
        (["backend=vllm", "trainer.n_gpus_per_node=2"], "backend=vllm runs in one process"),
        (["data.origins=[self]"], "score takes limit=N"),
        (["launcher=ray"], "set launcher=torchrun"),
        (["data.overlong=wrap"], "data.overlong=wrap is not one of"),
    ],
)
def test_bad_options_are_one_line(monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str) -> None:
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")
    with pytest.raises(InputError, match=message) as error:
        compose_score(["model=a/b", "output_dir=x", *overrides])
    assert "\n" not in str(error.value)


def test_model_and_output_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")
    with pytest.raises(InputError, match="model.path is not set"):
        compose_score(["output_dir=x"])
    with pytest.raises(InputError, match="output_dir is not set"):
        compose_score(["model=a/b"])
