"""What the terminal shows of a run: a line per step of ``metrics.jsonl``. What verl, Ray and vLLM print is in a file.

They print thousands of lines, among which a step and an error are hard to find.
"""

import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from verl_dft.training.metrics import METRICS_FILE

LOG_FILE = "run.log"
"""In the run's folder: standard output and error of its processes, one start after another."""
_POLL_S = 0.5
_SHOWN = {
    "rows/self_reward": "reward {:.3f}",
    "rows/expert_frac": "expert {:.0%}",
    "rewrite/self_frac": "solved {:.0%}",
    "rewrite/guided_frac": "retold {:.0%}",
    "actor/pg_loss": "loss {:.4f}",
    "distillation/loss": "distillation loss {:.4f}",
    "actor/grad_norm": "grad norm {:.3f}",
    "timing_s/step": "{:.1f} s",
}
"""Metric -> how it is shown, where a step has it and it says something."""


def step_line(metrics: Mapping[str, float], total: int | None) -> str:
    """``step 3/20: reward 0.719, loss -0.0021, grad norm 0.143, 2.4 s``."""
    of = f"/{total}" if total else ""
    parts = [
        text.format(metrics[name])
        for name, text in _SHOWN.items()
        if name in metrics and not (name == "rows/expert_frac" and not metrics[name])
    ]
    return f"step {metrics['step']:g}{of}: {', '.join(parts)}"


class Progress:
    """Follows a run's ``metrics.jsonl`` in a thread: ``with Progress(folder, total_steps, begun): …``.

    Args:
        output: the run's folder. A file that is there already is of an earlier start: the run puts a new one in its
            place before its first step.
        total: steps of the run; None: not known.
        begun: the step that the run goes on from; only later ones are shown.
    """

    def __init__(self, output: Path, total: int | None, begun: int = 0, out: IO[str] | None = None) -> None:
        self.path, self.total, self.shown, self.out = output / METRICS_FILE, total, begun, out or sys.stderr
        self._earlier = self._inode()
        self._offset = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="verl_dft progress", daemon=True)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self._show()

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._show()

    def _show(self) -> None:
        for metrics in self._new_lines():
            if metrics["step"] > self.shown and "timing_s/step" in metrics:
                self.shown = metrics["step"]
                print(step_line(metrics, self.total), file=self.out, flush=True)

    def _inode(self) -> int | None:
        return self.path.stat().st_ino if self.path.is_file() else None

    def _new_lines(self) -> list[dict[str, float]]:
        """Whole lines since the last call."""
        if self._inode() in (None, self._earlier):
            return []
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")[0]
        self._offset += len(whole) + bool(whole)
        return [json.loads(line) for line in whole.splitlines()]


def last_error(log: Path, start: int) -> str | None:
    """The last line of ``log`` from byte ``start`` on that begins with ``error: ``, without that; None: none does."""
    with open(log, "rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
