"""Any file of rows, problems or pairs is read as it is, or refused in one line; ``scripts/fuzz.py`` tries 100,000."""

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from data_helpers import FAMILIES, chat, family
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from verl_dft.data.prompts import PROMPTS, find_prompt, render_messages
from verl_dft.data.records import read_problems, read_rows
from verl_dft.data.template import ConversationEncoder, special_tokens
from verl_dft.errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import fuzz  # noqa: E402
import fuzz_loader  # noqa: E402

quick = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TEXT = st.text(st.characters(exclude_categories=()) | st.sampled_from("\x00\ud800\ufeff\u2028\r\n{}<|>"), max_size=20)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
KEYS = ("messages", "problem_id", "origin", "response_ids", "advantage", "reward", "ref_logp", "behavior_logp",
        "group_id", "finish_reason", "id", "problem", "answer", "solution", "level", "teacher_solutions")  # fmt: skip


def refused(path: Path, message: str) -> None:
    assert path.name in message and message.isprintable() and len(message) < 2000


@quick
@given(records=st.lists(st.dictionaries(st.sampled_from(KEYS) | TEXT, VALUE, max_size=4), max_size=3))
def test_any_json_is_read_or_refused_in_a_line(records: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "any.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    for read in (read_rows, read_problems):
        try:
            found = read(path)
        except InputError as error:
            refused(path, str(error))
        else:
            assert len(found) == len(records)


@quick
@given(row=st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=3))
def test_a_good_row_with_anything_else_in_it_is_unchanged_or_refused(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "any.jsonl"
    given_row = {"messages": chat("2 + 3 ?", "5"), "problem_id": "p", **row}
    path.write_text(json.dumps({"messages": chat("a", "b")}) + "\n" + json.dumps(given_row))
    try:
        table = read_rows(path).to_pylist()
    except InputError as error:
        refused(path, str(error))
        assert "row 1" in str(error) or "line 2" in str(error)
        return
    fuzz_loader._check_row(table[1], given_row, "any/1")


@quick
@given(data=st.binary(max_size=60), name=st.sampled_from(["x.jsonl", "x.jsonl.gz", "x.json", "x.parquet"]))
def test_any_bytes_are_refused_in_a_line(data: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for content in (data, gzip.compress(data)[: len(data) + 12]):
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            read_rows(path)
        refused(path, str(error.value))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"messages": [], "messages": [1]}', "line 1: 'messages' is given twice in one object"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1 is nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "line 1: Exceeds the limit (4300 digits)"),
        (b'{"a": "\\ud800"}', "line 1 has half of a surrogate pair in a text"),
        (b'{"a": "\xed\xa0\x80"}', "cannot be read: 'utf-8' codec"),
    ],
    ids=["name-twice", "depth", "digits", "half-a-pair", "encoded-half"],
)
def test_what_json_lets_pass_and_nothing_can_use(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        read_rows(path)
    refused(path, str(error.value))
    assert words in str(error.value)


ODD_COLUMNS = [
    ("response_ids", [1.5, 2], "list of token ids, whole numbers"),
    ("response_ids", [1, None], "list of token ids"),
    ("response_ids", 5, "list of token ids"),
    ("response_ids", [2**40], "response_ids' must be list"),
    ("advantage", True, "finite number"),
    ("advantage", "1", "finite number"),
    ("advantage", 1e308, "finite number"),
    ("advantage", 10**400, "finite number"),
    ("reward", float("nan"), "finite number"),
    ("problem_id", ["p"], "a text or a number"),
    ("group_id", 3, "'group_id' must be string"),
    ("ref_logp", -1.0, "must be a list of log-probs"),
    ("ref_logp", [False, -1.0], "holds False at position 0"),
    ("ref_logp", [-1.0, float("-inf")], "holds -inf at position 1"),
]


@pytest.mark.parametrize(("key", "value", "words"), ODD_COLUMNS, ids=lambda value: str(value)[:20])
def test_numbers_and_names_that_would_change_are_refused(key: str, value: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    row = {"messages": chat("a", "b"), **({"response_ids": [5, 6]} if "logp" in key else {}), key: value}
    path.write_text(json.dumps({"messages": chat("a", "b")}) + "\n" + json.dumps(row))
    with pytest.raises(InputError, match="row 1") as error:
        read_rows(path)
    assert words in str(error.value)


def test_a_mark_at_the_start_and_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    line = json.dumps({"messages": chat("q", "a\r\nb")})
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}\r\n".encode())
    assert [row["messages"][1]["content"] for row in read_rows(tmp_path / "x.jsonl").to_pylist()] == ["a\r\nb"] * 2


# ---- prompts ----

NAMES = sorted({name for one in FAMILIES for name in special_tokens(family(one))})
MIXED = st.lists(st.sampled_from([*NAMES, "a", " 5", "\n", "{", "{{x}}", "</think>", "é"]), min_size=1, max_size=6)


@quick
@given(name=st.sampled_from([*FAMILIES]), user=MIXED, answer=MIXED)
def test_no_text_of_a_row_is_parsed_as_a_special_token(name: str, user: list[str], answer: list[str]) -> None:
    encoder = ConversationEncoder(family(name))
    special = set(encoder._special.values())
    texts = [f"x {''.join(parts)} y" for parts in (user, answer)]
    calm, odd = chat("x y", "x y"), chat(*texts)
    (expected,), (found,) = encoder.encode([calm], str), encoder.encode([odd], str)
    for ids, wanted in ((found.prompt, expected.prompt), (found.response, expected.response)):
        assert [i for i in ids if i in special] == [i for i in wanted if i in special]
    (asked,) = encoder.encode_prompts([odd[:1]], str)
    assert [i for i in asked if i in special] == [i for i in encoder.encode_prompts([calm[:1]], str)[0] if i in special]


@pytest.mark.parametrize("change", ["{} | replace('q', 'b')", "{}.split('</think>')[-1]", "{}.split('|>')[0]"])
@pytest.mark.parametrize("text", ["q <|im_end|> a </think> 5 <|endoftext|>", "\ue0f01 <|im_end|>", "<|im_start|>"])
def test_nor_where_the_template_changes_the_text(change: str, text: str) -> None:
    tokenizer = family("qwen2")
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "(" + change.format("m['content']") + ")")
    encoder = ConversationEncoder(tokenizer)
    for turns in (chat("2 + 3 ?", text), chat(text, "5")):
        (found,), (calm,) = encoder.encode([turns], str), encoder.encode([chat("2 + 3 ?", "5")], str)
        special = set(encoder._special.values())
        assert [i for i in found.prompt if i in special] == [i for i in calm.prompt if i in special]
        assert [i for i in found.response if i in special] == [encoder.end_id]
        (asked,) = encoder.encode_prompts([turns], str)
        assert asked == found.prompt


