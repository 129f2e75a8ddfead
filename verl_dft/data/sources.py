"""Where problems come from: public sets (hub or a local copy), local files, or the tiny world's generator.

Every loader returns the training problems, validation problems kept apart from them, and a report of what was read,
selected and dropped. Options are those of ``configs/data/<name>.yaml`` under ``source``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_dft.data import parsing, tables
from verl_dft.data.arithmetic import LEVEL_WEIGHTS, make_problems
from verl_dft.data.records import Problem
from verl_dft.errors import InputError


@dataclass
class ProblemSet:
    """Training and validation problems (never the same ones), what they were made of, and counts."""

    train: list[Problem]
    val: list[Problem]
    inputs: dict[str, Path] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


def load_problems(source: Mapping[str, Any]) -> list[Problem]:
    """The training problems of a source. ``source["name"]`` decides; see :func:`load_problem_set`."""
    return load_problem_set(source).train


def load_problem_set(source: Mapping[str, Any]) -> ProblemSet:
    """Training and validation problems of a source.

    Common options: ``num_rows`` (None: all), ``num_val``, ``seed``.

    Raises:
        InputError: unknown source or option, missing file or column, more rows asked for than there are.
    """
    name = source.get("name")
    if name not in _SOURCES:
        raise InputError(f"data.source.name: no source {name!r}; use one of {', '.join(source_names())}")
    loader, options = _SOURCES[name]
    for key in source:
        if key not in ("name", *options):
            raise InputError(f"data.source has no option {key!r} for {name}; valid: {', '.join(options)}")
    problems = loader({**options, **source})
    if not problems.train:
        raise InputError(f"source {name}: no problem is left ({problems.report}); loosen its filters")
    return problems


def source_names() -> list[str]:
    """Names of all sources."""
    return sorted(_SOURCES)


# ---- public sets and files ----


@dataclass(frozen=True)
class _Rows:
    """Raw records of a set; only those asked for become Python objects."""

    label: str
    num_rows: int
    take: Callable[[Sequence[int]], list[dict[str, Any]]]
    inputs: dict[str, Path] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def _numinamath_cot(options: dict[str, Any]) -> ProblemSet:
    return _public(options, parsing.numinamath_cot)


def _gsm8k(options: dict[str, Any]) -> ProblemSet:
    final = options["answer_format"]
    if final not in parsing.ANSWER_FORMATS:
        valid = ", ".join(parsing.ANSWER_FORMATS)
        raise InputError(f"data.source.answer_format is {final!r}; use one of {valid}")
    return _public(options, lambda *where: parsing.gsm8k(*where, answer_format=final))


def _math(options: dict[str, Any]) -> ProblemSet:
    return _public(options, parsing.competition_math)


def _files(options: dict[str, Any]) -> ProblemSet:
    keys = {k: options[f"{k}_key"] for k in ("id", "problem", "answer", "solution")}
    if not options["path"]:
        raise InputError("data=files needs data.source.path=FILE (problems) or data.train_files=FILE (training rows)")
    return _public(options, lambda *where: parsing.user_file(*where, keys=keys))


def _public(options: dict[str, Any], parse: Callable[[str, int, dict[str, Any]], Problem | None]) -> ProblemSet:
    rows = _local(options["path"]) if options["path"] else _from_hub(options)
    train, val = _select(rows, options)
    report: dict[str, Any] = {"problems_available": rows.num_rows, "problems_selected": len(train) + len(val)}
    report |= {"problems_dropped_empty": 0, "problems_dropped_overlong": 0, **rows.facts}
    parts = []
    for indices in (train, val):
        pairs = zip(indices, rows.take(indices), strict=True)
        parsed = [parse(rows.label, index, record) for index, record in pairs]
        kept = [problem for problem in parsed if problem is not None]
        report["problems_dropped_empty"] += len(parsed) - len(kept)
        if options["max_tokens"] is not None:
            before = len(kept)
            kept = _drop_overlong(kept, options)
            report["problems_dropped_overlong"] += before - len(kept)
        parts.append(kept)
    report["problems_without_answer"] = sum(not p.answer for part in parts for p in part)
    return ProblemSet(parts[0], parts[1], rows.inputs, report)


def _local(path: str | Sequence[str]) -> _Rows:
    paths = [Path(p).expanduser() for p in ([path] if isinstance(path, str | Path) else path)]
    records = [record for p in paths for record in tables.read_records(p)]
    label = str(paths[0]) if len(paths) == 1 else ", ".join(map(str, paths))
    inputs = {f"source{i}" if i else "source": p for i, p in enumerate(paths)}
    return _Rows(label, len(records), lambda indices: [records[i] for i in indices], inputs)


def _from_hub(options: dict[str, Any]) -> _Rows:
    import datasets

    configs = options.get("hub_configs") or [None]
    label = f"{options['hub']} ({options['split']})"
    try:
        parts = [datasets.load_dataset(options["hub"], config, split=options["split"]) for config in configs]
    except Exception as error:  # the hub's client raises a dozen kinds, from no network to no such split
        detail = " ".join(str(error).split())[:160]
        raise InputError(
            f"cannot load {label} from the hub: {detail}; for a local copy give data.source.path=FILE"
        ) from None
    table = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    facts = {"hub": options["hub"], "hub_fingerprint": table._fingerprint}
    return _Rows(label, len(table), lambda indices: table.select(list(indices)).to_list(), facts=facts)


def _select(rows: _Rows, options: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Row numbers for training and validation: a seeded random draw, or the first ones in order."""
    how, num_val = options["subset"], options["num_val"] or 0
    if how not in ("random", "first_n"):
        raise InputError(f"data.source.subset is {how!r}; use random or first_n")
    num_train = rows.num_rows - num_val if options["num_rows"] is None else options["num_rows"]
    if num_train < 1 or num_val < 0:
        raise InputError(
            f"data.source: {num_train} training and {num_val} validation rows of {rows.num_rows} in {rows.label}; "
            "set num_rows >= 1 and a smaller num_val"
        )
    if num_train + num_val > rows.num_rows:
        raise InputError(
            f"{rows.label} has {rows.num_rows} rows, but {num_train} for training + {num_val} for validation were "
            "asked for; lower data.source.num_rows (null takes all) or data.source.num_val"
        )
    order = list(range(rows.num_rows))
    if how == "random":
        # a full shuffle, so that a larger num_rows or num_val extends the draw instead of changing it
        random.Random(options["seed"]).shuffle(order)
    return order[:num_train], order[num_train : num_train + num_val]


