"""From problems to the parquet files that verl's dataset reads: prompts, answers and, for a group, demonstrations."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from verl_dft.build.group_plan import Composition
from verl_dft.data.problems import inputs_of, problems_of
from verl_dft.data.prompts import find_prompt
from verl_dft.data.records import Problem
from verl_dft.data.template import ConversationEncoder
from verl_dft.errors import InputError
from verl_dft.files import atomic_write, sha256_file, write_json, write_manifest
from verl_dft.training.online.configure import composition_of
from verl_dft.training.online.rewriting import overlong_when_guided, unjudged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN, VAL = "train.parquet", "val.parquet"


def prepare_prompts(config: DictConfig, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> dict[str, Any]:
    """Write ``train.parquet`` and ``val.parquet`` to ``folder`` and point ``data.train_files`` and ``val_files`` there.

    Returns:
        what was kept and left out, by part.

    Raises:
        InputError: no problems or too few for a batch, one without what the algorithm needs, one that is too long with
            ``overlong=error``, or other prompts than a run in ``folder`` began with.
    """
    parts = {"train": (problems_of(config.data), inputs_of(config.data)), "val": _validation(config)}
    report: dict[str, Any] = {}
    placeholder: list[dict[str, Any]] = []  # verl reads a validation file even where it never validates
    for part, (problems, inputs) in parts.items():
        rows, counts = _rows(problems, config, tokenizer, with_demonstrations=part == "train")
        report[part] = {key: count for key, count in counts.items() if count}
        if part == "train":
            _check_enough(len(rows), len(problems), report[part], config.data.train_batch_size)
            placeholder = [{**rows[0], "extra_info": {**rows[0]["extra_info"], "demonstrations": []}}]
        elif problems and not rows:
            raise InputError(
                f"none of {len(problems)} validation problems can be used ({_told(report[part])}); give others in "
                "data.val_files"
            )
        path = folder / (TRAIN if part == "train" else VAL)
        _write(path, rows or placeholder)
        write_manifest(path, inputs=inputs, seed=config.seed, report=report[part])
    _check_same(folder)
    config.data.train_files, config.data.val_files = str(folder / TRAIN), str(folder / VAL)
    write_json(folder / "report.json", report)
    return report


def _check_enough(kept: int, read: int, counts: Mapping[str, int], batch: int) -> None:
    if kept < batch:
        raise InputError(
            f"{kept} of {read} problems can be trained on ({_told(counts)}), too few for one batch of "
            f"data.train_batch_size={batch}; use a smaller batch or more problems"
        )


def _validation(config: DictConfig) -> tuple[list[Problem], dict[str, str]]:
    data = config.data
    wanted = config.trainer.test_freq > 0 or config.trainer.val_before_train
    if data.val_files:
        given = {"train_files": data.val_files, "source": data.source}
        return problems_of(given), inputs_of(given)
    problems: list[Problem] = []
    if wanted and not data.train_files:
        from verl_dft.data.sources import load_problem_set

        problems = load_problem_set(data.source).val
    if wanted and not problems:
        raise InputError(
            f"trainer.test_freq={config.trainer.test_freq} and val_before_train={config.trainer.val_before_train} need "
            "problems to validate on: set data.val_files or data.source.num_val"
        )
    return problems, {}


def _rows(
    problems: Sequence[Problem], config: DictConfig, tokenizer: Any, *, with_demonstrations: bool
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows, and how many problems became one or why not."""
    composition = composition_of(config) if with_demonstrations else None
    keeps_solution = config.rewrite.enabled and with_demonstrations
    _, prompt = find_prompt(config.prompt)
    encoder = ConversationEncoder(tokenizer)
    unusable = unjudged(problems, config) if keeps_solution else set()
    counts: Counter[str] = Counter()
    usable, texts = [], []
    for problem in problems:
        shown = demonstrations_of(problem, composition) if composition else []
        if keeps_solution and (problem.solution or "").strip():
            shown = [{"origin": "expert", "text": problem.solution}]
        missing = (composition.expert + composition.teacher if composition else keeps_solution) - len(shown)
        if not problem.answer.strip():
            counts["without_answer"] += 1
        elif problem.id in unusable:
            counts["gold_not_judged"] += 1
        elif missing > 0:
            if config.group.missing == "error":
                raise InputError(_missing(problem, composition))
            counts["without_demonstrations"] += 1
        else:
            usable.append(problem)
            texts.append(shown)
    turns = [prompt.messages(problem.problem) for problem in usable]
    long = _overlong(turns, texts, usable, encoder, config)
    rows = []
    for index, (problem, asked, shown) in enumerate(zip(usable, turns, texts, strict=True)):
        if index in long:
            counts["overlong"] += 1
            continue
        rows.append(_row(problem, asked, shown, len(rows), config.answer_type))
    counts["kept"] = len(rows)
    return rows, counts


