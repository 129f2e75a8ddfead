"""Rows as tensors: which tokens are trained, per-token columns, over-long rows, the cache."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import chat, family

from verl_dft.data import dataset as module
from verl_dft.data import tables
from verl_dft.data.dataset import load_dataset
from verl_dft.data.records import Row, write_rows
from verl_dft.data.selection import has_column, present_columns
from verl_dft.errors import InputError

QUESTION, ANSWER = "How many?", "x = 4 + 7 = 11."


@pytest.fixture
def tokenizer() -> Any:
    return family("qwen2")


@pytest.fixture
def load(tmp_path: Path, tokenizer: Any) -> Any:
    """`load(rows, max_length=…, …)` writes rows to a file and loads them."""

    def run(rows: list[Row] | list[dict], max_length: int = 512, name: str = "rows.parquet", **options: Any) -> Any:
        path = tmp_path / name
        if rows and isinstance(rows[0], dict):
            path = path.with_suffix(".jsonl")
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            write_rows(path, rows)
        return load_dataset(path, tokenizer, max_length=max_length, cache_dir=tmp_path / "cache", **options)

    return run


def text_row(question: str = QUESTION, answer: str = ANSWER, **fields: Any) -> Row:
    return Row(chat(question, answer), "p", "expert", **fields)


def sampled_row(ids: list[int], **fields: Any) -> Row:
    return Row(chat(QUESTION), "p", "self", response_ids=ids, **fields)


def prompt_ids(tokenizer: Any) -> list[int]:
    return tokenizer.apply_chat_template(chat(QUESTION), add_generation_prompt=True, return_dict=False)


def test_the_mask_selects_exactly_the_response_tokens(load: Any, tokenizer: Any) -> None:
    item = load([text_row()])[0]
    prompt = prompt_ids(tokenizer)
    response = tokenizer(ANSWER + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert item["input_ids"].tolist() == prompt + response
    assert item["loss_mask"].tolist() == [0] * len(prompt) + [1] * len(response)
    assert item["position_ids"].tolist() == list(range(len(prompt) + len(response)))
    assert {name: (value.dtype, value.dim()) for name, value in item.items()} == {
        name: (torch.int64, 1) for name in ("input_ids", "position_ids", "loss_mask")
    }


def test_report_and_lengths_count_tokens(load: Any, tokenizer: Any) -> None:
    rows = [text_row(), text_row(answer="4."), text_row("Solve for $y$.", "y = 6.")]
    data = load(rows)
    items = [data[i] for i in range(3)]
    assert data.lengths.tolist() == [len(item["input_ids"]) for item in items]
    assert data.report["num_tokens"] == sum(data.lengths)
    assert data.report["num_trained_tokens"] == sum(int(item["loss_mask"].sum()) for item in items)
    assert (data.report["rows_read"], data.report["rows_kept"]) == (3, 3)
    assert [tokenizer.decode(i["input_ids"][i["loss_mask"] == 1]) for i in items] == [
        f"{answer}<|im_end|>" for answer in (ANSWER, "4.", "y = 6.")
    ]
    assert data[-1]["input_ids"].tolist() == items[2]["input_ids"].tolist()
    with pytest.raises(IndexError):
        data[3]


# ---- stored ids and per-token columns ----


def test_stored_ids_are_used_as_they_are_with_values_beside_them(load: Any, tokenizer: Any) -> None:
    """A tokenisation that encoding would never give (letter by letter) must survive, end token and all."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "many"] + [end]
    values = [-0.1, -0.2, -0.3, -0.4, -0.5]
    row = sampled_row(ids, ref_logp=values, behavior_logp=[*values[:4], float("nan")], advantage=-1.5)
    data = load([row], columns=["ref_logp", "behavior_logp", "advantage"])
    item, start = data[0], len(prompt_ids(tokenizer))
    assert item["input_ids"].tolist() == prompt_ids(tokenizer) + ids
    assert item["loss_mask"].nonzero()[:, 0].tolist() == list(range(start, start + 5))
    assert item["ref_logp"].tolist() == pytest.approx([0.0] * start + values)
    assert item["behavior_logp"][:start].isnan().all() and item["behavior_logp"][-1].isnan()
    assert item["behavior_logp"][start:-1].tolist() == pytest.approx(values[:4])
    assert item["advantage"].tolist() == [-1.5] and item["advantage"].dtype == torch.float32
    assert data.report["end_tokens_appended"] == data.report["end_tokens_without_value"] == 0


