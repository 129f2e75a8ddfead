"""Files of samples: what is read when, how often, and what is refused."""

from __future__ import annotations

import json
import os
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sample_helpers import watch_samples

from verl_dft.build.reject import by_problem
from verl_dft.data import row_groups, tables
from verl_dft.errors import InputError
from verl_dft.sampling.record import Sample, StoredSamples, read_samples, write_samples

NUM = 500


def made(number: int = NUM, each: int = 4, **changed: Any) -> list[Sample]:
    ids = [array("q", [i, i + 1]) for i in range(number)]
    return [
        Sample(f"p{i // each}", i % each, f"text {i}", "stop", "correct" if i % 3 else "wrong", problem=f"q{i // each}",
               token_ids=ids[i], num_tokens=2, logp=array("d", [-0.5, -i]), qwen="wrong", answer=None, **changed)
        for i in range(number)
    ]  # fmt: skip


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PART", 50)


def num_decoded(samples: StoredSamples) -> list[int]:
    return [groups.num_decoded for _, _, groups in samples._files]


def test_it_is_the_list_that_was_written(tmp_path: Path, parts: None) -> None:
    wanted = made()
    write_samples(tmp_path / "samples.parquet", wanted)
    assert pq.ParquetFile(tmp_path / "samples.parquet").num_row_groups == 10
    found = read_samples(tmp_path)
    assert len(found) == NUM and list(found) == wanted and found[:] == wanted
    assert [found[i] for i in (0, 49, 50, -1, -NUM)] == [wanted[i] for i in (0, 49, 50, -1, -NUM)]
    for chosen in (slice(48, 53), slice(None, None, 7), slice(-3, None), slice(30, 10, -3), slice(600, 700)):
        assert found[chosen] == wanted[chosen]
    for outside in (NUM, -NUM - 1):
        with pytest.raises(IndexError):
            found[outside]
    assert found.problem_ids == [one.problem_id for one in wanted]


