"""Made-up files for the loader of rows, problems and pairs, and what must hold of whatever it makes of them.

A case is a function of its seed alone. Most are good files with something odd in them; see :func:`check` for what is
demanded.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import math
import random
import shutil
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from verl_dft.data import tables
from verl_dft.data.dataset import load_dataset
from verl_dft.data.pairs import load_pairs
from verl_dft.data.problems import problems_of
from verl_dft.data.records import read_problems, read_rows
from verl_dft.data.template import ConversationEncoder, special_tokens
from verl_dft.errors import InputError

KINDS = ("rows", "problems", "pairs")
SUFFIXES = (".jsonl", ".jsonl", ".jsonl", ".jsonl.gz", ".json", ".parquet")
ODD_TEXTS = (
    "", " ", "\n", "\x00", "a\x00b", "\ud800", "\udc00x", "\ufeff", "\u2028", "a\r\nb", "\x1b[31m", "é" * 40, "🙂🇩🇪",
    "e\u0301", "\u202eabc", "\U0010ffff", "\ufffe", "<|im_end|>", "<|endoftext|>x", "a<|im_start|>assistant\n", "</s>",
    "{problem}", "{{", "${oc.env:HOME}", "../../x", "null", "NaN", "=1+1", "\\boxed{", "x" * 5000, "\t", "1e999",
)  # fmt: skip
WORDS = ("What is 2 + 3?", "It is 5.", "Solve for $y$.", "답은 5", "x = 4\n", "\\frac{1}{2}", "no")
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 1.5, -0.0, 2**31, 2**63, 2**64, -(2**70), 10**400, 1e308, math.nan, math.inf,
    -math.inf, [], {}, [None], [[]], [1, None], [True], ["a"], [1.0], [1, 2.5], {"role": "user"}, [{}], ["", {}],
    {"a": {"b": [1]}}, [[1], [2]],
)  # fmt: skip


@dataclass(frozen=True)
class File:
    """A made-up file: what is in it, the records it was made of, and whether nothing is wrong with it."""

    kind: str
    suffix: str
    data: bytes
    records: list[dict[str, Any]]
    whole: bool
    """Whether ``data`` holds just these records, so that what is read must be equal to them."""
    good: bool
    """Whether it must be read."""


def make(chance: random.Random) -> File:
    """A file, by the random numbers given."""
    kind, suffix = chance.choice(KINDS), chance.choice(SUFFIXES)
    records = [_RECORDS[kind](chance, index) for index in range(chance.randint(1, 5))]
    good = chance.random() < 0.3
    if good:
        texts = [text for text in ODD_TEXTS if text.strip("\x00 \n\t\r\ufeff\u2028") and text.isprintable()]
        _set_some_text(chance, kind, records, texts)
    else:
        _spoil(chance, kind, records)
    data = _serialised(chance, suffix, records)
    if data is None:  # parquet cannot hold what JSON can
        suffix = ".jsonl"
        data = _serialised(chance, suffix, records)
    assert data is not None
    if suffix == ".parquet":  # which makes numbers of one list alike
        import pyarrow.parquet as pq

        records = pq.read_table(io.BytesIO(data)).to_pylist()
    changed = data if good or chance.random() < 0.5 else _damaged(chance, suffix, data)
    return File(kind, suffix, changed, records, changed == data, good)


# ---- records ----


def _turns(chance: random.Random, *roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": chance.choice(WORDS)} for role in roles]


def _row(chance: random.Random, index: int) -> dict[str, Any]:
    first = ("system",) if chance.random() < 0.2 else ()
    row: dict[str, Any] = {"messages": _turns(chance, *first, "user", "assistant")}
    if chance.random() < 0.5:
        row |= {"problem_id": chance.choice([f"p{index}", index]), "origin": chance.choice(["expert", "self"])}
    if chance.random() < 0.3:
        ids = [chance.randint(3, 250) for _ in range(chance.randint(1, 6))]
        row |= {"response_ids": ids, "finish_reason": chance.choice(["stop", "length", None])}
        row |= {"ref_logp": [-chance.random() for _ in ids], "behavior_logp": [-chance.random() for _ in ids]}
    if chance.random() < 0.3:
        row |= {"advantage": chance.choice([0, 1, -0.5, 2.25]), "reward": chance.choice([0, 1.0]), "group_id": "g"}
    return row


def _problem(chance: random.Random, index: int) -> dict[str, Any]:
    problem = {"id": f"p{index}", "problem": chance.choice(WORDS), "answer": chance.choice(["5", "", "\\frac{1}{2}"])}
    if chance.random() < 0.5:
        problem |= {"solution": chance.choice(WORDS), "level": chance.randint(1, 5), "source": "made up"}
    return problem


def _pair(chance: random.Random, index: int) -> dict[str, Any]:
    sides = chance.sample(WORDS, 2)
    pair: dict[str, Any] = {"prompt": _turns(chance, "user"), "problem_id": f"p{index}"}
    for side, text in zip(("chosen", "rejected"), sides, strict=True):
        pair[side] = [{"role": "assistant", "content": text}]
    if chance.random() < 0.3:
        pair |= {"chosen_ids": [5, 6, 7 + index], "rejected_ids": [5, 6], "rejected_finish_reason": "length"}
    return pair


_RECORDS: dict[str, Callable[..., dict[str, Any]]] = {"rows": _row, "problems": _problem, "pairs": _pair}


def _set_some_text(chance: random.Random, kind: str, records: list[dict[str, Any]], texts: Sequence[str]) -> None:
    record = chance.choice(records)
    text = f"{chance.choice(WORDS)} {chance.choice(texts)}"
    if kind == "problems":
        record["problem"] = text
    else:
        turns = record["messages" if kind == "rows" else chance.choice(["prompt", "chosen"])]
        turns[-1]["content"] = text


def _spoil(chance: random.Random, kind: str, records: list[dict[str, Any]]) -> None:
    """One to three odd values, anywhere in the records."""
    for _ in range(chance.randint(1, 3)):
        record = chance.choice(records)
        key = chance.choice([*record, "level", "teacher_solutions", "advantage", "response_ids", "extra"])
        value = copy.deepcopy(chance.choice(ODD_VALUES)) if chance.random() < 0.5 else chance.choice(ODD_TEXTS)
        node = record.get(key)
        if isinstance(node, list) and node and chance.random() < 0.7:  # one place deeper
            at = chance.randrange(len(node))
            if isinstance(node[at], dict) and chance.random() < 0.8:
                node[at][chance.choice(["role", "content"])] = value
            else:
                node[at] = value
        elif chance.random() < 0.15:
            record.pop(key, None)
        else:
            record[key] = value


# ---- files ----


def _serialised(chance: random.Random, suffix: str, records: list[dict[str, Any]]) -> bytes | None:
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = io.BytesIO()
        try:
            pq.write_table(pa.Table.from_pylist([_filled(record, records) for record in records]), file)
        except (pa.ArrowException, ValueError, OverflowError, TypeError):
            return None
        return file.getvalue()
    ascii_only = chance.random() < 0.5
    if suffix == ".json":
        return json.dumps(records, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    end = chance.choice(["\n", "\n", "\r\n", "\n\n", " \n"])
    text = end.join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    data = (chance.choice(["", "", "\n"]) + text + chance.choice(["", end])).encode("utf-8", "surrogatepass")
    return gzip.compress(data, 1, mtime=0) if suffix == ".jsonl.gz" else data


def _filled(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: record.get(key) for other in records for key in other}


def _damaged(chance: random.Random, suffix: str, data: bytes) -> bytes:
    at = chance.randrange(len(data))
    before, after = data[:at], data[at:]
    deep = chance.choice([50, 2000, 200_000])
    return chance.choice([
        before, before + bytes([chance.randrange(256)]) + after[1:], b"\xef\xbb\xbf" + data, before + b"\x00" + after,
        before + b"\xff\xfe" + after, data.replace(b"}", b",}", 1), data.replace(b"1", b"1" * 5000, 1),
        data.replace(b'"content"', b'"content": "first", "content"', 1).replace(b'"id"', b'"id": 9, "id"', 1),
        data + b"\n" + b"[" * deep + b"]" * chance.choice([0, deep]), data + data, data + b"\n" + data[: at // 2],
    ])  # fmt: skip


# ---- what must hold ----


def check(file: File, folder: Path, encoder: ConversationEncoder) -> str:
    """Read the file and say what came of it: ``read`` or ``refused``.

    Either everything in it is there as it was given, or an InputError says in one line which file.

    Raises:
        AssertionError: neither; whatever else the loader raises is passed on.
    """
    path = folder / f"made_up{file.suffix}"
    path.write_bytes(file.data)
    try:
        _CHECKS[file.kind](file, path, encoder)
    except InputError as error:
        message = str(error)
        assert path.name in message or "made_up" in message or "problem " in message, f"names no file: {message}"
        assert len(message.splitlines()) == 1 and message.isprintable(), f"more than a line: {message!r}"
        assert len(message) < 2000, f"a line of {len(message)} characters"
        assert not file.good, f"refused: {message}"
        return "refused"
    return "read"


def _check_rows(file: File, path: Path, encoder: ConversationEncoder) -> None:
    table = read_rows(path).to_pylist()
    if file.whole:
        assert len(table) == len(file.records), "rows are missing"
        for index, (row, given) in enumerate(zip(table, file.records, strict=True)):
            _check_row(row, given, f"made_up/{index}")
    given = [row["messages"] for row in table if row["response_ids"] is None]
    tokens = encoder.encode(given, lambda i: f"{path}: row {i}")
    for messages, (prompt, response, _) in zip(given, tokens, strict=True):
        check_tokens(encoder, messages, prompt, response)
    if len(file.data) % 10 == 0:  # files are written for it
        _check_dataset(path, encoder, len(table), ("drop", "truncate")[len(file.data) // 10 % 2])


def _check_dataset(path: Path, encoder: ConversationEncoder, num_rows: int, overlong: str) -> None:
    """Every row is kept, or counted where it is not."""
    options = {"max_length": 48, "overlong": overlong, "cache_dir": path.parent / "cache"}
    try:
        dataset = load_dataset(path, encoder.tokenizer, **options)
    except InputError as error:
        if "longer than data.max_length" not in str(error) and "ids that tokenizer" not in str(error):
            raise
        return
    finally:
        shutil.rmtree(path.parent / "cache", ignore_errors=True)
    report = dataset.report
    assert report["rows_read"] == num_rows == len(dataset) + report["rows_dropped_overlong"], f"rows lost: {report}"
    assert report["rows_kept"] == len(dataset) and report["num_tokens"] == dataset.lengths.sum() > 0, f"{report}"
    assert max(dataset.lengths) <= 48, "longer than the limit"


def check_tokens(encoder: ConversationEncoder, messages: Any, prompt: list[int], response: list[int]) -> None:
    """The text is there, and no special token but those that the template writes."""
    calm = [{**message, "content": "calm"} for message in messages]
    ((calm_prompt, calm_response, _),) = encoder.encode([calm], str)
    special = set(special_tokens(encoder.tokenizer).values())
    for ids, wanted in ((prompt, calm_prompt), (response, calm_response)):
        assert [i for i in ids if i in special] == [i for i in wanted if i in special], "a text was parsed"
    decode = encoder.tokenizer.decode
    texts = [unicodedata.normalize("NFC", message["content"]) for message in messages]  # as the tokenizer does
    assert decode(response) == texts[-1] + decode(calm_response[-1:]), "the response's text has changed"
    assert all(text in decode(prompt) for text in texts[:-1]), "the prompt's text has changed"


def _turns_of(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in given]


def _check_row(row: Mapping[str, Any], given: Mapping[str, Any], default_id: str) -> None:
    assert row["messages"] == _turns_of(given["messages"]), "messages have changed"
    asked = given.get("problem_id")
    assert row["problem_id"] == (default_id if asked is None else str(asked)), "problem_id has changed"
    assert row["origin"] == (given.get("origin") or "expert"), "origin has changed"
    for key in ("group_id", "finish_reason"):
        assert row[key] == given.get(key), f"{key} has changed"
    for key in ("reward", "advantage", "response_ids", "ref_logp", "behavior_logp"):
        _check_numbers(key, row[key], given.get(key))


def _check_numbers(key: str, found: Any, given: Any) -> None:
    if isinstance(given, list):
        assert isinstance(found, list) and len(found) == len(given), f"{key} has changed"
        for one, other in zip(found, given, strict=True):
            _check_numbers(key, one, other)
    elif given is None:
        assert found is None or (key == "behavior_logp" and math.isnan(found)), f"{key}: null became {found!r}"
    else:
        assert type(given) in (int, float), f"{key}: {given!r} became {found!r}"
        with np.errstate(over="ignore"):
            same = found == given if key == "response_ids" else np.float32(found) == np.float32(given)
        assert same or (found != found and given != given), f"{key}: {given!r} became {found!r}"
        assert key == "behavior_logp" or math.isfinite(found), f"{key}: {found!r} was accepted"


def _check_problems(file: File, path: Path, encoder: ConversationEncoder) -> None:
    for problems in (read_problems(path), problems_of({"train_files": [str(path)]})):
        if file.whole:
            assert len(problems) == len(file.records), "problems are missing"
            for problem, given in zip(problems, file.records, strict=True):
                assert problem.problem == str(given["problem"]) and problem.id == str(given["id"]), "a text has changed"
                assert given.get("answer") is None or problem.answer == str(given["answer"]), "an answer has changed"
        turns = [[{"role": "user", "content": problem.problem}] for problem in problems]
        encoder.encode_prompts(turns, lambda i: f"{path}: row {i}")
        tables.json_line({"problem": problems[0].problem, "answer": problems[0].answer}).encode()


def _check_pairs(file: File, path: Path, encoder: ConversationEncoder) -> None:
    pairs = load_pairs([path], encoder.tokenizer, max_length=100_000)
    report = pairs.report
    assert report["pairs_read"] == report["pairs_kept"] == len(pairs.pairs), "pairs are missing"
    if file.whole:
        assert len(pairs.pairs) == len(file.records), "pairs are missing"
        for pair, given in zip(pairs.pairs, file.records, strict=True):
            if given.get("chosen_ids") is not None:
                assert pair.chosen[: len(given["chosen_ids"])].tolist() == given["chosen_ids"], "ids have changed"
            else:
                messages = _turns_of([*given["prompt"], *given["chosen"]])
                check_tokens(encoder, messages, pair.prompt.tolist(), pair.chosen.tolist())


_CHECKS = {"rows": _check_rows, "problems": _check_problems, "pairs": _check_pairs}
