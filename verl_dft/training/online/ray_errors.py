"""Errors that come through Ray, which wraps them into screens of text, as one line."""

import ray

from verl_dft.errors import InputError
from verl_dft.files import disk_full
from verl_dft.training.online.failures import RolloutFailed, RunFailed, one_line, place


def root_cause(error: BaseException) -> BaseException:
    """What Ray has wrapped, once for each process that it came through."""
    while isinstance(error, ray.exceptions.RayTaskError):
        if not isinstance(error.cause, BaseException):
            break
        error = error.cause
    return error


def failure(error: BaseException, trouble: str | None, step: int, phase: str | None, go_on: str) -> Exception:
    """What the trainer's process raises in place of ``error``.

    Args:
        trouble: what has died (``health.trouble``), None where nothing has.
        step: the run's; 0 before the first.
        phase: the watchdog's, in which it failed.
        go_on: :func:`advice`.

    Returns:
        :class:`InputError` as it was, :class:`RunFailed` else.
    """
    cause, where = root_cause(error), place(step, phase)
    if isinstance(cause, InputError):
        return InputError(one_line(cause))
    if disk_full(cause, saving=phase in ("save", "export")):
        return RunFailed(f"the disk was full {where} ({one_line(cause)}); make room, then {go_on}")
    if trouble is not None:
        return RunFailed(f"{trouble} {where}; {go_on}")
    if isinstance(cause, RolloutFailed):
        return RunFailed(f"{one_line(cause)}; {go_on}, or set rollout_failure=skip")
    if isinstance(cause, ray.exceptions.RayActorError):
        return RunFailed(f"one of Ray's processes has died {where}: {one_line(cause)}; {go_on}")
    what = f"{type(cause).__name__}: {one_line(cause)}"
    return RunFailed(f"the run has failed {where}: {what} (its traceback is above); {go_on}", shown=False)
