"""Ends a run that hangs, with the reason: a part that takes longer than its limit, or a vLLM engine that has died.

verl waits without a limit for workers to start, for weights to arrive and for responses. A thread of the process that
runs the trainer looks after it; the trainer's own thread may be stuck in a call that cannot be interrupted, so the
process ends.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

MARK = "verl_dft: run ended: "
"""What the line with the reason begins with, in the trainer's output."""
EXIT_CODE = 70
_LOOK_S = 1.0
_GRACE_S = 5.0
"""How long the trainer has to tell of a dead engine itself: it often fails by it, with more to say."""


class Watchdog:
    """``with watchdog.phase("weight_sync"): …`` gives the block its limit.

    Args:
        limits: seconds by phase; None or absent: no limit.
        health: asked every ``every_s`` seconds; returns what is wrong with the engines, or None.
        end: called with the reason, once; by default writes it to stderr and ends the process.
    """

    def __init__(
        self,
        limits: Mapping[str, float | None],
        *,
        every_s: float = 3.0,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self.limits, self.every_s, self.end = dict(limits), every_s, end or _end
        self.health: Callable[[], str | None] | None = None
        self._current: tuple[str, float] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="verl_dft watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Limit the block; phases may lie in one another, and the inner one's limit counts in it."""
        outer, self._current = self._current, (name, time.monotonic())
        try:
            yield
        finally:
            self._current = outer and (outer[0], time.monotonic())

    def begun(self) -> None:
        """End the phase that was opened around the whole run."""
        self._current = None

    def _watch(self) -> None:
        asked = time.monotonic()
        while not self._stop.wait(_LOOK_S):
            now = time.monotonic()
            reason = self._over(now)
            if reason is None and self.health is not None and now - asked >= self.every_s:
                reason, asked = self.health(), time.monotonic()
                if reason is not None and self._stop.wait(_GRACE_S):
                    return
            if reason is not None:
                return self.end(reason)

    def _over(self, now: float) -> str | None:
        current = self._current
        if current is None or (limit := self.limits.get(current[0])) is None or now - current[1] <= limit:
            return None
        return (
            f"{current[0]} took longer than limits.{current[0]}={limit:g} seconds; raise it (null: no limit), or look "
            "for what hangs in the output above"
        )


def engine_error(server: Any) -> str:
    """What a vLLM server's engine died of; "" while it lives. Runs in the server's process."""
    engine = getattr(server, "engine", None)
    if engine is None or not engine.errored:
        return ""
    return type(engine.dead_error).__name__


def _end(reason: str) -> None:
    print(f"{MARK}{reason}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    time.sleep(0.5)  # for Ray to carry the line to the driver
    os._exit(EXIT_CODE)
