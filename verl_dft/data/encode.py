"""Rows as token arrays: conversations rendered and encoded, stored response ids joined to their prompts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np

from verl_dft.data.template import ConversationEncoder
from verl_dft.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 2000
PARALLEL_ROWS = 20_000
"""Fewer rows than this are encoded in this process: starting others would take longer."""
_MAX_PROC = 8


@dataclass
class EncodedRow:
    """Ids of one row."""

    prompt: np.ndarray
    """[P] int32."""
    response: np.ndarray
    """[R] int32, end token included."""
    end_appended: bool
    """Whether the last id was appended: neither the template nor the stored ids had an end token."""
    stored: bool
    """Whether the response ids were stored in the row, so that an appended one has no per-token value."""


@dataclass
class Encoded:
    """All rows, in order, and how often each rule of the encoder was needed."""

    rows: list[EncodedRow] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class RowNames:
    """Names row i of several concatenated files in messages."""

    files: tuple[str, ...]
    counts: tuple[int, ...]
    picked: tuple[int, ...] | None = None
    """Original indices where only some rows were taken."""

    def __call__(self, index: int) -> str:
        index = self.picked[index] if self.picked is not None else index
        for file, count in zip(self.files, self.counts, strict=True):
            if index < count:
                return f"{file}: row {index}"
            index -= count
        raise IndexError(index)


def encode_rows(
    table: pa.Table, tokenizer: PreTrainedTokenizerBase, names: RowNames, num_proc: int | None = None
) -> Encoded:
    """Encode every row of ``table``. Arguments and errors as of :func:`encode_parts`."""
    result = Encoded()
    for part in encode_parts(table, tokenizer, names, num_proc):
        result.rows += part.rows
        result.counts += part.counts
    return result


def encode_parts(
    table: pa.Table, tokenizer: PreTrainedTokenizerBase, names: RowNames, num_proc: int | None = None
) -> Iterator[Encoded]:
    """Every row of ``table`` in order, encoded 2,000 at a time.

    Args:
        num_proc: processes; None: in parallel where that pays.

    Raises:
        InputError: a row the template refuses, or stored ids that are not the tokenizer's, naming file and row.
    """
    from tqdm import tqdm

    encoder = ConversationEncoder(tokenizer)  # here first: its errors concern the tokenizer, not a row
    starts = range(0, table.num_rows, CHUNK_ROWS)
    workers = min(_num_workers(table.num_rows, num_proc), len(starts))
    with tqdm(total=table.num_rows, desc="tokenising", unit="row", disable=table.num_rows < PARALLEL_ROWS // 2) as bar:
        if workers <= 1:
            for start in starts:
                part = _encode_chunk(encoder, table, names, start)
                yield part
                bar.update(len(part.rows))
            return
        # forked: the children get table and tokenizer without copying, and the caller's main module is not run again
        with ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (encoder, table, names)) as pool:
            for part in pool.map(_encode_in_worker, starts):
                yield part
                bar.update(len(part.rows))


def _num_workers(num_rows: int, num_proc: int | None) -> int:
    if num_proc is not None:
        if num_proc < 1:
            raise InputError(f"num_proc must be at least 1, got {num_proc}")
        return num_proc
    return min(len(os.sched_getaffinity(0)), _MAX_PROC) if num_rows >= PARALLEL_ROWS else 1


_worker: tuple[ConversationEncoder, pa.Table, RowNames] | None = None


def _start_worker(encoder: ConversationEncoder, table: pa.Table, names: RowNames) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a forked child must not use the parent's thread pool
    _worker = (encoder, table, names)


def _encode_in_worker(start: int) -> Encoded:
    assert _worker is not None
    return _encode_chunk(*_worker, start)


def _encode_chunk(encoder: ConversationEncoder, table: pa.Table, names: RowNames, start: int) -> Encoded:
    chunk = table.slice(start, CHUNK_ROWS)
    messages = chunk["messages"].to_pylist()
    stored = chunk["response_ids"].to_pylist()
    reasons = chunk["finish_reason"].to_pylist()
    encoder.counts = Counter()
    rows: list[EncodedRow | None] = [None] * len(messages)
    texts = [i for i, ids in enumerate(stored) if ids is None]
    found = encoder.encode([messages[i] for i in texts], lambda k: names(start + texts[k]))
    for i, tokens in zip(texts, found, strict=True):
        rows[i] = EncodedRow(_int32(tokens.prompt), _int32(tokens.response), tokens.end_appended, stored=False)
    given = [i for i, ids in enumerate(stored) if ids is not None]
    prompts = encoder.encode_prompts([messages[i] for i in given], lambda k: names(start + given[k]))
    for i, prompt in zip(given, prompts, strict=True):
        rows[i] = _join(encoder, prompt, stored[i], reasons[i], names(start + i))
    return Encoded([row for row in rows if row is not None], encoder.counts)


def _join(
    encoder: ConversationEncoder, prompt: list[int], ids: list[int], reason: str | None, where: str
) -> EncodedRow:
    """Prompt and stored ids; the end token follows only where generation stopped by itself without writing it."""
    if min(ids) < 0 or max(ids) >= encoder.vocabulary:
        raise InputError(
            f"{where}: column 'response_ids' holds ids that tokenizer {encoder.name!r} (size {encoder.vocabulary}) "
            "does not have; the rows were made with another model's tokenizer"
        )
    if not prompt:
        raise InputError(f"{where}: the chat template of {encoder.name!r} leaves no prompt before the response")
    ended, stopped = ids[-1] in encoder.end_ids, reason in (None, "stop")
    encoder.counts["rows_cut_off"] += not ended and not stopped
    append = stopped and not ended
    return EncodedRow(_int32(prompt), _int32([*ids, encoder.end_id] if append else ids), append, stored=True)


def _int32(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)
