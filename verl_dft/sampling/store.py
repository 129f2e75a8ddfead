"""An append-only store of samples, made so that a kill at any moment costs the shard in work and nothing else.

A shard is a file of checksummed JSON lines: a header, its samples in order, and a commit record with the SHA-256
of everything before it. It is written as ``<shard>.jsonl.part``, synced, and renamed; it counts only when
the commit record is whole and agrees. Nothing committed is ever changed: a file that no longer agrees with its own
commit record is moved aside, counted, and its samples are missing again.
"""

import fcntl
import hashlib
import json
import os
import re
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.failpoints import failpoint
from verl_dft.files import writing
from verl_dft.sampling.engine import GeneratedText, SampleRequest

_LINE = re.compile(rb'\{"crc32":"([0-9a-f]{8})",(.*)\}\n', re.DOTALL)
_FORMAT = 1
_PART, _CORRUPT = ".part", ".corrupt"
# POSIX locks do not keep a process from itself, so what this one holds is remembered here.
_held: set[tuple[int, Path]] = set()


@dataclass(frozen=True)
class StoredSample:
    """One sample. ``key`` says what it is a sample of (:func:`sample_key`), ``index`` its number for that prompt."""

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


@dataclass
class Recovery:
    """What opening a store found of earlier, interrupted writers: files, whole samples in them, half-written lines."""

    unfinished_shards: int = 0
    dropped_samples: int = 0
    half_lines: int = 0
    corrupt: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.unfinished_shards} unfinished shard(s) dropped ({self.dropped_samples} samples, {self.half_lines} "
            f"half-written line(s)), {len(self.corrupt)} corrupted shard(s) moved aside"
        )


def sample_key(writer: str, request: SampleRequest, index: int) -> str:
    """Identity of a sample: SHA-256 (32 hex digits) of (writer, prompt ids, sampling options, seed, index).

    Args:
        writer: the model and whatever else of the source changes its texts; see ``fingerprint.model_fingerprint``.
        index: number of the sample among those of one prompt.
    """
    sampling = [float(request.temperature), float(request.top_p), request.top_k, request.max_tokens]
    value = [writer, list(request.prompt_ids), sampling, sorted(request.stop_token_ids), request.seed, index]
    if request.want_logp:  # not part of older keys
        value.append("logp")
    if not request.prompt_ids:  # an endpoint makes the ids from the turns
        value.append([sorted(message.items()) for message in request.messages or ()])
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()[:32]


def shard_id(keys: Sequence[str]) -> str:
    """Identity of a shard: its members in their order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:32]


class SampleStore:
    """The samples of one folder, opened by one writer at a time. Close it, or use it as a context manager.

    ``recovery`` tells what was cleaned up on opening.

    Raises:
        InputError: another process, or this one, has the store open.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.folder)
        self.recovery = Recovery()
        self._shards: dict[str, Shard] = {}
        self._by_key: dict[str, StoredSample] = {}
        try:
            self._recover()
            self._load()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "SampleStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._by_key)

    def close(self) -> None:
        """Let the next writer in. Safe to call twice."""
        if self._lock is not None:
            _held.discard((os.getpid(), self.folder))
            os.close(self._lock)
            self._lock = None

    def shards(self) -> list[Shard]:
        """Every committed shard, in the order of their names."""
        return [self._shards[name] for name in sorted(self._shards)]

    def shard(self, id: str) -> Shard | None:
        """A committed shard, or None."""
        return self._shards.get(id)

    def find(self, key: str) -> StoredSample | None:
        """The sample of that key, whichever shard holds it, or None."""
        return self._by_key.get(key)

    def append(self, samples: Sequence[StoredSample], facts: Mapping[str, Any], seconds: float) -> Shard:
        """Write a shard and commit it. When this returns, it survives a kill and a power cut.

        A shard of the same members that is already committed is kept, and returned, as it is.
        """
        assert self._lock is not None, "the store is closed"
        shard = Shard(shard_id([sample.key for sample in samples]), list(samples), dict(facts), round(seconds, 3))
        if shard.id in self._shards:
            return self._shards[shard.id]
        with writing(self.folder):
            self._write(shard)
        self._add(shard)
        return shard

    def _write(self, shard: Shard) -> None:
        final = self.folder / f"{shard.id}.jsonl"
        part = final.with_name(final.name + _PART)
        # Unbuffered: a line that was appended is in the file, so that a kill leaves what it would leave at that place.
        with open(part, "wb", buffering=0) as file:
            for line in _lines(shard):
                file.write(line)
            failpoint("store.before_fsync")
            os.fsync(file.fileno())
            failpoint("store.after_fsync")
        failpoint("store.before_rename")
        os.replace(part, final)
        failpoint("store.after_rename")
        _sync_folder(self.folder)

    def _add(self, shard: Shard) -> None:
        self._shards[shard.id] = shard
        for sample in shard.samples:
            self._by_key.setdefault(sample.key, sample)

    def _recover(self) -> None:
        for part in sorted(self.folder.glob(f"*.jsonl{_PART}")):
            failpoint("store.before_recover")
            if read_shard(part) is not None:  # killed between the commit record and the rename
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(part, part.with_suffix(""))
                continue
            content = part.read_bytes()
            whole, _, rest = content.rpartition(b"\n")
            records = [_parse(line + b"\n") for line in whole.split(b"\n") if line]
            self.recovery.unfinished_shards += 1
            self.recovery.half_lines += bool(rest) + sum(record is None for record in records)
            self.recovery.dropped_samples += sum(record is not None and "sample" in record for record in records)
            part.unlink()
            failpoint("store.after_recover")

    def _load(self) -> None:
        for path in sorted(self.folder.glob("*.jsonl")):
            shard = read_shard(path)
            if shard is None:
                failpoint("store.before_aside")
                self.recovery.corrupt.append(path.name)
                os.replace(path, path.with_name(path.name + _CORRUPT))
            else:
                self._add(shard)


def read_shard(path: str | Path) -> Shard | None:
    """A shard from its file, or None where it is not whole and exactly as committed. Needs no lock."""
    content = Path(path).read_bytes()
    records = [_parse(line) for line in content.splitlines(keepends=True)]
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
        or Path(path).name.removesuffix(_PART) != f"{head['shard']}.jsonl"
    ):
        return None
    return Shard(head["shard"], found, head["facts"], commit["seconds"])


def _lines(shard: Shard) -> Iterator[bytes]:
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


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line, or None where the line is half-written or damaged."""
    match = _LINE.fullmatch(line)
    if match is None or int(match[1], 16) != zlib.crc32(match[2]):
        return None
    return json.loads(b"{" + match[2] + b"}")


def _take_lock(folder: Path) -> int:
    # A record lock belongs to this process alone: one that a child inherited would outlive a kill.
    refused = f"{folder} is being written by %s; wait for it, or give another output_dir"
    if (os.getpid(), folder) in _held:
        raise InputError(refused % "this process")
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.read(descriptor, 32).decode(errors="replace").strip()
        os.close(descriptor)
        raise InputError(refused % f"process {holder or 'unknown'}") from None
    except OSError as error:
        os.close(descriptor)
        raise InputError(f"{folder} cannot be locked ({error}); give an output_dir on another file system") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    _held.add((os.getpid(), folder))
    return descriptor


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