def demonstrations_of(problem: Problem, composition: Composition) -> list[dict[str, str]]:
    """The stored responses of a group in their order: the expert's, then the first of the teacher's."""
    expert = [problem.solution] if composition.expert and (problem.solution or "").strip() else []
    teacher = [text for text in problem.teacher_solutions or [] if text.strip()][: composition.teacher]
    return [{"origin": "expert", "text": t} for t in expert] + [{"origin": "teacher", "text": t} for t in teacher]


def _missing(problem: Problem, composition: Composition | None) -> str:
    if composition is None:
        return f"problem {problem.id!r} has no solution to fall back on; give it one, or set group.missing=skip"
    teachers = len([text for text in problem.teacher_solutions or [] if text.strip()])
    return (
        f"problem {problem.id!r} has {'a' if problem.solution else 'no'} solution and {teachers} teacher texts "
        f"(column teacher_solutions), and group.composition={composition} wants {composition.expert} and "
        f"{composition.teacher}; add texts, change the composition, or set group.missing=skip"
    )


def _overlong(
    turns: Sequence[Any], texts: Sequence[Any], problems: Sequence[Problem], encoder: Any, config: DictConfig
) -> set[int]:
    """Indices of problems whose prompt or a demonstration is too long."""
    data = config.data
    prompts = encoder.encode_prompts(turns, lambda i: f"problem {problems[i].id!r}")
    long = {i for i, ids in enumerate(prompts) if len(ids) > data.max_prompt_length}
    owners = [i for i, shown in enumerate(texts) for _ in shown]
    talks = [
        [*turns[i], {"role": "assistant", "content": shown["text"]}] for i, some in enumerate(texts) for shown in some
    ]
    for owner, tokens in zip(
        owners, encoder.encode(talks, lambda i: f"problem {problems[owners[i]].id!r}"), strict=True
    ):
        if len(tokens.response) > data.max_response_length:
            long.add(owner)
    if owners and config.rewrite.enabled:
        long |= overlong_when_guided(problems, encoder, config)
    if long and config.overlong == "error":
        first = problems[min(long)].id
        raise InputError(
            f"problem {first!r} has a prompt of more than data.max_prompt_length={data.max_prompt_length} tokens or a "
            f"demonstration of more than data.max_response_length={data.max_response_length}, or its guided prompt and "
            f"a response are more than rollout.max_model_len ({len(long)} problems have); raise them, or set "
            "overlong=drop"
        )
    return long


def _row(problem: Problem, turns: Any, shown: Any, index: int, answer_type: str) -> dict[str, Any]:
    return {
        "data_source": problem.source or "problems",
        "prompt": turns,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {
            "index": index,
            "problem_id": problem.id,
            "problem": problem.problem,
            "answer_type": answer_type,
            "demonstrations": shown,
        },
    }


def _schema() -> Any:
    import pyarrow as pa

    def texts(*names: str) -> Any:
        return pa.struct([(name, pa.string()) for name in names])

    extra = [("index", pa.int64()), *((name, pa.string()) for name in ("problem_id", "problem", "answer_type"))]
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(texts("role", "content"))),
            ("ability", pa.string()),
            ("reward_model", texts("style", "ground_truth")),
            ("extra_info", pa.struct([*extra, ("demonstrations", pa.list_(texts("origin", "text")))])),
        ]
    )


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic_write(path, "wb") as file:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=_schema()), file)


def _check_same(folder: Path) -> None:
    """A run that has begun goes on with the prompts it began with, or not at all."""
    record, begun = folder / "prompts.json", (folder.parent / "checkpoints").is_dir()
    found = {name: sha256_file(folder / name) for name in (TRAIN, VAL)}
    if begun and record.is_file():
        import json

        if json.loads(record.read_text(encoding="utf-8")) != found:
            raise InputError(
                f"the problems or the prompt have changed since the run in output_dir={folder.parent} began; restore "
                "them, or choose another output_dir"
            )
    write_json(record, found)


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{key} {count}" for key, count in counts.items()) or "there are none"