def _drop_overlong(problems: list[Problem], options: dict[str, Any]) -> list[Problem]:
    """The length filter of the data-rewriting paper: question and solution, through the chat template."""
    from transformers import AutoTokenizer

    from verl_dft.data.template import ConversationEncoder

    if not options["tokenizer"]:
        raise InputError("data.source.max_tokens needs data.source.tokenizer=MODEL_OR_FOLDER to count with")
    encoder = ConversationEncoder(load_tokenizer(options["tokenizer"], AutoTokenizer))
    chats = [
        [{"role": "user", "content": p.problem}, {"role": "assistant", "content": p.solution or ""}] for p in problems
    ]
    tokens = encoder.encode(chats, lambda i: f"problem {problems[i].id}")
    lengths = [len(t.prompt) + len(t.response) for t in tokens]
    return [p for p, length in zip(problems, lengths, strict=True) if length <= options["max_tokens"]]


def load_tokenizer(path: str, auto: Any = None) -> Any:
    """The tokenizer of a model folder or hub name. Raises InputError where it cannot be loaded."""
    if auto is None:
        from transformers import AutoTokenizer as auto
    try:
        return auto.from_pretrained(path)
    except (OSError, ValueError, ImportError, KeyError) as error:
        detail = " ".join(str(error).split())[:160]
        raise InputError(f"no tokenizer can be loaded from {path!r}: {detail}") from None


# ---- the tiny world ----


def _arithmetic(options: dict[str, Any]) -> ProblemSet:
    num_rows = 768 if options["num_rows"] is None else options["num_rows"]
    shared = (options["seed"], options["level_weights"])
    train = make_problems(num_rows, *shared, split="train", style=options["style"])
    val = make_problems(options["num_val"] or 0, *shared, split="val", style=options["style"])
    levels = {f"level_{k}": sum(p.level == k for p in train) for k in range(1, 6)}
    return ProblemSet(train, val, report={"problems_selected": len(train) + len(val), **levels})


_PUBLIC: dict[str, Any] = {
    "path": None, "hub": None, "hub_configs": None, "split": "train", "num_rows": None, "num_val": 0,
    "subset": "random", "seed": 1, "max_tokens": None, "tokenizer": None,
}  # fmt: skip
_SOURCES: dict[str, tuple[Callable[[dict[str, Any]], ProblemSet], dict[str, Any]]] = {
    "numinamath_cot": (_numinamath_cot, {**_PUBLIC, "hub": "AI-MO/NuminaMath-CoT"}),
    "gsm8k": (_gsm8k, {**_PUBLIC, "hub": "openai/gsm8k", "hub_configs": ["main"], "answer_format": "boxed"}),
    "math": (_math, {**_PUBLIC, "hub": "EleutherAI/hendrycks_math", "hub_configs": list(parsing.MATH_SUBJECTS)}),
    "files": (
        _files,
        {**_PUBLIC, "id_key": "id", "problem_key": "problem", "answer_key": "answer", "solution_key": "solution"},
    ),
    "arithmetic": (
        _arithmetic,
        {"num_rows": 768, "num_val": 64, "seed": 0, "level_weights": LEVEL_WEIGHTS, "style": "expert"},
    ),
}
