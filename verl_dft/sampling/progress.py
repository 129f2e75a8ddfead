"""How far sampling is: a bar on a terminal, a line now and then in a log."""

import sys
import threading
import time
from collections.abc import Sequence

from verl_dft.grading.pool import Grade

_EVERY_S = 30.0


class Progress:
    """Samples done, tokens per second, time left and the share that was right so far. Usable from several threads.

    Args:
        total: samples wanted.
        name: what is being sampled.
    """

    def __init__(self, total: int, name: str = "samples") -> None:
        from tqdm import tqdm

        self._total, self._name = total, name
        self._bar = tqdm(total=total, desc=name, unit="sample") if sys.stderr.isatty() else None
        self._lock = threading.Lock()
        self._begun = self._told = time.monotonic()
        self._done = self._reused = self._tokens = self._graded = self._correct = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def reused(self, count: int) -> None:
        """So many samples were there already."""
        with self._lock:
            self._reused += count
            self._advance(count)

    def generated(self, count: int, tokens: int) -> None:
        """So many samples, with so many tokens, were just generated."""
        with self._lock:
            self._tokens += tokens
            self._advance(count)

    def graded(self, grades: Sequence[Grade]) -> None:
        """These were just graded."""
        with self._lock:
            self._graded += len(grades)
            self._correct += sum(grade.verdict == "correct" for grade in grades)

    def _advance(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.set_postfix_str(self._rates(), refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._told >= _EVERY_S:
            self._told = time.monotonic()
            line = f"{self._name}: {self._done}/{self._total}, {self._left()}{self._rates()}"
            print(line, file=sys.stderr, flush=True)

    def _rates(self) -> str:
        parts = [f"{self._tokens / max(time.monotonic() - self._begun, 1e-9):.0f} tokens/s"] if self._tokens else []
        if self._graded:
            parts.append(f"{100 * self._correct / self._graded:.1f}% of {self._graded} right")
        return ", ".join(parts)

    def _left(self) -> str:
        generated = self._done - self._reused
        if not generated:
            return ""
        seconds = (time.monotonic() - self._begun) / generated * (self._total - self._done)
        return f"about {seconds / 60:.0f} min left, "
