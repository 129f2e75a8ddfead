"""Why a run has failed, in one line: what died or went wrong, in which step, and what to do. Imports no Ray."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from verl_dft.files import atomic_write
from verl_dft.training.metrics import METRICS_FILE, read_metrics
from verl_dft.training.resume import completed_steps

DOING = {
    "start": "while the workers started",
    "sample": "while sampling and grading",
    "update": "while updating",
    "weight_sync": "while weights went to vLLM",
    "save": "while saving a checkpoint",
    "validate": "while validating",
    "export": "while exporting the model",
}
"""Phase of a run (``Watchdog.phase``) -> what a message calls it."""


class RunFailed(RuntimeError):
    """The run has failed; the message is one line.

    Args:
        shown: the message says it all, and no traceback is wanted.
    """

    def __init__(self, message: str, shown: bool = True) -> None:
        super().__init__(message, shown)  # both, for pickle
        self.message, self.shown = message, shown

    def __str__(self) -> str:
        return self.message


class RolloutFailed(RuntimeError):
    """A step's responses could not all be made; the message is one line."""


def check_groups(selected: Sequence[str], keys: Iterable[str], failed: Collection[str], responses: int) -> None:
    """Raise :class:`RolloutFailed` where a group would be trained on that lacks a response.

    Args:
        selected: ids of the problems of a step.
        keys: of the stored rows, ``{problem}_{response}_{part}``, other problems' too.
        failed: problems whose agent loops told of an error.
        responses: of a problem.
    """
    made = Counter(problem for problem, _ in {tuple(key.rsplit("_", 2)[:2]) for key in keys})
    lacking = sum(problem in failed or made[problem] < responses for problem in selected)
    if lacking:
        raise RolloutFailed(f"{lacking} of {len(selected)} problems lack a response; why is in the output above")


def one_line(error: BaseException) -> str:
    """The message of an error, without line breaks and not longer than a few lines on a screen."""
    text = " ".join(str(error).split()) or "no message"
    return text if len(text) <= 400 else text[:400] + " …"


def place(step: int, phase: str | None) -> str:
    """``in step 3 while updating``; ``step`` is 0 before the first."""
    doing = DOING.get(phase or "", "")
    if step < 1 or phase == "start":
        return doing or "before the first step"
    return f"in step {step} {doing}".rstrip()


def advice(checkpoints: str | Path) -> str:
    """How to go on: from which checkpoint the same command would."""
    saved = completed_steps(checkpoints)
    start = f"go on from step {saved[-1]}" if saved else "start over, no checkpoint having been saved"
    return f"run the same command again to {start}"


def last_step(output: Path) -> str:
    """``after step 3``, by the metrics, for a process that can tell no more."""
    path = output / METRICS_FILE
    try:
        steps = [line["step"] for line in read_metrics(path)] if path.is_file() else []
    except ValueError:  # the last line is half written
        steps = []
    return f"after step {steps[-1]}" if steps else "before the end of the first step"


def leave_reason(output: Path, reason: str) -> None:
    """For a process that ends itself: keep the reason where the driver finds it."""
    with atomic_write(_reason_path(output)) as file:
        file.write(reason + "\n")


def forget_reason(output: Path) -> None:
    """Remove that of an earlier run."""
    _reason_path(output).unlink(missing_ok=True)


def left_reason(output: Path) -> str | None:
    """What :func:`leave_reason` was given in this run."""
    path = _reason_path(output)
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _reason_path(output: Path) -> Path:
    return output / "data" / "ended.txt"
