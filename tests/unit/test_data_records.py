"""Reading and writing problems and rows, and what is refused: one line naming file, row and column."""

from __future__ import annotations

import errno
import gzip
import json
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import chat

from verl_dft.data import spool, tables
from verl_dft.data.records import Problem, Row, read_problems, read_rows, write_problems, write_rows
from verl_dft.data.tables import read_parquet, write_parquet
from verl_dft.errors import InputError


def write_jsonl(path: Path, records: list[dict]) -> Path:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


GOOD = {"messages": chat("q", "a"), "problem_id": "p", "origin": "expert"}
STORED = {"messages": chat("q"), "origin": "self", "response_ids": [5, 6]}


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    rows = [
        Row(chat("q\u2028\n", "a"), "p1", "expert"),
        Row(chat("q"), "p2", "self", [3, 4], "g", 1.0, -0.5, [-0.1, -0.2], [-0.3, float("nan")], "length"),
    ]
    write_rows(tmp_path / "rows.parquet", rows, seed=3, made_by="test")
    table = read_rows(tmp_path / "rows.parquet").to_pylist()
    assert table[0] == {
        **dict.fromkeys(table[0]),
        "messages": chat("q\u2028\n", "a"),
        "problem_id": "p1",
        "origin": "expert",
    }
    second = table[1]
    assert (second["response_ids"], second["group_id"], second["reward"], second["advantage"]) == (
        [3, 4],
        "g",
        1.0,
        -0.5,
    )
    assert second["ref_logp"] == pytest.approx([-0.1, -0.2]) and second["finish_reason"] == "length"
    assert (
        second["behavior_logp"][0] == pytest.approx(-0.3) and second["behavior_logp"][1] != second["behavior_logp"][1]
    )
    manifest = json.loads((tmp_path / "rows.parquet.manifest.json").read_text())
    assert (manifest["num_rows"], manifest["seed"], manifest["made_by"]) == (2, 3, "test")
    assert "versions" in manifest and "command" in manifest


def test_a_written_file_has_only_the_columns_it_has_values_for(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", [Row(chat("q", "a"), "p", "expert", advantage=1.0)])
    assert set(pq.read_schema(tmp_path / "rows.parquet").names) == {"messages", "problem_id", "origin", "advantage"}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl_rows_need_only_messages(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / name, [{"messages": chat("q\u2028", "a"), "extra": 1}, {"messages": chat("q", "b")}])
    table = read_rows(path).to_pylist()
    assert [(r["problem_id"], r["origin"], r["messages"][-1]["content"]) for r in table] == [
        ("rows/0", "expert", "a"),
        ("rows/1", "expert", "b"),
    ]
    assert table[0]["messages"][0]["content"] == "q\u2028"


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "missing column": ({"text": "a"}, r"row 1: no column 'messages' \(columns: text\)"),
    "empty response": ({"messages": chat("q", "")}, "row 1: column 'messages' has an empty response; drop the row"),
    "blank response": ({"messages": chat("q", " \n")}, "row 1: column 'messages' has an empty response"),
    "no response": ({"messages": chat("q")}, "row 1: column 'messages' must end with an assistant turn"),
    "no prompt": ({"messages": [{"role": "assistant", "content": "a"}]}, "no turn before the response"),
    "no messages": ({"messages": []}, "row 1: column 'messages' must be a non-empty list"),
    "messages as text": ({"messages": "q a"}, "row 1: column 'messages' must be a non-empty list"),
    "content of another kind": ({"messages": [{"role": "user", "content": None}]}, r"row 1: messages\[0\] must have"),
    "role": (
        {"messages": [{"role": "human", "content": "q"}]},
        r"row 1: messages\[0\] has role 'human'; use system, user",
    ),
    "origin": ({**GOOD, "origin": "web"}, "row 1: column 'origin' is 'web'; use one of expert, teacher, self, guided"),
    "no ids": ({**STORED, "response_ids": []}, "row 1: column 'response_ids' is empty"),
    "ids of text": ({**STORED, "response_ids": ["a"]}, "row 1: column 'response_ids' must be a list of token ids"),
    "values without ids": ({**GOOD, "ref_logp": [-1.0]}, "row 1: column 'ref_logp' needs 'response_ids' beside it"),
    "too few values": ({**STORED, "behavior_logp": [-1.0]}, "column 'behavior_logp' has 1 values for 2 response_ids"),
    "too many values": ({**STORED, "ref_logp": [-1.0] * 3}, "column 'ref_logp' has 3 values for 2 response_ids"),
    "positive log-prob": ({**STORED, "ref_logp": [-1.0, 0.5]}, "column 'ref_logp' holds 0.5 at position 1"),
    "null log-prob": ({**STORED, "behavior_logp": [None, -1.0]}, "column 'behavior_logp' holds None at position 0"),
    "unknown reference": ({**STORED, "ref_logp": [-1.0, float("nan")]}, "column 'ref_logp' holds nan at position 1"),
    "infinite advantage": ({**GOOD, "advantage": float("inf")}, "row 1: column 'advantage' is inf"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_named(tmp_path: Path, case: str) -> None:
    record, message = BAD_ROWS[case]
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, record])
    with pytest.raises(InputError, match=message) as error:
        read_rows(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_bad_parquet_is_named_as_bad_jsonl_is(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["q"]}), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"rows\.parquet: row 0: no column 'messages' \(columns: prompt\)"):
        read_rows(tmp_path / "rows.parquet")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"rows\.parquet cannot be read as parquet"):
        read_rows(tmp_path / "rows.parquet")


