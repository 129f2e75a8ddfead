"""The rows that ``verl-dft score`` scores: which of them fit, their exact tokens, and the file with the new column."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from verl_dft.data import tables
from verl_dft.data.dataset import RowDataset, load_dataset
from verl_dft.data.encode import RowNames
from verl_dft.data.records import PER_TOKEN, row_schema
from verl_dft.data.selection import read_table
from verl_dft.data.template import ConversationEncoder
from verl_dft.errors import InputError
from verl_dft.files import atomic_write, sha256_file, write_manifest

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from transformers import PreTrainedTokenizerBase

KL_COLUMNS = ("kl_model_reference", "kl_reference_model")
"""KL(model || reference) and KL(reference || model), nats, of the distribution from which each scored token comes."""

_NO_LIMIT = 2**31 - 1
_UNKNOWN = {"ref_logp": 0.0, "behavior_logp": np.nan}
"""What training takes a token's value for where a row stores fewer values than tokens."""


@dataclass(frozen=True)
class ScoreRows:
    """The rows of some files, tokenised and cut as a trainer would; row i is the i-th that is scored.

    Attributes:
        files: where they are from, one after the other.
        table: the scored rows as they were given (``verl_dft.data.records.row_schema``).
        dataset: every row read, uncut.
        kept: [rows] int64, the number in ``dataset`` of each scored row.
        lengths, prompt_lens: [rows] int64, tokens of prompt and response, and of the prompt alone.
        dropped: rows that are not scored: name, problem and number of tokens of each.
        report: counts of what was read, scored, dropped, cut and appended.
    """

    files: tuple[Path, ...]
    table: pa.Table
    dataset: RowDataset
    kept: np.ndarray
    lengths: np.ndarray
    prompt_lens: np.ndarray
    dropped: tuple[dict[str, Any], ...] = ()
    report: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self.dataset[int(self.kept[index])]
        return {name: value[: self.lengths[index]] for name, value in item.items()}

    @property
    def responses(self) -> np.ndarray:
        """[rows] int64, scored tokens of each row."""
        return self.lengths - self.prompt_lens


def load_score_rows(
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlong: str,
    cache_dir: str | Path,
    max_rows: int | None = None,
    problems: frozenset[str] | None = None,
    num_proc: int | None = None,
) -> ScoreRows:
    """Read, tokenise and select rows. Arguments as of ``verl_dft.data.dataset.load_dataset``.

    Args:
        problems: keep only rows of these problems; None: of all.

    Raises:
        InputError: bad rows; a row over ``max_length`` under ``error``; no row left; a chat template under which a
            text's tokens cannot be stored (see :func:`check_prompts`).
    """
    paths = tuple(Path(file).expanduser() for file in files)
    dataset = load_dataset(
        paths, tokenizer, max_length=_NO_LIMIT, overlong="error", max_rows=max_rows, cache_dir=cache_dir,
        num_proc=num_proc,
    )  # fmt: skip
    table, names = read_table(list(paths), max_rows)
    ids = table["problem_id"].to_pylist()
    lengths = dataset.lengths.astype(np.int64)
    prompts = np.load(dataset.folder / "prompt_lens.npy").astype(np.int64)
    wanted = np.array([problems is None or problem in problems for problem in ids])
    over = wanted & (lengths > max_length)
    if over.any() and overlong == "error":
        row = int(over.argmax())
        raise InputError(
            f"{names(row)}: {lengths[row]} tokens (prompt {prompts[row]}) exceed data.max_length={max_length}; raise "
            "it, or set data.overlong=drop or truncate"
        )
    lost = over & ((prompts >= max_length) if overlong == "truncate" else True)
    kept = (wanted & ~lost).nonzero()[0]
    if not len(kept):
        why = f"longer than data.max_length={max_length}" if wanted.any() else "of other problems"
        raise InputError(f"{', '.join(map(str, paths))}: all {len(ids)} rows are {why}; no row is left to score")
    check_prompts(dataset, table, names, kept, tokenizer)
    cut = np.minimum(lengths[kept], max_length)
    dropped = [{"row": names(i), "problem_id": ids[i], "tokens": int(lengths[i])} for i in lost.nonzero()[0].tolist()]
    report = {
        "rows_read": len(ids),
        "rows_of_other_problems": int((~wanted).sum()),
        "rows_scored": len(kept),
        "rows_dropped_overlong": int(lost.sum()),
        "rows_dropped_long_prompt": int((lost & (prompts >= max_length)).sum()),
        "rows_truncated": int((over & ~lost).sum()),
        "num_tokens": int(cut.sum()),
        "num_scored_tokens": int((cut - prompts[kept]).sum()),
        "end_tokens_appended": dataset.report["end_tokens_appended"],
    }
    return ScoreRows(paths, table.take(kept), dataset, kept, cut, prompts[kept], tuple(dropped), report)


