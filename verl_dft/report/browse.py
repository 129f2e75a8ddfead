"""``samples.html``: a page to read an evaluation's samples in, problem by problem, with their verdicts.

One file that needs no network: the samples stand in it as JSON, ``browse.js`` shows 20 problems at a time and makes a
response's text only when it is opened. What a model wrote is never markup: the JSON has no ``<``, the script writes
with ``textContent``, and the page's policy allows no script but this one, no image, frame or request.
"""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_dft.data.tables import columns_of, read_parquet
from verl_dft.errors import InputError
from verl_dft.files import atomic_write
from verl_dft.report import html

MAX_CHARS = 20_000
"""Of a longer response the page has the beginning and the end; ``samples.parquet`` has all of it."""
_BUDGET = 64_000_000  # characters of responses in one page; a browser still opens it in seconds
_FIELDS = ("index", "grade", "qwen", "answer", "tokens", "finish", "rule", "detail", "response")
_COLUMNS = (
    "problem_id",
    "index",
    "grade",
    "answer",
    "num_tokens",
    "finish_reason",
    "rule",
    "detail",
    "response",
    "gold",
)
_SETTINGS = ("n", "temperature", "top_p", "top_k", "max_tokens", "prompt", "seed", "limit")
_STYLE = """
.bar{position:sticky;top:0;background:#fff;padding:.6rem 0;border-bottom:1px solid #ddd;display:flex;gap:.8rem;
flex-wrap:wrap;align-items:center} .quiet{color:#666;margin:.2rem 0} .question{background:#eef3fa}
section{margin:1.5rem 0} h2{font-size:1.05rem;margin:0;overflow-wrap:anywhere}
details{padding:.2rem .6rem;margin:.25rem 0} summary{cursor:pointer;overflow-wrap:anywhere}
"""
_FILTERS = (
    ("all", "all samples"),
    ("correct", "correct"),
    ("wrong", "wrong"),
    ("no_answer", "no answer"),
    ("ungraded", "timeout or error"),
    ("truncated", "truncated"),
    ("disagreeing", "strict and qwen verdicts disagree"),
)


def write_samples_page(folder: str | Path) -> Path:
    """Write ``<folder>/samples.html`` from its ``samples.parquet`` and ``result.json``, atomically; returns its path.

    The columns ``qwen`` (a second verdict) and ``problem`` (the problem's text) are shown where they exist. The page's
    address keeps the filter: ``samples.html#filter=wrong&find=ID&page=2`` (and ``&open=1`` opens the responses).

    Raises:
        InputError: a file is missing, or ``samples.parquet`` lacks a column or samples.
    """
    folder = Path(folder)
    result, rows = _read(folder)
    data, cut = _data(result, rows)
    script = Path(__file__).with_name("browse.js").read_text(encoding="utf-8")
    with atomic_write(folder / "samples.html") as file:
        title = f"{result['model']} on {result['benchmark']}"
        file.write(html.page(title, _parts(result, rows, data, script, cut), head=_head(script)))
    return folder / "samples.html"


def _read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    for name in ("result.json", "samples.parquet"):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} does not exist; give the folder of a finished evaluation")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    names = columns_of(folder / "samples.parquet")
    if missing := [name for name in _COLUMNS if name not in names]:
        raise InputError(f"{folder / 'samples.parquet'} lacks the columns {', '.join(missing)}; evaluate again")
    wanted = [*_COLUMNS, *(name for name in ("qwen", "problem") if name in names)]
    rows = read_parquet(folder / "samples.parquet", wanted).to_pylist()
    if len(rows) != result["num_samples"]:
        raise InputError(
            f"{folder / 'samples.parquet'} has {len(rows)} samples, result.json is of {result['num_samples']}; "
            "evaluate again"
        )
    return result, rows


def _data(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], int]:
    """What the script reads, and how many responses are not whole."""
    limit = min(MAX_CHARS, max(500, _BUDGET // max(1, len(rows))))
    levels = {problem["id"]: problem.get("level") for problem in result["per_problem"]}
    problems: dict[str, dict[str, Any]] = {}
    for row in rows:
        id_ = row["problem_id"]
        known = {
            "id": id_,
            "level": levels.get(id_),
            "gold": row["gold"],
            "question": row.get("problem"),
            "samples": [],
        }
        sample = (row["index"], row["grade"], row.get("qwen") or "", row["answer"], row["num_tokens"],
                  row["finish_reason"], row["rule"], row["detail"], _shortened(row["response"], limit))  # fmt: skip
        problems.setdefault(id_, known)["samples"].append(sample)
    cut = sum(len(row["response"]) > limit for row in rows)
    return {"has_qwen": "qwen" in rows[0], "fields": _FIELDS, "problems": list(problems.values())}, cut


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    left_out = f"[… {len(text) - 2 * half} characters are left out here; samples.parquet has them …]"
    return f"{text[:half]}\n{left_out}\n{text[-half:]}"


def _head(script: str) -> str:
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; base-uri 'none'"
    return f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{_STYLE}</style>'


def _parts(
    result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], data: Mapping[str, Any], script: str, cut: int
) -> Iterator[str]:
    interval = result["avg_ci95"]
    score = f"{100 * result['avg']:.1f}%"
    score += f" (95% interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
    shares = f"{100 * result['truncated_frac']:.1f}% cut off, {100 * result['no_answer_frac']:.1f}% without an answer"
    yield html.paragraph(
        f"avg@{result['n']} {score}: {result['num_problems']} problems, {len(rows)} samples; {shares}."
    )
    settings = ", ".join(f"{key}={result[key]}" for key in _SETTINGS if result.get(key) is not None)
    yield html.paragraph(settings, kind="quiet")
    if cut:
        yield html.paragraph(f"{cut} long responses are shown by beginning and end; samples.parquet has all of them.")
    yield _bar(rows, data["has_qwen"])
    yield '<div id="list"><noscript>This page needs JavaScript to show the samples.</noscript></div>'
    yield f'<script type="application/json" id="data">{embedded_json(data)}</script>'
    assert "</script" not in script.lower()
    yield f"<script>{script}</script>"


def _bar(rows: Sequence[Mapping[str, Any]], has_qwen: bool) -> str:
    count: Counter[str] = Counter(row["grade"] for row in rows)
    count["all"], count["ungraded"] = len(rows), count["timeout"] + count["error"]
    count["truncated"] = sum(row["finish_reason"] == "length" for row in rows)
    count["disagreeing"] = sum((row["grade"] == "correct") != (row.get("qwen") == "correct") for row in rows)
    shown = [pair for pair in _FILTERS if has_qwen or pair[0] != "disagreeing"]
    options = "".join(f'<option value="{value}">{text} ({count[value]})</option>' for value, text in shown)
    return (
        f'<div class="bar"><label>show <select id="filter" autocomplete="off">{options}</select></label>'
        '<label>find <input id="find" autocomplete="off" placeholder="id, problem or gold"></label>'
        '<button id="previous">previous</button><button id="next">next</button>'
        '<button id="open">open or close all</button><span id="shown" class="quiet"></span></div>'
    )


def embedded_json(value: Any) -> str:
    """JSON that can stand inside a ``script`` element: ASCII, and without ``<``, ``>`` and ``&``."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