def test_in_order_each_row_group_is_decoded_once_and_no_sample_stays(
    tmp_path: Path, parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_samples(tmp_path / "samples.parquet", made())
    alive = watch_samples(monkeypatch)
    found = read_samples(tmp_path)
    assert num_decoded(found) == [0] and max(alive) < 5
    assert sum(one.num_tokens for one in found) == 2 * NUM
    problems = by_problem(found)
    assert [len(problems), num_decoded(found)] == [NUM // 4, [10]]
    assert all(len(group) == 4 for _, group in problems.items()) and num_decoded(found) == [20]
    assert len(alive) == 3 * NUM and max(alive) < 20


def test_an_order_that_would_decode_again_and_again_keeps_the_file(
    tmp_path: Path, parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_groups, "_KEPT_BLOCKS", 1)
    wanted = made()
    write_samples(tmp_path / "samples.parquet", wanted)
    found, order = read_samples(tmp_path), list(range(NUM))
    random.Random(0).shuffle(order)
    assert [found[i] for i in order] == [wanted[i] for i in order]
    assert 40 < num_decoded(found)[0] < 55


def test_several_files_one_after_the_other(tmp_path: Path, parts: None) -> None:
    first, second = made(60), made(130, model="other")
    write_samples(tmp_path / "a.parquet", first)
    write_samples(tmp_path / "b.parquet", second)
    found = read_samples([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    assert list(found) == first + second and found[58:62] == [*first[58:], *second[:2]]
    problems = by_problem(found)
    assert problems["p0"] == first[:4] + second[:4] and problems["p20"] == second[80:84]
    assert "p20" in problems and "p99" not in problems
    write_samples(tmp_path / "b.parquet", [*made(100, model="other"), first[57]])
    twice = r"b\.parquet: row 100: sample 1 of problem p14 is also .*a\.parquet: row 57"
    with pytest.raises(InputError, match=twice):
        read_samples([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    write_samples(tmp_path / "b.parquet", [*first, first[57]])
    with pytest.raises(InputError, match=r"b\.parquet: row 60: sample 1 of problem p14 is also .*b\.parquet: row 57"):
        read_samples(tmp_path / "b.parquet")


def test_other_files_give_the_same_samples(tmp_path: Path, parts: None) -> None:
    wanted = made(300)
    records = [{f.name: getattr(one, f.name) for f in fields(Sample)} for one in wanted]
    lists = [{k: list(v) if isinstance(v, array) else v for k, v in one.items()} for one in records]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lists))
    pq.write_table(pa.Table.from_pylist(lists), tmp_path / "large.parquet")  # a row group of 300 where a part has 50
    (tmp_path / "upper.PARQUET").write_bytes((tmp_path / "large.parquet").read_bytes())
    for name in ("samples.jsonl", "large.parquet", "upper.PARQUET"):
        found = read_samples(tmp_path / name)
        assert [replace(one, token_ids=None, logp=None) for one in found] == [
            replace(one, token_ids=None, logp=None) for one in wanted
        ]
        assert [list(one.token_ids) for one in found] == [list(one.token_ids) for one in wanted]


@pytest.mark.parametrize("change", ["longer", "later", "gone"])
def test_a_file_that_changed_since_is_refused(tmp_path: Path, parts: None, change: str) -> None:
    path = tmp_path / "samples.parquet"
    write_samples(path, made())
    found = read_samples(path)
    assert found[0].response == "text 0"
    if change == "longer":
        state = path.stat()
        write_samples(path, made(NUM + 1))
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif change == "later":
        os.utime(path, (1, 1))
    else:
        path.unlink()
    with pytest.raises(InputError, match=r"samples\.parquet was changed or removed while it was read") as raised:
        found[NUM - 1]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("grade", "right", "row 70: grade is 'right'; use one of"),
        ("response", None, "row 70: column 'response' is None; it must be text"),
        ("index", 1.5, "row 70: column 'index' is 1.5; it must be a whole number"),
        ("problem_id", ..., r"row 70: no column 'problem_id' \(columns: "),
    ],
)
def test_bad_samples_are_named_by_their_row_in_the_file(
    tmp_path: Path, parts: None, column: str, value: Any, message: str
) -> None:
    records = [
        {f.name: getattr(one, f.name) for f in fields(Sample) if f.name not in ("token_ids", "logp")}
        for one in made(100)
    ]
    records[70] = {key: one for key, one in records[70].items() if key != column}
    records[70] |= {} if value is ... else {column: value}
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    with pytest.raises(InputError, match=message):
        read_samples(tmp_path / "samples.jsonl")


class Once(Sequence[Sample]):
    """Says in which order its samples were taken."""

    def __init__(self, samples: list[Sample]) -> None:
        self._samples, self.taken = samples, []

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, int) and at < len(self):
            self.taken.append(at)
        return self._samples[at]

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))


@pytest.mark.parametrize("with_logp", [True, False])
def test_samples_are_gone_through_once(tmp_path: Path, parts: None, with_logp: bool) -> None:
    told = [one if with_logp else replace(one, logp=None) for one in made(20, model="other")]
    samples = Once([*(replace(one, logp=None) for one in made(120)), *told])
    write_samples(tmp_path / "samples.parquet", samples, with_logp)
    assert samples.taken == [*range(140)]
    table = pq.read_table(tmp_path / "samples.parquet")
    assert ("logp" in table.column_names) == with_logp
    if with_logp:
        assert table["logp"].null_count == 120
    write_samples(tmp_path / "none.parquet", [replace(one, logp=None) for one in made(4)], True)
    assert pq.read_table(tmp_path / "none.parquet")["logp"].null_count == 4
    with pytest.raises(AssertionError, match="would be lost"):
        write_samples(tmp_path / "lost.parquet", made(4), False)
    assert not (tmp_path / "lost.parquet").exists()
