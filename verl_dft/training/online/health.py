"""What of a run has died, asked of Ray and of the vLLM engines.

verl waits without a limit for the responses of an agent loop worker that is gone, and a vLLM server outlives its
engine. Ray's table of actors tells of every process of a run, whatever it was doing; engines are asked themselves.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import ray
from ray._private import state  # as verl: what is public asks the dashboard, which is not started

_ANSWER_S = 5.0
"""A server that does not answer for so long is busy, not dead."""
_NAMES = {
    "WorkerDict": "a training worker",
    "vLLMHttpServer": "a vLLM server",
    "AgentLoopWorkerTQ": "an agent loop worker",
    "RewardLoopWorker": "a reward worker",
}


def trouble() -> str | None:
    """What has died, as the beginning of a sentence, or None."""
    return dead_actor() or dead_engine()


def dead_actor() -> str | None:
    """An actor of this job that died without being told to."""
    for actor in _actors():
        cause = actor["DeathCause"]
        if actor["State"] != "DEAD" or _was_meant(cause):
            continue
        kind = actor["ActorClassName"]
        what = f"{_NAMES.get(kind, 'a worker')} ({kind}, process {actor['Pid']}) has died"
        if cause is not None and cause.HasField("oom_context"):
            return f"{what}, ended by Ray because the machine's memory ran out,"
        return f"{what} (killed, crashed, or ended by the system because memory ran out)"
    return None


def dead_engine() -> str | None:
    """A vLLM server whose engine is gone, teachers included."""
    names = [a["Name"] for a in _actors() if a["State"] == "ALIVE" and a["ActorClassName"] == "vLLMHttpServer"]
    asked = {}
    for name in names:
        with suppress(ValueError):  # gone meanwhile: the next look finds it dead
            asked[ray.get_actor(name).__ray_call__.remote(engine_is_dead)] = name
    if not asked:
        return None
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
    for answer in answered:
        with suppress(ray.exceptions.RayError):  # of a dead server Ray's table tells
            if ray.get(answer):
                name = asked[answer]
                return f"the vLLM engine of {name} has died (killed, crashed, or out of memory; its output is above)"
    return None


def engine_is_dead(server: Any) -> bool:
    """Whether a vLLM server has lost its engine. Runs in the server's process."""
    engine = getattr(server, "engine", None)
    return engine is not None and bool(engine.errored)


def _actors() -> Iterator[dict[str, Any]]:
    """Those of this job; a cluster may have others."""
    job = ray.get_runtime_context().get_job_id()
    return (actor for actor in state.actors().values() if actor["JobID"] == job)


def _was_meant(cause: Any) -> bool:
    """Whether an actor was ended by ``ray.kill`` or because nobody held it any more."""
    if cause is None or not cause.HasField("actor_died_error_context"):
        return False
    died = cause.actor_died_error_context
    return died.Reason.Name(died.reason) in ("RAY_KILL", "OUT_OF_SCOPE", "REF_DELETED", "OWNER_DIED")
