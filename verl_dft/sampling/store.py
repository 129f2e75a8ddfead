"""An append-only store of samples, made so that a kill at any moment costs the shard in work and nothing else.

A shard (:mod:`verl_dft.sampling.shard_file`) is written as ``<shard>.jsonl.part``, synced, and renamed. Nothing
committed is ever changed: a file that no longer agrees with its own commit record is moved aside, counted, and its
samples are missing again.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.failpoints import failpoint
from verl_dft.files import writing
from verl_dft.sampling.engine import SampleRequest
from verl_dft.sampling.shard_file import PART, Shard, StoredSample, parse_line, read_shard, shard_id, shard_lines

_CORRUPT = ".corrupt"
_RECENT = 8
"""Shards that are kept after they were read: samples wanted in one order may lie in several shards in turn."""
# POSIX locks do not keep a process from itself, so what this one holds is remembered here.
_held: set[tuple[int, Path]] = set()


@dataclass(frozen=True)
class ShardEntry:
    """What is kept in memory of a committed shard; its samples stay in its file."""

    id: str
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


class SampleStore:
    """The samples of one folder, opened by one writer at a time. Close it, or use it as a context manager.

    Every shard is checked on opening; in memory stay the samples' keys and the shards that were read last.
    ``recovery`` tells what was cleaned up on opening.

    Raises:
        InputError: another process, or this one, has the store open; a shard was damaged or removed meanwhile.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.folder)
        self.recovery = Recovery()
        self._entries: dict[str, ShardEntry] = {}
        self._places: dict[str, tuple[str, int]] = {}
        self._recent: dict[str, Shard] = {}
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
        return len(self._places)

    def has_shard(self, id: str) -> bool:
        """Whether a shard is committed."""
        return id in self._entries

    def close(self) -> None:
        """Let the next writer in. Safe to call twice."""
        if self._lock is not None:
            _held.discard((os.getpid(), self.folder))
            os.close(self._lock)
            self._lock = None

    def entry(self, id: str) -> ShardEntry:
        """A committed shard without its samples."""
        return self._entries[id]

    def shard(self, id: str) -> Shard | None:
        """A committed shard with its samples, or None."""
        if id not in self._entries:
            return None
        shard = self._recent.pop(id, None) or self._read(id)
        self._remember(shard)
        return shard

    def place(self, key: str) -> tuple[str, int] | None:
        """Shard and position of the sample of that key, whichever shard holds it, or None."""
        return self._places.get(key)

    def sample(self, place: tuple[str, int]) -> StoredSample:
        """The sample at a place."""
        shard = self.shard(place[0])
        assert shard is not None, "a place in no shard"
        return shard.samples[place[1]]

    def append(self, samples: Sequence[StoredSample], facts: Mapping[str, Any], seconds: float) -> Shard:
        """Write a shard and commit it. When this returns, it survives a kill and a power cut.

        A shard of the same members that is already committed is kept, and returned, as it is.
        """
        assert self._lock is not None, "the store is closed"
        shard = Shard(shard_id([sample.key for sample in samples]), list(samples), dict(facts), round(seconds, 3))
        if (committed := self.shard(shard.id)) is not None:
            return committed
        with writing(self.folder):
            self._write(shard)
        self._add(shard)
        self._remember(shard)
        return shard

    def _read(self, id: str) -> Shard:
        path = self.folder / f"{id}.jsonl"
        try:
            shard = read_shard(path)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); run the same command again") from None
        if shard is None:
            raise InputError(
                f"{path} was changed while it was in use; run the same command again: what it held is generated anew"
            )
        return shard

    def _remember(self, shard: Shard) -> None:
        self._recent[shard.id] = shard
        if len(self._recent) > _RECENT:
            del self._recent[next(iter(self._recent))]

    def _write(self, shard: Shard) -> None:
        final = self.folder / f"{shard.id}.jsonl"
        part = final.with_name(final.name + PART)
        # Unbuffered: a line that was appended is in the file, so that a kill leaves what it would leave at that place.
        with open(part, "wb", buffering=0) as file:
            for line in shard_lines(shard):
                file.write(line)
            failpoint("store.before_fsync")
            os.fsync(file.fileno())
            failpoint("store.after_fsync")
        failpoint("store.before_rename")
        os.replace(part, final)
        failpoint("store.after_rename")
        _sync_folder(self.folder)

    def _add(self, shard: Shard) -> None:
        self._entries[shard.id] = ShardEntry(shard.id, shard.facts, shard.seconds)
        for position, sample in enumerate(shard.samples):
            self._places.setdefault(sample.key, (shard.id, position))

    def _recover(self) -> None:
        for part in sorted(self.folder.glob(f"*.jsonl{PART}")):
            failpoint("store.before_recover")
            if read_shard(part) is not None:  # killed between the commit record and the rename
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(part, part.with_suffix(""))
                continue
            content = part.read_bytes()
            whole, _, rest = content.rpartition(b"\n")
            records = [parse_line(line + b"\n") for line in whole.split(b"\n") if line]
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
