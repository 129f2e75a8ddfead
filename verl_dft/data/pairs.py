"""Preference pairs: two responses to one prompt, the better and the worse, as text or as the ids that were sampled.

A pair file (parquet or jsonl) has the columns ``prompt`` (turns ``{role, content}``), ``chosen`` and ``rejected`` (one
assistant turn each) and optionally ``problem_id``; ``chosen_ids`` and ``rejected_ids``, the token ids of the responses
as they were sampled, used as they are; ``chosen_finish_reason`` and ``rejected_finish_reason``, where ``length`` says
that a response was cut off and gets no end-of-turn token. Rows of a file are counted from 0.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from verl_dft.data.encode import RowNames, encode_rows
from verl_dft.data.records import check_rows
from verl_dft.data.tables import need_columns, read_records
from verl_dft.data.template import vocabulary_size
from verl_dft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("chosen", "rejected")
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one pair, [T] int32 each; the responses with their end-of-turn tokens."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def num_trained(self) -> int:
        """Tokens whose log-probs count: both responses."""
        return len(self.chosen) + len(self.rejected)

    @property
    def num_tokens(self) -> int:
        """Tokens of both sequences, the prompt in each."""
        return 2 * len(self.prompt) + self.num_trained


@dataclass(frozen=True)
class Pairs:
    """Pairs that fit ``max_length``, and counts of what became of the others."""

    pairs: list[EncodedPair]
    report: dict[str, int]

    def fingerprint(self) -> str:
        """SHA-256 of the ids in their order."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            for ids in (pair.prompt, pair.chosen, pair.rejected):
                digest.update(len(ids).to_bytes(4, "little") + np.ascontiguousarray(ids, "<i4").tobytes())
        return digest.hexdigest()


def load_pairs(
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlong: str = "drop",
    num_proc: int | None = None,
) -> Pairs:
    """Pairs as token ids, split into prompt and response as training rows are (``verl_dft.data.template``).

    Args:
        max_length: most tokens of the prompt with either response.
        overlong: for a pair with a longer sequence, ``drop`` it, ``truncate`` its responses (a truncated one gets no
            end token), or ``error``. A pair whose prompt alone fills ``max_length`` is dropped under ``truncate`` too.
        num_proc: processes for tokenising; None uses the machine's cores where the pairs are many.

    Raises:
        InputError: bad files or rows, two equal responses, an overlong pair under ``error``, no pair left.
    """
    import pyarrow as pa

    paths = [Path(file).expanduser() for file in files]
    records = [_read(path) for path in paths]
    names = RowNames(tuple(map(str, paths)), tuple(map(len, records)))
    flat = [record for part in records for record in part]
    counts: Counter[str] = Counter()
    sides = []
    size = vocabulary_size(tokenizer)
    for side in SIDES:
        for i, record in enumerate(flat):
            _check_vocabulary(names(i), f"{side}_ids", record.get(f"{side}_ids"), size)
        parts = zip(paths, records, strict=True)
        table = pa.concat_tables([check_rows(str(path), [_row(r, side) for r in part]) for path, part in parts])
        encoded = encode_rows(table, tokenizer, names, num_proc)
        counts += encoded.counts
        counts["end_tokens_appended"] += sum(row.end_appended for row in encoded.rows)
        # the template ends every text; one that was cut off has no end
        ends = [-1 if r.get(f"{side}_ids") is None and _was_cut(r, side) else None for r in flat]
        sides.append([(row.prompt, row.response[:end]) for row, end in zip(encoded.rows, ends, strict=True)])
    pairs = [join(*chosen, *rejected, where=names(i)) for i, (chosen, rejected) in enumerate(zip(*sides, strict=True))]
    kept, fate = _fit(pairs, names, max_length, overlong)
    tokens = {
        "num_tokens": sum(pair.num_tokens for pair in kept),
        "num_trained_tokens": sum(pair.num_trained for pair in kept),
    }
    return Pairs(kept, {**fate, **tokens, **counts})


def join(
    prompt: np.ndarray, chosen: np.ndarray, other_prompt: np.ndarray, rejected: np.ndarray, where: str
) -> EncodedPair:
    """One pair from two encoded conversations. ``where`` names it in the error for two equal responses.

    A tokenizer that marks the start of every text may let a token of the prompt belong to the response (see
    ``verl_dft.data.template``), for one of the two only: the prompt is then what both share.
    """
    if not np.array_equal(prompt, other_prompt):
        shared = min(len(prompt), len(other_prompt))
        differing = np.flatnonzero(prompt[:shared] != other_prompt[:shared])
        shared = int(differing[0]) if len(differing) else shared
        chosen = np.concatenate([prompt[shared:], chosen])
        rejected = np.concatenate([other_prompt[shared:], rejected])
        prompt = prompt[:shared]
    if np.array_equal(chosen, rejected):
        raise InputError(f"{where}: columns 'chosen' and 'rejected' hold the same response; drop the row")
    return EncodedPair(prompt, chosen, rejected)