@pytest.mark.parametrize(
    ("last", "reason", "appended", "cut_off"),
    [
        ("11", None, 1, 0),  # stopped by itself (a stop string, or an engine that leaves the end token out)
        ("11", "stop", 1, 0),
        ("11", "length", 0, 1),  # cut by the token limit: the text does not end there
        ("<|im_end|>", "stop", 0, 0),
        ("<|im_end|>", "length", 0, 0),
    ],
)
def test_end_token_is_appended_only_where_generation_stopped_without_it(
    load: Any, tokenizer: Any, last: str, reason: str | None, appended: int, cut_off: int
) -> None:
    ids = tokenizer(f"x = {last}", add_special_tokens=False)["input_ids"]
    values = [-1.0] * len(ids)
    row = sampled_row(ids, finish_reason=reason, ref_logp=values, behavior_logp=values)
    data = load([row], columns=["ref_logp", "behavior_logp"])
    item, start = data[0], len(prompt_ids(tokenizer))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert item["input_ids"].tolist()[start:] == ids + [end] * appended
    assert item["loss_mask"].sum() == len(ids) + appended
    assert data.report["end_tokens_appended"] == data.report["end_tokens_without_value"] == appended
    assert data.report["rows_cut_off"] == cut_off
    if appended:
        assert item["ref_logp"][-1] == 0 and item["behavior_logp"][-1].isnan()
    assert (item["ref_logp"][start : start + len(ids)] == -1).all()


def test_rows_without_a_sampler_have_unknown_behaviour(load: Any) -> None:
    rows = [text_row(), sampled_row([20, 21], behavior_logp=[-0.5, -0.25])]
    data = load(rows, columns=["behavior_logp"])
    assert data[0]["behavior_logp"].isnan().all() and data[0]["behavior_logp"].shape == data[0]["input_ids"].shape
    assert data[1]["behavior_logp"].nan_to_num(0).sum() == -0.75
    assert data.report["rows_without_behavior_logp"] == 1


@pytest.mark.parametrize(
    ("column", "rows", "builder"),
    [
        ("advantage", [text_row(advantage=1.0), text_row()], "verl-dft groups"),
        ("ref_logp", [sampled_row([20], ref_logp=[-1.0]), text_row()], "verl-dft score"),
        ("behavior_logp", [text_row(), text_row()], "verl-dft sample"),
    ],
)
def test_missing_column_names_file_row_and_builder(load: Any, column: str, rows: list[Row], builder: str) -> None:
    row = 0 if column == "behavior_logp" else 1
    with pytest.raises(InputError, match=rf"rows\.parquet: row {row}: no value in column '{column}'.*{builder}"):
        load(rows, columns=[column])


def test_present_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", [sampled_row([20], ref_logp=[-1.0], behavior_logp=[-1.0]), text_row()])
    write_rows(tmp_path / "b.parquet", [text_row(advantage=0.0)])
    assert present_columns(tmp_path / "a.parquet") == {"behavior_logp"}
    assert present_columns([tmp_path / "b.parquet"]) == {"advantage"}
    assert present_columns([tmp_path / "a.parquet", tmp_path / "b.parquet"]) == {"behavior_logp"}


def test_ids_of_another_tokenizer_are_refused(load: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"row 1: column 'response_ids' holds ids that tokenizer .* does not have"):
        load([sampled_row([20]), sampled_row([len(tokenizer)])])


# ---- over-long rows ----


