"""Several sources of text at a time: one in each Ray actor, on one machine or many, handed shards as they are free.

Results are put together in the driver, where the store is, so an actor holds nothing that could be lost. A shard whose
actor dies is done again, whole, by the next free one: what a shard's texts are does not depend on who generates it.
"""

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl_dft.end_processes import end_processes
from verl_dft.errors import InputError, MachineFailed
from verl_dft.files import sweep_scratch
from verl_dft.platform.shared_memory import remove_abandoned, shared_memory_files
from verl_dft.platform.temporary import ENGINE_FOLDER
from verl_dft.sampling.cluster import check_room
from verl_dft.sampling.engine import GeneratedText, SampleRequest
from verl_dft.sampling.source import TextSource

Make = Callable[[TextSource | None], TextSource]
"""Makes an actor's source: a new one where it has none, else the one it has, changed to what is wanted."""

_SHARD_ATTEMPTS = 3
_LOOK_S, _NOTICE_S = 5.0, 60.0
"""How often it is looked whether Ray lives, and said that replicas are waited for."""
_CLOSE_S = 20.0
# In place of a shard's number: nobody waits for it any more.
_ABANDONED = -1


class _Worker:
    """The actor: one source. ``prepare`` and not ``__init__`` makes it, so that its errors arrive as they are."""

    def __init__(self) -> None:
        self._source: TextSource | None = None

    def prepare(self, make: Make) -> tuple[dict[str, Any], int, str]:
        """Facts of the source, this process, its machine."""
        self._source = make(self._source)
        return self._source.facts(), os.getpid(), ray.get_runtime_context().get_node_id()

    def generate(self, requests: Sequence[SampleRequest]) -> tuple[list[GeneratedText], dict[str, Any], float]:
        assert self._source is not None
        begun = time.monotonic()
        texts = self._source.generate(requests)
        return texts, self._source.facts(), time.monotonic() - begun

    def close(self) -> None:
        source, self._source = self._source, None
        if hasattr(source, "close"):
            source.close()


@dataclass
class _Replica:
    """The driver's view of one. ``task`` is what it is at: ``shard`` if that is a number, else preparing."""

    number: int
    group: PlacementGroup
    actor: Any = None
    prepared: Make | None = None
    ready: bool = False
    task: Any = None
    shard: int | None = None
    restarts: int = 0
    pid: int | None = None  # where it is on this machine

    @property
    def gone(self) -> bool:
        return self.actor is None


@dataclass
class _Work:
    """The shards of one call: those to hand out, and how often each was tried."""

    queue: deque[tuple[int, Sequence[SampleRequest]]]
    given: dict[int, Sequence[SampleRequest]] = field(default_factory=dict)
    attempts: Counter[int] = field(default_factory=Counter)