def _fit(
    pairs: Sequence[EncodedPair], names: RowNames, max_length: int, overlong: str
) -> tuple[list[EncodedPair], dict[str, int]]:
    kept, dropped, truncated = [], 0, 0
    for index, pair in enumerate(pairs):
        longest = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
        if longest > max_length:
            if overlong == "error":
                raise InputError(
                    f"{names(index)}: {longest} tokens (prompt {len(pair.prompt)}) exceed data.max_length="
                    f"{max_length}; raise it, or set data.overlong=drop or truncate"
                )
            room = max_length - len(pair.prompt)
            pair = EncodedPair(pair.prompt, pair.chosen[:room], pair.rejected[:room])
            if overlong == "drop" or room < 1 or np.array_equal(pair.chosen, pair.rejected):
                dropped += 1
                continue
            truncated += 1
        kept.append(pair)
    if not kept:
        raise InputError(
            f"{', '.join(names.files)}: all {len(pairs)} pairs are longer than data.max_length={max_length}; raise it"
        )
    return kept, {
        "pairs_read": len(pairs),
        "pairs_kept": len(kept),
        "pairs_dropped_overlong": dropped,
        "pairs_truncated": truncated,
    }


def _was_cut(pair: Mapping[str, Any], side: str) -> bool:
    return pair.get(f"{side}_finish_reason") not in (None, "stop")


def _row(pair: Mapping[str, Any], side: str) -> dict[str, Any]:
    """One side of a pair as a training row."""
    return {
        "messages": [*pair["prompt"], *pair[side]],
        "response_ids": pair.get(f"{side}_ids"),
        "finish_reason": pair.get(f"{side}_finish_reason"),
    }


# ---- validation ----


def _read(path: Path) -> list[dict[str, Any]]:
    """The pairs of a file, checked but for their ids. Raises InputError with file, row and column."""
    records = read_records(path, compact=[f"{side}_ids" for side in SIDES])
    need_columns(path, records, ("prompt", *SIDES), "make the file with verl-dft reject")
    for index, record in enumerate(records):
        where = f"{path}: row {index}"
        _check_prompt(where, record["prompt"])
        for side in SIDES:
            ids = record.get(f"{side}_ids")
            _check_ids(where, f"{side}_ids", ids)
            _check_response(where, side, record[side], has_ids=ids is not None)
    return records


def _check_turns(where: str, column: str, turns: Any) -> None:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise InputError(f"{where}: column {column!r} must be a non-empty list of {{role, content}}")
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            raise InputError(f"{where}: column {column!r}, turn {number}, must have a 'role' and a text 'content'")
        if turn.get("role") not in _ROLES:
            role = turn.get("role")
            raise InputError(f"{where}: column {column!r}, turn {number}, has role {role!r}; use {', '.join(_ROLES)}")


def _check_prompt(where: str, turns: Any) -> None:
    _check_turns(where, "prompt", turns)
    if turns[-1]["role"] == "assistant":
        raise InputError(
            f"{where}: column 'prompt' ends with an assistant turn; it must end where the responses begin, with the "
            "user's turn"
        )


def _check_response(where: str, side: str, turns: Any, has_ids: bool) -> None:
    _check_turns(where, side, turns)
    roles = [turn["role"] for turn in turns]
    if roles != ["assistant"]:
        raise InputError(f"{where}: column {side!r} must hold one assistant turn, not {', '.join(roles)}")
    if not has_ids and not turns[0]["content"].strip():
        raise InputError(f"{where}: column {side!r} is an empty response; drop the row or give it a text")


def _check_ids(where: str, column: str, ids: Any) -> None:
    if ids is None:
        return
    if not isinstance(ids, Sequence) or isinstance(ids, str) or not all(type(i) is int for i in ids):
        raise InputError(f"{where}: column {column!r} must be a list of token ids")
    if not ids:
        raise InputError(f"{where}: column {column!r} is empty; a response needs at least one token, drop the row")


def _check_vocabulary(where: str, column: str, ids: Sequence[int] | None, size: int) -> None:
    if ids is not None and (min(ids) < 0 or max(ids) >= size):
        raise InputError(
            f"{where}: column {column!r} holds ids that this model's tokenizer (size {size}) does not have; the pairs "
            "were sampled with another model's"
        )