def check_prompts(
    dataset: RowDataset, table: pa.Table, names: RowNames, kept: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise :class:`InputError` where a text's tokens, once stored as ids, would be trained on after another prompt.

    A row with ``response_ids`` continues the template's generation prompt and ends as the encoder says; with a few
    templates (none, or another, generation prompt; a token across the boundary) a row of text does not.
    """
    missing = table["response_ids"].is_null().to_numpy(zero_copy_only=False)
    texts = [int(row) for row in kept if missing[row]]
    encoder = ConversationEncoder(tokenizer)
    for start in range(0, len(texts), 2000):
        part = texts[start : start + 2000]
        prompts = encoder.encode_prompts(table["messages"].take(part).to_pylist(), lambda i, part=part: names(part[i]))
        for row, prompt in zip(part, prompts, strict=True):
            item = dataset[row]
            trained = int(item["loss_mask"].sum())
            ids = item["input_ids"].tolist()
            if ids[:-trained] != prompt or ids[-1] not in encoder.end_ids:
                raise InputError(
                    f"{names(row)}: under the chat template of {encoder.name!r} a response's text does not begin where "
                    "generation would begin, so its log-probs cannot be stored beside response_ids; score rows that "
                    "have response_ids, or use a template with a generation prompt"
                )


def scored_table(rows: ScoreRows, column: str, values: np.ndarray) -> pa.Table:
    """The rows with ``response_ids`` and the new columns.

    Args:
        column: ``ref_logp`` or ``behavior_logp``.
        values: [1 or 3, scored tokens] float32: log-probs, then those of :data:`KL_COLUMNS`.

    A row that was cut ends with ``finish_reason`` "length", so that training appends no end token; an end token that
    training would append is part of ``response_ids``. Other per-token columns keep their values.
    """
    import pyarrow as pa

    table, counts = rows.table, rows.responses
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    tokens = np.concatenate([rows[i]["input_ids"][rows.prompt_lens[i] :].numpy() for i in range(len(rows))])
    new = {"response_ids": pa.ListArray.from_arrays(offsets, pa.array(tokens, pa.int32()))}
    for name, part in zip((column, *KL_COLUMNS), values, strict=False):
        new[name] = pa.ListArray.from_arrays(offsets, pa.array(part, pa.float32()))
    for name in PER_TOKEN:
        if name != column and table[name].null_count < len(rows):
            new[name] = _lengthened(table[name], counts, _UNKNOWN[name])
    cut = rows.lengths < rows.dataset.lengths[rows.kept]
    if cut.any():
        reasons = table["finish_reason"].to_pylist()
        new["finish_reason"] = pa.array(["length" if c else r for c, r in zip(cut, reasons, strict=True)], pa.string())
    for name, array in new.items():
        at = table.schema.get_field_index(name)
        table = table.append_column(name, array) if at < 0 else table.set_column(at, name, array)
    for name, array in _others(rows, table.column_names).items():
        table = table.append_column(name, array)
    # a column without any value is left out, so that a file's schema says what it can provide
    return table.drop_columns([name for name in table.column_names if table[name].null_count == table.num_rows])


def _lengthened(values: pa.ChunkedArray, counts: np.ndarray, fill: float) -> pa.Array:
    import pyarrow as pa

    found: list[np.ndarray | None] = []
    for value, count in zip(values, counts, strict=True):
        if value.is_valid:
            whole = np.full(count, fill, dtype=np.float32)
            stored = value.values.to_numpy(zero_copy_only=False)[:count]
            whole[: len(stored)] = stored
        found.append(whole if value.is_valid else None)
    return pa.array(found, pa.list_(pa.float32()))


def _others(rows: ScoreRows, taken: Sequence[str]) -> dict[str, Any]:
    """Columns of the files that are not part of a training row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = {*taken, *(f.name for f in row_schema())}
    try:
        parts = []
        for path in rows.files:
            names = [name for name in tables.columns_of(path) if name not in known]
            if path.suffix == ".parquet":
                parts.append(pq.read_table(path, columns=sorted(names), page_checksum_verification=True))
            else:
                records = tables.read_records(path)
                parts.append(pa.Table.from_pylist([{name: r.get(name) for name in sorted(names)} for r in records]))
        if not any(part.column_names for part in parts):
            return {}
        whole = pa.concat_tables(parts, promote_options="permissive").take(rows.kept)
    except (pa.ArrowException, TypeError, ValueError) as error:
        print(f"warning: further columns are left out ({' '.join(str(error).split())[:120]})", file=sys.stderr)
        return {}
    return {name: whole[name] for name in whole.column_names}


def write_scored(path: Path, table: pa.Table, **facts: Any) -> None:
    """Write rows as parquet with a manifest beside it (see ``verl_dft.files.write_manifest``)."""
    with atomic_write(path, "wb") as file:
        tables.write_parquet(table, file)
    write_manifest(path, num_rows=table.num_rows, rows_sha256=sha256_file(path), **facts)


def check_values(rows: ScoreRows, values: Mapping[int, np.ndarray]) -> None:
    """Raise :class:`InputError` for a value that is no log-prob (``values``: row -> [k, tokens])."""
    for row, value in values.items():
        # rounding may lift a log-prob a little above 0, and a KL a little below
        if not np.isfinite(value).all() or (value[0] > 1e-3).any():
            bad = value[0][~np.isfinite(value[0]) | (value[0] > 1e-3)]
            shown = f"a log-prob of {bad[0]}" if len(bad) else "a KL that is not finite"
            name = rows.table["problem_id"][row].as_py()
            raise InputError(
                f"a row of problem {name!r} ({int(rows.lengths[row])} tokens) has {shown}: the model's weights or its "
                "precision are at fault; try precision=fp32"
            )
