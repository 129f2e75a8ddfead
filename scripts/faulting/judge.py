"""What a run has made, as values that can be compared, and what of it must survive a fault."""

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_dft.files import is_leftover

# When, where, how long, and how much of it in this run: differs between two undisturbed runs too.
VOLATILE = re.compile(
    r"written_at|at|key|seconds|command|reused|num_reused|num_generated|commit|train/total_tokens.*|.*tokens_per_second.*|"
    r".*(time|_s|_gb|mfu)(/.*)?|timing.*|perf.*"
)
# extra_state: of the generators too, which training leaves as it found them. training_args: a pickle with times in it.
_NO_RESULT = re.compile(
    r"(.*\.)?lock|.*\.corrupt|.*\.log|events\.out\..*|.*\.part|latest_checkpointed_iteration\.txt|extra_state_.*\.pt|"
    r"training_args\.bin"
)
_NO_FOLDERS = {"store", "logs", "cache", "tensorboard", "evaluation_log"}


def result(out: Path) -> dict[str, str]:
    """Every file below ``out`` that is a result -> a hash of what it says; whole checkpoints alone count.

    Samples in a store are compared one by one (``store:KEY``), whatever the shard that holds them.
    """
    found = {f"store:{key}": value for key, value in samples(out).items()}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        parts = path.relative_to(out).parts
        if _NO_FOLDERS & set(parts[:-1]) or _NO_RESULT.fullmatch(path.name) or any(is_leftover(p) for p in parts):
            continue
        step = next((i for i, part in enumerate(parts) if part.startswith("global_step_")), None)
        if step is not None and not Path(out, *parts[: step + 1], "complete.json").is_file():
            continue
        found["/".join(parts)] = _hash(said(path, out))
    return found


def differences(mine: Mapping[str, str], reference: Mapping[str, str]) -> list[str]:
    """What is missing, too much, or not the same."""
    return [
        f"{name} {'is missing' if name not in mine else 'is new' if name not in reference else 'differs'}"
        for name in sorted(mine.keys() | reference.keys())
        if mine.get(name) != reference.get(name)
    ]


def said(path: Path, out: Path) -> Any:
    """The content of a file without what differs from run to run; ``out`` itself is written ``OUT``."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        # a thread pool would not survive the next fork
        return _elsewhere(pq.read_table(path, use_threads=False).to_pylist(), out)
    if path.suffix == ".pt":
        try:
            with zipfile.ZipFile(path) as archive:  # the tensors; the pickle beside them differs for equal values
                return [hashlib.sha256(archive.read(name)).hexdigest() for name in _parts(archive)]
        except zipfile.BadZipFile as error:
            return str(error)
    if path.suffix in (".json", ".jsonl", ".md", ".txt", ".yaml", ".html", ".jinja"):
        text = _elsewhere(path.read_text(encoding="utf-8"), out)
        if path.suffix == ".json":
            value = _lasting(json.loads(text))
            if path.parent.name == "steps":  # hashes of files that are compared themselves, times and all
                value["outputs"] = sorted(value["outputs"])
            return value
        if path.name == "metrics.jsonl":
            return [_lasting(json.loads(line)) for line in text.splitlines()]
        return text
    return path.read_bytes()


def _elsewhere(value: Any, out: Path) -> Any:
    """``value`` with ``OUT`` and ``RUN`` in place of the folders' names, as in a text."""
    if isinstance(value, list):
        return [_elsewhere(item, out) for item in value]
    if isinstance(value, dict):
        return {key: _elsewhere(item, out) for key, item in value.items()}
    return value.replace(str(out), "OUT").replace(str(out.parent), "RUN") if isinstance(value, str) else value


def samples(out: Path) -> dict[str, str]:
    """Every committed sample below ``out``: key -> hash of its record. Reads the format itself, not with the store."""
    found = {}
    for path in sorted([*out.rglob("store/*.jsonl"), *out.rglob("store/*.jsonl.part")]):
        for record in committed(path.read_bytes()):
            found[record["key"]] = _hash(record)
    return found


def committed(content: bytes) -> list[dict[str, Any]]:
    """The samples of a shard's file; none where its commit record is missing, half written or of other bytes."""
    lines = content.splitlines(keepends=True)
    try:
        records = [json.loads(line) for line in lines]
    except ValueError:
        return []
    if len(records) < 2 or "commit" not in records[-1] or not content.endswith(b"\n"):
        return []
    if hashlib.sha256(b"".join(lines[:-1])).hexdigest() != records[-1]["commit"]["sha256"]:
        return []
    return [record["sample"] for record in records[1:-1]]


def safe(out: Path) -> dict[str, str]:
    """What may not be lost: samples (``sample KEY``), scored shards, and records of finished steps, as they are."""
    found = {f"sample {key}": value for key, value in samples(out).items()}
    for path in sorted(out.rglob("shards/*/*.npy")):
        found[f"shard {path.relative_to(out)}"] = str(path.stat().st_mtime_ns)
    for path in sorted(out.rglob("steps/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["status"] == "done":
            found[f"step {path.relative_to(out)}"] = _hash(record)
    return found


def lost(before: Mapping[str, str], after: Mapping[str, str], damaged: frozenset[str] = frozenset()) -> list[str]:
    """Names in ``before`` that are gone or are not as they were, but for those that the fault itself has damaged."""
    return [name for name, value in before.items() if after.get(name) != value and name not in damaged]


def whole_checkpoints(out: Path) -> list[int]:
    """Steps of the checkpoints that count."""
    return sorted(int(p.parent.name.rpartition("_")[2]) for p in out.glob("checkpoints/global_step_*/complete.json"))


def restarted_early(before: list[int], log: str) -> str | None:
    """What a training that had these checkpoints did instead of going on from the last of them."""
    if not before or re.search(r"steps are done already", log):
        return None
    found = [int(step) for step in re.findall(r"resuming after step (\d+)", log)]
    if found and found[-1] == before[-1]:
        return None
    return f"had a checkpoint of step {before[-1]} and went on from {found[-1] if found else 'the start'}"


def told(log: str) -> str | None:
    """The one line with which a command refused or failed; None where there is none, or a traceback with it."""
    lines = [line for line in log.splitlines() if line.strip()]
    found = [line for line in lines[-3:] if line.startswith("error: ")]
    return found[-1] if found and "Traceback (most recent call last)" not in log else None


def left_files(out: Path) -> list[str]:
    """Temporary files and folders that killed writers left in a folder."""
    return [str(path.relative_to(out)) for path in out.rglob(".*") if is_leftover(path)]


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if not VOLATILE.fullmatch(str(key))}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def _parts(archive: zipfile.ZipFile) -> list[str]:
    return [name for name in sorted(archive.namelist()) if "/data/" in name]


def _hash(value: Any) -> str:
    content = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, default=repr).encode()
    return hashlib.sha256(content).hexdigest()[:24]
