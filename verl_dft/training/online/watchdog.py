"""Ends a run that hangs, with the reason: a part that takes longer than its limit, or a process that has died.

verl waits without a limit for workers to start, for weights to arrive and for responses. A thread of the process that
runs the trainer looks after it; the trainer's own thread may be stuck in a call that cannot be interrupted, so the
process ends.
"""

import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

_LOOK_S = 1.0
_GRACE_S = 5.0
"""How long the trainer has to fail by itself over what has died: it often does, with more to say."""


class Watchdog:
    """``with watchdog.phase("weight_sync"): …`` gives the block its limit.

    Args:
        limits: seconds by phase; None or absent: no limit.
        end: called in the watchdog's thread with the reason, once; ends the process.
        health: asked every ``every_s`` seconds; returns what has died, or None.
    """

    def __init__(
        self,
        limits: Mapping[str, float | None],
        end: Callable[[str], None],
        health: Callable[[], str | None],
        *,
        every_s: float = 3.0,
        grace_s: float = _GRACE_S,
    ) -> None:
        self.limits, self.end, self.health, self.every_s, self.grace_s = dict(limits), end, health, every_s, grace_s
        self.failed_in: str | None = None
        """Phase in which an error was raised."""
        self._failed = False
        self._current: tuple[str, float] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="verl_dft watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    @property
    def doing(self) -> str | None:
        """Name of the innermost phase."""
        current = self._current
        return current[0] if current else None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Limit the block; phases may lie in one another, and the inner one's limit counts in it."""
        outer, self._current = self._current, (name, time.monotonic())
        try:
            yield
        except BaseException:
            if not self._failed:
                self._failed, self.failed_in = True, self.doing
            raise
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
            if reason is None and now - asked >= self.every_s:
                reason, asked = self._asked(), time.monotonic()
                if reason is not None and self._stop.wait(self.grace_s):
                    return
            if reason is not None:
                return self.end(reason)

    def _asked(self) -> str | None:
        try:
            return self.health()
        except Exception:  # Ray itself does not answer: what it cannot tell must not stop the watch over the limits
            traceback.print_exc()
            return None

    def _over(self, now: float) -> str | None:
        current = self._current
        if current is None or (limit := self.limits.get(current[0])) is None or now - current[1] <= limit:
            return None
        return f"the run hangs: more than limits.{current[0]}={limit:g} seconds (null: no limit) have passed"