def test_writing_refuses_what_reading_would(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="row 0: column 'messages' has an empty response"):
        write_rows(tmp_path / "rows.parquet", [Row(chat("q", " "), "p", "expert")])
    assert not list(tmp_path.iterdir())


# ---- part by part ----


@pytest.fixture
def parts_of_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PART", 3)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet"])
def test_a_file_in_parts_is_the_whole_file(tmp_path: Path, parts_of_3: None, name: str, number: int) -> None:
    records = [{"messages": chat("q", f"a{i}"), "response_ids": [i, 1]} for i in range(number)]
    if name == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(records), tmp_path / name)
    elif name == "rows.json":
        (tmp_path / name).write_text(json.dumps(records))
    else:
        write_jsonl(tmp_path / name, records)
    assert tables.read_records(tmp_path / name) == records
    sizes = [len(part) for part in tables.read_parts(tmp_path / name)]
    assert sizes == ([number] if name == "rows.json" else [3] * (number // 3) + [number % 3] * (number % 3 > 0))
    table = read_rows(tmp_path / name).to_pylist()
    assert [row["messages"] for row in table] == [record["messages"] for record in records]
    assert [row["problem_id"] for row in table] == [f"rows/{i}" for i in range(number)]
    assert [row["response_ids"] for row in table] == [[i, 1] for i in range(number)]


def test_the_first_part_is_read_before_the_last(tmp_path: Path, parts_of_3: None) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD] * 4)
    path.write_text(path.read_text() + "{\n")
    parts = tables.read_parts(path)
    assert len(next(parts)) == 3 and tables.columns_of(path) == set(GOOD)
    with pytest.raises(InputError, match="line 5 is not JSON"):
        next(parts)
    with pytest.raises(InputError, match="line 5 is not JSON"):
        tables.read_records(path)


@pytest.mark.parametrize("at", [3, 5, 6])
@pytest.mark.parametrize("case", [*BAD_ROWS, "another type"])
def test_a_bad_row_of_a_later_part_has_its_row_in_the_file(
    tmp_path: Path, parts_of_3: None, case: str, at: int
) -> None:
    record, message = BAD_ROWS.get(case, ({**GOOD, "group_id": [7]}, "row 1: column 'group_id' must be string"))
    path = write_jsonl(tmp_path / "rows.jsonl", [*[GOOD] * at, record, GOOD])
    with pytest.raises(InputError, match=message.replace("row 1", f"row {at}")) as error:
        read_rows(path)
    assert f"row {at}" in str(error.value)


def test_rows_are_written_as_they_come(tmp_path: Path, parts_of_3: None) -> None:
    alive: list[weakref.ref[Row]] = []

    def rows() -> Iterator[Row]:
        for i in range(20):
            row = Row(chat("q", f"a{i}"), f"p{i}", "expert", advantage=1.0 if i == 19 else None)
            alive.append(weakref.ref(row))
            assert sum(one() is not None for one in alive) <= 5
            yield row

    write_rows(tmp_path / "rows.parquet", rows())
    assert {path.name for path in tmp_path.iterdir()} == {"rows.parquet", "rows.parquet.manifest.json"}
    file = pq.ParquetFile(tmp_path / "rows.parquet")
    assert file.num_row_groups == 7
    assert file.schema_arrow.names == ["messages", "problem_id", "origin", "advantage"]
    table = read_rows(tmp_path / "rows.parquet")
    assert table["problem_id"].to_pylist() == [f"p{i}" for i in range(20)]
    assert table["advantage"].to_pylist() == [None] * 19 + [1.0]
    assert json.loads((tmp_path / "rows.parquet.manifest.json").read_text())["num_rows"] == 20


