"""A shard of samples as a file: checksummed JSON lines, which say of themselves whether they are whole.

A header, the samples in order, and a commit record with the SHA-256 of everything before it. A file counts only when
its commit record is whole and agrees.
"""

import hashlib
import json
import re
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_dft.failpoints import failpoint
from verl_dft.sampling.engine import GeneratedText

PART = ".part"
"""Ends the name of a file that is being written."""
_LINE = re.compile(rb'\{"crc32":"([0-9a-f]{8})",(.*)\}\n', re.DOTALL)
_FORMAT = 1


@dataclass(frozen=True)
class StoredSample:
    """One sample. ``key`` says what it is a sample of (``store.sample_key``), ``index`` its number for that prompt."""

    key: str
    index: int
    seed: int
    text: GeneratedText


@dataclass(frozen=True)
class Shard:
    """A committed shard. ``facts``: of the source that wrote it; ``seconds``: its generation took."""

    id: str
    samples: list[StoredSample]
    facts: dict[str, Any]
    seconds: float


def shard_id(keys: Sequence[str]) -> str:
    """Identity of a shard: its members in their order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:32]


def read_shard(path: str | Path) -> Shard | None:
    """A shard from its file, or None where it is not whole and exactly as committed. Needs no lock."""
    content = Path(path).read_bytes()
    records = [parse_line(line) for line in content.splitlines(keepends=True)]
    if len(records) < 2 or any(record is None for record in records):
        return None
    header, *samples, last = (record or {} for record in records)
    commit, head = last.get("commit"), header.get("header")
    body = content[: content.rindex(b"\n", 0, -1) + 1]
    if commit is None or head is None or head["format"] != _FORMAT or not all("sample" in s for s in samples):
        return None
    if commit["sha256"] != hashlib.sha256(body).hexdigest():
        return None
    found = [_sample(record["sample"]) for record in samples]
    # A copy under another name would otherwise stand for a shard it is not.
    if (
        head["shard"] != shard_id([sample.key for sample in found])
        or Path(path).name.removesuffix(PART) != f"{head['shard']}.jsonl"
    ):
        return None
    return Shard(head["shard"], found, head["facts"], commit["seconds"])


def shard_lines(shard: Shard) -> Iterator[bytes]:
    """The lines of a shard's file, each followed by the failpoint that says it was written."""
    digest = hashlib.sha256()
    records = [{"header": {"format": _FORMAT, "shard": shard.id, "facts": shard.facts}}]
    records += [{"sample": _record(sample)} for sample in shard.samples]
    for record in records:
        failpoint("store.before_append")
        line = _line(record)
        digest.update(line)
        yield line
        failpoint("store.after_append")
    failpoint("store.shard_commit")
    yield _line({"commit": {"sha256": digest.hexdigest(), "seconds": shard.seconds}})


def _record(sample: StoredSample) -> dict[str, Any]:
    text = {name: value.tolist() if isinstance(value, array) else value for name, value in vars(sample.text).items()}
    for name in ("logp", "reported_tokens"):  # not in older records
        if text[name] is None:
            del text[name]
    return {"key": sample.key, "index": sample.index, "seed": sample.seed, **text, "num_tokens": sample.text.num_tokens}


def _sample(record: Mapping[str, Any]) -> StoredSample:
    optional = (record.get("logp"), record.get("reported_tokens"))
    text = GeneratedText(record["token_ids"], record["text"], record["finish_reason"], *optional)
    return StoredSample(record["key"], record["index"], record["seed"], text)


def _line(record: Mapping[str, Any]) -> bytes:
    # ASCII: a lone surrogate, which a model can write, has no UTF-8 form; JSON's escapes keep it.
    body = json.dumps(record, separators=(",", ":"))[1:-1].encode()
    return b'{"crc32":"%08x",%s}\n' % (zlib.crc32(body), body)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line, or None where the line is half-written or damaged."""
    match = _LINE.fullmatch(line)
    if match is None or int(match[1], 16) != zlib.crc32(match[2]):
        return None
    return json.loads(b"{" + match[2] + b"}")
