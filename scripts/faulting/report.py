"""The report of faults: a line of JSON for each, and what they come to as Markdown."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_dft.provenance import hardware

_CALL = re.compile(r'failpoint\(\s*"([\w.]+)"')


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a report; a last line that a kill has cut off is not one."""
    records = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record; when this returns it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the last writer was killed
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def known_places() -> list[str]:
    """Every failpoint in the package, by name."""
    import verl_dft

    texts = (path.read_text(encoding="utf-8") for path in Path(verl_dft.__file__).parent.rglob("*.py"))
    return sorted({name for text in texts for name in _CALL.findall(text)})


def name_of(place: str) -> str:
    """The failpoint of ``NAME@DETAIL:COUNT``."""
    return re.split("[@:]", place)[0]


def hits(records: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """How often each failpoint was hit."""
    places = [place for record in records for place in (record.get("place"), record.get("second")) if place]
    return Counter(name_of(place) for place in places)


def outcome(record: Mapping[str, Any]) -> str:
    """One of a few words."""
    if record.get("wrong"):
        return "WRONG"
    if record.get("lost"):
        return "LOST"
    if record.get("hang"):
        return "HUNG"
    if record["problems"]:
        return "FAILED"
    return "clear error, then equal" if record.get("told") else "equal"


def bad(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those with a problem."""
    return [record for record in records if record["problems"]]


def markdown(records: Sequence[Mapping[str, Any]], command: str) -> str:
    """The summary."""
    total = Counter(map(outcome, records))
    commits = ", ".join(sorted({str(record["commit"])[:12] + (" with changes" if " " in str(record["commit"]) else "")
                                for record in records}))  # fmt: skip
    detect = sorted(r["detect_s"] for r in records if "detect_s" in r and "killed" in r)
    lines = [
        "# Faults",
        "",
        f"`{command}`, commit {commits}, {hardware()}, {_dates(records)}: {len(records)} faults, "
        f"{sum(r.get('lost', 0) for r in records)} lost samples, {total['WRONG']} silent wrong results, "
        f"{sum(bool(r.get('hang')) for r in records)} hangs over a minute, "
        f"{sum(r.get('left_processes', 0) for r in records)} processes and "
        f"{sum(r.get('left_shm', 0) for r in records)} segments of shared memory left over.",
        "",
        *_page(),
        "",
        "| scenario | " + " | ".join(kinds := sorted({r["kind"] for r in records})) + " | all |",
        "|---|" + "---:|" * (len(kinds) + 1),
    ]
    for name in sorted({r["scenario"] for r in records}):
        count = Counter(r["kind"] for r in records if r["scenario"] == name)
        lines.append(f"| {name} | {' | '.join(str(count[k] or '') for k in kinds)} | {sum(count.values())} |")
    lines += ["", "| outcome | faults |", "|---|---:|", *(f"| {k} | {v} |" for k, v in total.most_common()), ""]
    if detect:
        lines += [f"From a kill to the command's end: median {detect[len(detect) // 2]} s, longest {detect[-1]} s.", ""]
    kept = sum(r.get("kept", 0) for r in records)
    lines += [f"There when the command was run again, and unchanged after it: {kept} samples, shards and steps.", ""]
    found, known = hits(records), known_places()
    lines += ["| failpoint | hits |", "|---|---:|"]
    lines += [f"| `{name}` | {found[name]} |" for name in known if found[name]]
    if missed := [name for name in known if not found[name]]:
        lines += ["", f"Not hit: {', '.join(f'`{name}`' for name in missed)}."]
    if problems := bad(records):
        lines += ["", "## Problems", ""]
        for r in problems:
            what = f"{r['scenario']}, {r['kind']} {r.get('place') or ''} (seed {r['seed']})"
            lines.append(f"- {what}: {'; '.join(r['problems'])}")
    return "\n".join(lines) + "\n"


def _page() -> list[str]:
    return [
        "After each fault the same command was run again. *Equal*: every file of its result says what an undisturbed "
        "run's says (rows, texts, token ids, verdicts, weights, optimizer states, metrics; not times, and not what was "
        "reused). *Lost*: a committed sample, a scored shard or a finished step that was there after one run and not, "
        "or not as it was, after the next; or a checkpoint that was passed over. Not compared: locks, logs, the "
        "tokenised cache, the states of random generators in checkpoints (training draws by its seed), and of online "
        "training more than which files there are. A *hang* is a command that has not ended a minute after it should "
        "have.",
    ]


def _dates(records: Sequence[Mapping[str, Any]]) -> str:
    days = sorted({record["at"][:10] for record in records})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else ""