def test_overlong_policies_around_the_exact_limit(load: Any, tokenizer: Any) -> None:
    rows = [text_row(answer="4."), text_row(), text_row("Solve for $y$ : " * 20, "6.")]
    lengths = load(rows).lengths.tolist()
    assert lengths[0] < lengths[1] < lengths[2]
    limit = lengths[1]

    kept = load(rows, limit)  # a row of exactly max_length stays
    assert kept.lengths.tolist() == lengths[:2]
    assert (kept.report["rows_dropped_overlong"], kept.report["rows_truncated"]) == (1, 0)

    cut = load(rows, limit - 1, overlong="truncate")
    assert cut.lengths.tolist() == [lengths[0], limit - 1]  # the third's prompt alone is too long
    assert cut.report["rows_truncated"] == 1
    assert cut.report["rows_dropped_overlong"] == cut.report["rows_dropped_long_prompt"] == 1
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    # one token too many: what goes is the end token, and none is put in its place
    assert cut[1]["input_ids"].tolist() == kept[1]["input_ids"].tolist()[:-1]
    assert cut[1]["input_ids"][-1] != end and cut[0]["input_ids"][-1] == end

    with pytest.raises(InputError, match=rf"row 2: {lengths[2]} tokens .* exceed data.max_length={limit}"):
        load(rows, limit, overlong="error")