def test_a_bad_row_after_good_parts_leaves_the_old_file(tmp_path: Path, parts_of_3: None) -> None:
    write_rows(tmp_path / "rows.parquet", [Row(chat("q", "old"), "p", "expert")])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    rows = [Row(chat("q", "a" if i < 7 else ""), "p", "expert") for i in range(9)]
    with pytest.raises(InputError, match="row 7: column 'messages' has an empty response"):
        write_rows(tmp_path / "rows.parquet", rows)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_disk_that_fills_up_meanwhile_leaves_the_old_file(
    tmp_path: Path, parts_of_3: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows.parquet", [Row(chat("q", "old"), "p", "expert")])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    opened = tempfile.TemporaryFile

    def full(**options: Any) -> Any:
        class Full:
            def __init__(self) -> None:
                self.file, self.closed, self.room = opened(**options), False, 2000

            def write(self, data: Any) -> int:
                self.room -= memoryview(data).nbytes
                if self.room < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return self.file.write(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

        return Full()

    monkeypatch.setattr(spool.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match="No space left") as raised:
        write_rows(tmp_path / "rows.parquet", [Row(chat("q", "a"), "p", "expert")] * 90)
    assert raised.value.errno == errno.ENOSPC, "what the command line tells in one line"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.jsonl", None, "no.jsonl does not exist; give a .jsonl"),
        ("empty.jsonl", b"\n", "empty.jsonl holds no rows"),
        ("rows.csv", b"a,b\n", "rows.csv is of an unknown kind"),
        ("bad.jsonl", b'{"messages": []}\n{"messages": [}\n', "line 2 is not JSON"),
        ("list.jsonl", b"[1]\n", "line 1 must be a JSON object"),
        ("cut.jsonl.gz", gzip.compress(b'{"messages": 1}\n' * 99, mtime=0)[:-12], "cut.jsonl.gz cannot be read"),
        ("latin.jsonl", b'{"a": "\xe9"}\n', "latin.jsonl cannot be read"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / name)
    with pytest.raises(InputError, match="is a folder"):
        read_rows(tmp_path)


def test_problems_come_back_as_written(tmp_path: Path) -> None:
    problems = [Problem("a", "1 + 1?", "2", "It is 2.", ["Two."], "src", 3), Problem("b", "prove it", "")]
    write_problems(tmp_path / "p.jsonl", problems)
    assert read_problems(tmp_path / "p.jsonl") == problems
    pq.write_table(pa.Table.from_pylist([vars(p) for p in problems]), tmp_path / "p.parquet")
    assert read_problems(tmp_path / "p.parquet") == problems


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "b", "problem": "q"}, "row 1: no column 'answer'"),
        ({"id": "b", "problem": "  ", "answer": "1"}, "row 1: column 'problem' is empty"),
        ({"id": "a", "problem": "q", "answer": "1"}, "row 1: id 'a' was already used in row 0"),
    ],
)
def test_bad_problem_is_named(tmp_path: Path, record: dict, message: str) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"id": "a", "problem": "q", "answer": "1"}, record])
    with pytest.raises(InputError, match=message):
        read_problems(path)


def test_columns_of_a_table_are_read_with_their_checksums(tmp_path: Path) -> None:
    file = tmp_path / "table.parquet"
    with open(file, "wb") as opened:
        write_parquet(pa.table({"kept": list(range(1000)), "other": ["x"] * 1000}), opened)
    assert read_parquet(file, ["kept"])["kept"].to_pylist() == list(range(1000))
    assert read_parquet(file).column_names == ["kept", "other"]
    with pytest.raises(InputError, match=r"table\.parquet .*missing"):
        read_parquet(file, ["kept", "missing"])
    data = bytearray(file.read_bytes())
    data[2000] ^= 4
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"table\.parquet cannot be read as parquet: .*make it again"):
        read_parquet(file, ["kept"])