class ActorPool:
    """Sources in Ray actors, as one source. Close it, or use it as a context manager.

    Args:
        make: makes the source of each actor; pickled.
        num_replicas: actors.
        bundle: what each takes of one machine, by Ray's names.
        max_restarts: how often one that failed is started again.

    Raises:
        InputError: the cluster has no room for them, or what ``make`` raises.
        RuntimeError: none could be started.
    """

    def __init__(self, make: Make, num_replicas: int, bundle: dict[str, float], *, max_restarts: int = 3) -> None:
        assert num_replicas > 0
        self._make, self._bundle, self._max_restarts = make, bundle, max_restarts
        self._facts: dict[str, Any] | None = None
        self._last: BaseException | None = None
        self._work: _Work | None = None
        self._replicas: list[_Replica] = []
        self._shared_memory = shared_memory_files()
        self._here = ray.get_runtime_context().get_node_id()
        self._noticed = time.monotonic()
        try:
            check_room(bundle, num_replicas)
            for number in range(num_replicas):
                self._replicas.append(_Replica(number, placement_group([bundle], strategy="STRICT_PACK")))
                self._start(self._replicas[-1])
            while self._facts is None:
                self._step()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ActorPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, requests: Sequence[SampleRequest]) -> list[GeneratedText]:
        """One text per request, in order, from whichever replica is free."""
        ((_, texts, _, _),) = self.generate_shards([requests])
        return texts

    def generate_shards(
        self, shards: Iterable[Sequence[SampleRequest]]
    ) -> Iterator[tuple[int, list[GeneratedText], dict[str, Any], float]]:
        """(number of the shard, its texts in order, facts of what wrote them, seconds it took), as they are finished.

        Raises:
            InputError: what a source raises.
            MachineFailed: every replica failed as often as it may, or this machine's Ray has died.
            RuntimeError: one shard failed several times.
        """
        assert self._work is None, "one call at a time"
        self._work = work = _Work(deque(enumerate(shards)))
        try:
            while work.queue or work.given:
                finished = self._step()
                if finished is not None:
                    yield finished
        finally:
            self._work = None
            for replica in self._replicas:
                if replica.shard is not None:
                    replica.shard = _ABANDONED

    def facts(self) -> dict[str, Any]:
        """Those of the first source that was ready."""
        assert self._facts is not None
        return self._facts

    def change(self, make: Make) -> None:
        """From the next shard on, have each replica's source changed by ``make``."""
        assert self._work is None, "not while shards are generated"
        self._make, self._facts = make, None
        while self._facts is None:
            self._step()

    def close(self) -> None:
        """End the actors and their processes. Safe to call twice."""
        family = self._processes()
        idle = [replica.actor for replica in self._replicas if not replica.gone and replica.task is None]
        with suppress(RayError, GetTimeoutError):
            ray.get([actor.close.remote() for actor in idle], timeout=_CLOSE_S)
        for replica in self._replicas:
            self._end(replica)
        self._replicas = []
        end_processes(lambda: family, _CLOSE_S)
        remove_abandoned(self._shared_memory)
        sweep_scratch(ENGINE_FOLDER)

    # ---- one event after the other ----

    def _step(self) -> tuple[int, list[GeneratedText], dict[str, Any], float] | None:
        """Give free replicas work, wait for one to finish something, and return it if that is a shard."""
        self._hand_out()
        busy = {replica.task: replica for replica in self._replicas if replica.task is not None}
        if not busy:
            raise MachineFailed(
                f"all {len(self._replicas)} replicas failed, the last one so: {_brief(self._last)}; what was finished "
                "is kept, and the same command goes on from there"
            ) from self._last
        done, _ = ray.wait(list(busy), num_returns=1, timeout=_LOOK_S)
        if not done:
            self._look()
            return None
        replica = busy[done[0]]
        shard, replica.task, replica.shard = replica.shard, None, None
        try:
            answer = ray.get(done[0])
        except RayError as error:
            self._failed(replica, shard, error)
            return None
        if shard is None:
            facts, pid, node = answer
            self._facts = self._facts or facts
            replica.ready, replica.pid = True, pid if node == self._here else None
            return None
        if shard == _ABANDONED:
            return None
        assert self._work is not None
        del self._work.given[shard]
        self._hand_out()  # before the caller takes its time over this one
        return shard, *answer

    def _hand_out(self) -> None:
        for replica in self._replicas:
            if replica.gone or replica.task is not None:
                continue
            if replica.prepared is not self._make:
                replica.prepared, replica.task = self._make, replica.actor.prepare.remote(self._make)
            elif self._work is not None and self._work.queue:
                number, requests = self._work.queue.popleft()
                self._work.given[number] = requests
                replica.shard, replica.task = number, replica.actor.generate.remote(requests)

    def _failed(self, replica: _Replica, shard: int | None, error: RayError) -> None:
        """A replica died, or its source raised: what state that left it in nobody knows, so it is started again."""
        if isinstance(error, RayTaskError) and isinstance(error.cause, InputError):
            if shard == _ABANDONED:
                return
            raise error.cause from None  # it would be raised anywhere
        if isinstance(error, RayTaskError) and shard is None and self._facts is None:
            raise RuntimeError(f"replica {replica.number} could not be started: {_brief(error)}") from error
        self._last = error
        work = self._work
        if shard not in (None, _ABANDONED) and work is not None:
            work.queue.appendleft((shard, work.given.pop(shard)))
            work.attempts[shard] += 1
            if work.attempts[shard] >= _SHARD_ATTEMPTS:
                times = work.attempts[shard]
                raise RuntimeError(f"shard {shard} failed {times} times, at last so: {_brief(error)}") from error
        again = replica.restarts < self._max_restarts
        then = f"start {replica.restarts + 1} of {self._max_restarts} again" if again else "not started again"
        print(f"warning: replica {replica.number} failed ({_brief(error)}); {then}", file=sys.stderr)
        self._end(replica, keep_place=again)
        if again:
            replica.restarts += 1
            self._start(replica)

    def _start(self, replica: _Replica) -> None:
        place = PlacementGroupSchedulingStrategy(replica.group, placement_group_bundle_index=0)
        worker = ray.remote(_Worker).options(
            num_cpus=self._bundle.get("CPU", 0), num_gpus=self._bundle.get("GPU", 0), scheduling_strategy=place
        )
        replica.actor, replica.prepared, replica.ready = worker.remote(), None, False

    def _end(self, replica: _Replica, keep_place: bool = False) -> None:
        with suppress(Exception):  # Ray itself may be gone
            if not replica.gone:
                ray.kill(replica.actor)
            if not keep_place:
                remove_placement_group(replica.group)
        replica.actor = replica.task = replica.shard = replica.pid = None

    def _processes(self) -> list[psutil.Process]:
        """The replicas' processes on this machine, and the ones that those started."""
        found = []
        for replica in self._replicas:
            with suppress(psutil.NoSuchProcess):
                if replica.pid is not None:
                    process = psutil.Process(replica.pid)
                    found += [process, *process.children(recursive=True)]
        return found

    def _look(self) -> None:
        """Raises MachineFailed where this machine's Ray has died: nothing would ever be finished."""
        if not any(node["Alive"] and node["NodeID"] == self._here for node in ray.nodes()):
            raise MachineFailed(
                "Ray on this machine has died (killed, perhaps for lack of memory); what was finished is kept, and the "
                "same command goes on from there"
            )
        if time.monotonic() - self._noticed >= _NOTICE_S and not any(replica.ready for replica in self._replicas):
            self._noticed = time.monotonic()
            need = ", ".join(f"{amount:g} {name}" for name, amount in self._bundle.items())
            print(f"waiting for {len(self._replicas)} replica(s) to start, {need} each", file=sys.stderr)


def _brief(error: BaseException | None) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