def test_truncation_cuts_values_with_their_tokens(load: Any, tokenizer: Any) -> None:
    start = len(prompt_ids(tokenizer))
    row = sampled_row([20, 21, 22], ref_logp=[-1.0, -2.0, -3.0])
    item = load([row], start + 2, overlong="truncate", columns=["ref_logp"])[0]
    assert item["input_ids"].tolist()[start:] == [20, 21]
    assert item["ref_logp"].tolist()[start:] == [-1.0, -2.0]


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_all_rows_dropped_is_an_error(load: Any, overlong: str) -> None:
    shortest = load([text_row(answer="4.")]).lengths[0]
    with pytest.raises(InputError, match=rf"all 2 rows are longer .*\(the shortest has {shortest} tokens\); raise it"):
        load([text_row(), text_row(answer="4.")], 5, overlong=overlong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlong": "cut"}, "data.overlong is 'cut'; use one of drop, truncate, error"),
        ({"columns": ["reward"]}, "no column 'reward'; training rows can have advantage, ref_logp, behavior_logp"),
        ({"max_length": 1}, "data.max_length is 1"),
        ({"num_proc": 0}, "num_proc must be at least 1"),
        ({"max_rows": 0}, "max_rows is 0"),
    ],
)
def test_bad_options(load: Any, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load([text_row()], **options)


def test_missing_file_and_no_files(tmp_path: Path, tokenizer: Any) -> None:
    for files, message in (([tmp_path / "no.parquet"], "no.parquet does not exist"), ([], "no row files were given")):
        with pytest.raises(InputError, match=message):
            load_dataset(files, tokenizer, max_length=9, cache_dir=tmp_path)


# ---- reading and caching ----


def test_max_rows_and_several_files_keep_the_order(tmp_path: Path, tokenizer: Any) -> None:
    for name, answers in (("a", ["1.", "2."]), ("b", ["3.", "4."])):
        write_rows(tmp_path / f"{name}.parquet", [text_row(answer=answer) for answer in answers])
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for max_rows, want in ((None, 4), (-1, 4), (3, 3)):
        data = load_dataset(files, tokenizer, max_length=99, max_rows=max_rows, cache_dir=tmp_path / "cache")
        answers = [tokenizer.decode(data[i]["input_ids"][-3:-1])[-2:] for i in range(len(data))]
        assert answers == ["1.", "2.", "3.", "4."][:want]
    with pytest.raises(InputError, match=r"b\.parquet: row 1: 3\d tokens"):
        rows = [text_row(answer="3."), text_row()]
        write_rows(tmp_path / "b.parquet", rows)
        limit = int(load_dataset(files, tokenizer, max_length=99, cache_dir=tmp_path / "cache").lengths[0])
        load_dataset(files, tokenizer, max_length=limit, overlong="error", cache_dir=tmp_path / "cache")


def test_second_load_reads_the_cache(load: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load([text_row()])
    monkeypatch.setattr(module, "encode_parts", lambda *a: pytest.fail("tokenised again"))
    again = load([text_row()])
    assert again.folder == first.folder and again.report == first.report
    tokenizer(["a call that changes", "the tokenizer's truncation state"], truncation=True, max_length=2, padding=True)
    assert load([text_row()]).folder == first.folder


def test_whatever_the_tokens_depend_on_makes_another_cache(load: Any, tokenizer: Any) -> None:
    rows = [text_row(advantage=1.0), text_row()]
    folders = [load(rows).folder, load(rows, 511).folder, load(rows, overlong="truncate").folder]
    folders += [load(rows, max_rows=1).folder, load(rows[:1]).folder, load(rows[:1], columns=["advantage"]).folder]
    tokenizer.chat_template = tokenizer.chat_template.replace("helpful", "helpless")
    folders.append(load(rows).folder)
    tokenizer.eos_token = "<|endoftext|>"
    folders.append(load(rows).folder)
    assert len(set(folders)) == len(folders)


def test_a_failed_build_leaves_nothing_behind(load: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        load([text_row()], 5)
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"] == []


def _load_in_child(path: Path, cache: Path, queue: Any) -> None:
    data = load_dataset(path, family("qwen2"), max_length=99, cache_dir=cache)
    queue.put((str(data.folder), data.report["num_tokens"], (data.folder / "meta.json").stat().st_ino))


def test_two_processes_build_one_cache(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", [text_row(answer=f"x = {i}.") for i in range(300)])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (tmp_path / "rows.parquet", tmp_path / "cache", queue)
    children = [context.Process(target=_load_in_child, args=arguments) for _ in range(2)]
    for child in children:
        child.start()
    results = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
    # the same inode: the second waited and read, it did not build again
    assert results[0] == results[1]
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()] == [Path(results[0][0]).name]


def test_part_by_part_the_same_arrays(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl_dft.data import arrays, encode

    rows = [text_row(answer=f"x = {i}." * (1 + 9 * (i % 5 == 4)), group_id=f"g{i // 4}") for i in range(21)]
    rows += [sampled_row([20 + i] * (i + 1), behavior_logp=[-1.0 - i] * (i + 1)) for i in range(9)]
    write_rows(tmp_path / "rows.parquet", rows)
    kept: list[int] = []
    append = arrays.GrowingArray.append
    monkeypatch.setattr(arrays.GrowingArray, "append", lambda self, v: (kept.append(len(v)), append(self, v))[1])
    loaded = []
    for size in (2000, 4):
        monkeypatch.setattr(encode, "CHUNK_ROWS", size)
        monkeypatch.setattr(tables, "PART", size)
        loaded.append(
            load_dataset(
                tmp_path / "rows.parquet", tokenizer, max_length=40, columns=["behavior_logp", "origin"],
                cache_dir=tmp_path / f"cache{size}",
            )
        )  # fmt: skip
    whole, parts = loaded
    assert whole.report == parts.report and whole.report["rows_dropped_overlong"] == 4
    assert whole.report["rows_without_behavior_logp"] == 17 and whole.report["rows_read"] == 30
    for name in ("tokens", "offsets", "prompt_lens", "groups", "behavior_logp", "origin"):
        file = f"{name}.npy"
        assert (parts.folder / file).read_bytes() == (whole.folder / file).read_bytes(), name
    assert max(kept[len(kept) // 2 + 1 :]) < len(whole._tokens) / 3, "more than a part was written at once"


@pytest.mark.parametrize("parts", [[], [3], [0, 5], [1, 2, 3, 100_000]])
def test_an_array_that_grew_is_the_file_of_the_whole_one(tmp_path: Path, parts: list[int]) -> None:
    from verl_dft.data.arrays import GrowingArray

    values = [np.arange(number, dtype=np.int32) for number in parts]
    with GrowingArray(tmp_path / "grown.npy", np.int32) as grown:
        for value in values:
            grown.append(value)
    np.save(tmp_path / "whole.npy", np.concatenate([np.zeros(0, np.int32), *values]))
    assert (tmp_path / "grown.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_tokenising_in_processes_gives_the_same_arrays(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verl_dft.data import encode

    monkeypatch.setattr(encode, "CHUNK_ROWS", 7)
    rows = [text_row(answer=f"x = {i}." * (1 + i % 5)) for i in range(40)] + [sampled_row([20 + i]) for i in range(10)]
    one = load(rows, num_proc=1)
    arrays = {f.name: f.read_bytes() for f in one.folder.iterdir()}
    for file in one.folder.iterdir():
        file.unlink()
    one.folder.rmdir()
    two = load(rows, num_proc=2)
    assert {f.name: f.read_bytes() for f in two.folder.iterdir()} == arrays


def test_a_pickled_dataset_is_small_and_whole(load: Any) -> None:
    data = load([text_row(answer=f"x = {i}.", advantage=float(i)) for i in range(500)], columns=["advantage"])
    pickled = pickle.dumps(data)
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    assert len(again) == 500 and np.array_equal(again.lengths, data.lengths)
    assert again[7]["advantage"].tolist() == [7.0]
    assert again[499]["input_ids"].tolist() == data[499]["input_ids"].tolist()


def test_origins_as_a_column_and_as_a_filter(load: Any) -> None:
    rows = [Row(chat(QUESTION, f"{i}."), f"p{i}", origin) for i, origin in enumerate(["expert", "self", "guided"])]
    rows.append(Row(chat(QUESTION, "a b c d e f g h i j k l m n o p"), "p3", "self"))
    whole = load(rows, columns=["origin"])
    assert [float(whole[i]["origin"]) for i in range(4)] == [0, 2, 3, 2]
    some = load(rows, columns=["origin"], origins=["self", "guided"])
    assert [float(some[i]["origin"]) for i in range(len(some))] == [2, 3, 2]
    assert some.report["rows_other_origins"] == 1 and some.report["rows_read"] == 3
    with pytest.raises(InputError, match="data.origins has 'me'"):
        load(rows, origins=["me"])
    with pytest.raises(InputError, match="no row has an origin"):
        load(rows[:1], name="one.parquet", origins=["self"])
    with pytest.raises(InputError, match=r"row 3: \d+ tokens"):  # the file's numbering
        load(rows, origins=["self"], max_length=len(some[0]["input_ids"]) + 4, overlong="error")


def test_a_column_can_be_added_and_travels_to_workers(load: Any, tmp_path: Path) -> None:
    rows = load([text_row(), text_row("Why so?")])
    values = np.arange(int(rows.lengths.sum()), dtype=np.float32)
    np.save(tmp_path / "ref_logp.npy", values)
    rows.add_column("ref_logp", tmp_path / "ref_logp.npy")
    for copy in (rows, pickle.loads(pickle.dumps(rows))):
        assert copy[1]["ref_logp"].tolist() == values[rows.flat(1)].tolist()


def test_reference_log_probs_of_some_rows_only_are_refused(load: Any, tmp_path: Path) -> None:
    rows = [sampled_row([5, 6], ref_logp=[-1.0, -2.0]), sampled_row([7, 8])]
    rows[1].origin = "expert"
    write_rows(tmp_path / "half.parquet", rows)
    files = [tmp_path / "half.parquet"]
    with pytest.raises(InputError, match=r"row 1: no value in column 'ref_logp', which other rows have"):
        has_column(files, "ref_logp", -1, None)
    assert has_column(files, "ref_logp", -1, ["self"]) and has_column(files, "ref_logp", 1, None)
    assert not has_column(files, "ref_logp", -1, ["expert"])


def test_groups_are_numbered_also_where_rows_between_them_are_dropped(load: Any, tmp_path: Path) -> None:
    rows = [text_row(group_id="b"), text_row(answer=ANSWER * 40, group_id="a"), text_row(group_id="a"), text_row()]
    dataset = load([*rows, text_row(group_id="b")], max_length=100)
    codes = dataset.groups.tolist()
    assert len(codes) == 4 and codes[0] == codes[3] >= 0 and codes[1] not in (codes[0], -1) and codes[2] == -1
    assert pickle.loads(pickle.dumps(dataset)).groups.tolist() == codes
    assert load([text_row()], name="none.parquet").groups.tolist() == [-1]