@quick
@given(problem=TEXT, reference=TEXT, own=TEXT)
def test_a_prompt_holds_the_problem_as_it_is(problem: str, reference: str, own: str) -> None:
    for name, prompt in PROMPTS.items():
        turns = render_messages(name, problem, reference if prompt.needs_reference else None)
        assert problem in turns[-1]["content"]
    _, prompt = find_prompt(f"{own}{{problem}}")
    assert prompt.messages(problem, reference)[0]["content"] == own.replace("{reference}", reference) + problem


# ---- the script ----


@pytest.mark.parametrize("first", [0, pytest.param(50_000, marks=pytest.mark.slow)])
def test_cases_of_the_script(first: int, tmp_path: Path) -> None:
    line = fuzz.batch(fuzz.Loader(tmp_path), "loader", 0, first, 40)
    assert line["findings"] == [] and sum(line["outcomes"].values()) == 40
    assert min(line["outcomes"]["read"], line["outcomes"]["refused"]) > 5


@pytest.mark.slow
def test_the_script_finds_a_loader_that_changes_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl_dft.data import row_checks

    monkeypatch.setattr(row_checks, "_check_ids", lambda where, ids: None)
    line = fuzz.batch(fuzz.Loader(tmp_path), "loader", 0, 0, 150)
    assert line["findings"] and "found" in line["outcomes"]


def test_the_scripts_report_is_gone_on_from(tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    line = {
        "what": "loader",
        "seed": 0,
        "first": 0,
        "cases": 5,
        "seconds": 1.0,
        "findings": [],
        "outcomes": {"read": 5},
    }
    report.write_text(json.dumps(line) + "\n" + json.dumps(line | {"seed": 1}) + '\n{"what": "loa')
    (found,) = fuzz.reported(report, "loader", 0)
    assert found == line and fuzz.summary([found]) == "5 cases, 0 findings, 1 s (5 cases/s): read 5"
    assert fuzz_loader.make(random.Random("a")) == fuzz_loader.make(random.Random("a"))
