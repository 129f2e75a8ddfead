"""Between ``sample_all`` and those who watch it: a progress display and a grader."""

import sys
from collections.abc import Mapping, Sequence

from verl_dft.grading.pool import GradeItem
from verl_dft.sampling.ask import Ask
from verl_dft.sampling.grader import BackgroundGrader
from verl_dft.sampling.progress import Progress
from verl_dft.sampling.shard_file import StoredSample
from verl_dft.sampling.shards import Wanted


class ShardWatch:
    """As shards come in they are counted, shown and handed to the grader. ``asks`` are by the samples' keys."""

    def __init__(self, grader: BackgroundGrader, progress: Progress, asks: Mapping[str, Ask]) -> None:
        self._grader, self._progress, self._asks = grader, progress, asks
        self.ends: dict[str, tuple[str, int]] = {}
        """Of each sample by its key: why it ended, and its tokens."""
        self._num_reused: int | None = None
        self.num_tokens = 0

    def on_progress(self, count: int) -> None:
        """The first call is about what was there already."""
        if self._num_reused is None:
            self._num_reused = count
            self._progress.reused(count)

    def on_shard(self, _: Sequence[Wanted], samples: Sequence[StoredSample]) -> None:
        """A shard whose samples are in the store, found there or new."""
        assert self._num_reused is not None
        if len(self.ends) >= self._num_reused:
            tokens = sum(sample.text.num_tokens for sample in samples)
            self.num_tokens += tokens
            self._progress.generated(len(samples), tokens)
        self.ends |= {one.key: (sys.intern(one.text.finish_reason), one.text.num_tokens) for one in samples}
        items = [_grade_item(self._asks[sample.key], sample) for sample in samples]
        self._grader.submit([sample.key for sample in samples], items)


def _grade_item(ask: Ask, sample: StoredSample) -> GradeItem:
    return GradeItem(sample.text.text, ask.gold, ask.answer_type, ask.tolerance)
