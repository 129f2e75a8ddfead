"""What a sampler returns: a graded sample for each ask, read from the store when it is looked at."""

from collections.abc import Iterator, Sequence
from typing import Any

from verl_dft.data.lazy import LazySequence
from verl_dft.grading.pool import Grade
from verl_dft.sampling.ask import Ask
from verl_dft.sampling.record import Sample
from verl_dft.sampling.shard_file import StoredSample


class GradedSamples(LazySequence[Sample]):
    """Asks, what the store has for them, and how they ended, in the same order.

    In memory are the asks and the verdicts; texts, ids and log-probs are read where a sample is taken out. The store
    keeps the last few shards, so going through in order reads each once.

    Args:
        told: of each, the grade, why it ended, and its number of tokens.
    """

    def __init__(
        self, model: str, asks: Sequence[Ask], stored: Sequence[StoredSample], told: Sequence[tuple[Grade, str, int]]
    ) -> None:
        assert len(asks) == len(stored) == len(told)
        self._model, self._asks, self._stored, self._told = model, asks, stored, told

    def counted(self) -> Iterator[dict[str, Any]]:
        """What numbers are made of, by the names of :class:`Sample`'s fields, without reading the store."""
        for ask, (grade, finish_reason, num_tokens) in zip(self._asks, self._told, strict=True):
            yield {
                "problem_id": ask.problem_id,
                "index": ask.index,
                "grade": grade.verdict,
                "qwen": grade.qwen,
                "answer": grade.answer,
                "finish_reason": finish_reason,
                "num_tokens": num_tokens,
            }

    def __len__(self) -> int:
        return len(self._asks)

    def item(self, index: int) -> Sample:
        return _sample(self._model, self._asks[index], self._stored[index], self._told[index][0])


class Joined(LazySequence[Sample]):
    """Several sequences of samples as one."""

    def __init__(self, parts: Sequence[Sequence[Sample]]) -> None:
        self._parts = parts
        self._places = [(part, i) for part in range(len(parts)) for i in range(len(parts[part]))]

    def __len__(self) -> int:
        return len(self._places)

    def item(self, index: int) -> Sample:
        part, at = self._places[index]
        return self._parts[part][at]


def _sample(model: str, ask: Ask, stored: StoredSample, grade: Grade) -> Sample:
    text = stored.text
    return Sample(
        problem_id=ask.problem_id,
        index=ask.index,
        response=text.text,
        finish_reason=text.finish_reason,
        grade=grade.verdict,
        problem=ask.problem,
        gold=ask.gold,
        seed=stored.seed,
        model=model,
        prompt_name=ask.prompt_name,
        token_ids=text.token_ids or None,
        num_tokens=text.num_tokens,
        logp=text.logp,
        qwen=grade.qwen,
        answer=grade.answer,
        rule=grade.rule,
        detail=grade.detail,
    )
