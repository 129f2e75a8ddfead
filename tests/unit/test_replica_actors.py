"""Shards on several sources at a time: what comes out, in what order it is told, and what a dead actor costs."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import replica_helpers
from process_helpers import of_mark
from replica_helpers import TEXTS, Make, plain_text

from verl_dft.errors import InputError
from verl_dft.platform.shared_memory import shared_memory_files
from verl_dft.sampling.engine import GeneratedText, SampleRequest
from verl_dft.sampling.seeds import sample_seed
from verl_dft.sampling.shard_file import StoredSample
from verl_dft.sampling.shards import Sampled, Wanted, sample_all
from verl_dft.sampling.source import ScriptedSource
from verl_dft.sampling.store import SampleStore, sample_key

_SIZE, _SHARDS = 3, 6
_BUNDLE = {"CPU": 1.0}


def _wanted(n: int = 17) -> list[Wanted]:
    """The first request of shard i has the prompt [i]."""
    requests = [SampleRequest([i // _SIZE], sample_seed(0, "p", i), max_tokens=60) for i in range(n)]
    return [Wanted(sample_key("m", request, i), i, request) for i, request in enumerate(requests)]


def _shards() -> list[list[SampleRequest]]:
    requests = [want.request for want in _wanted()]
    return [requests[i : i + _SIZE] for i in range(0, len(requests), _SIZE)]


class _Backwards(ScriptedSource):
    """Finishes the last shard first."""

    def __init__(self, fail_after: int = 99) -> None:
        super().__init__(TEXTS)
        self.fail_after = fail_after

    def generate_shards(
        self, shards: Iterable[Sequence[SampleRequest]]
    ) -> Iterator[tuple[int, list[GeneratedText], dict, float]]:
        for done, (number, requests) in enumerate(reversed(list(enumerate(shards)))):
            if done == self.fail_after:
                raise RuntimeError("all replicas failed")
            yield number, self.generate(requests), self.facts(), 0.5


def _run(folder: Path, source: ScriptedSource, told: list[list[int]] | None = None, **options: object) -> Sampled:
    def on_shard(wants: Sequence[Wanted], samples: Sequence[StoredSample]) -> None:
        assert [want.key for want in wants] == [sample.key for sample in samples]
        if told is not None:
            told.append([sample.index for sample in samples])

    with SampleStore(folder) as store:
        return sample_all(store, _wanted(), lambda: nullcontext(source), shard_size=_SIZE, on_shard=on_shard, **options)


def test_shards_finished_in_any_order_give_the_same_samples_and_store(tmp_path: Path) -> None:
    told: list[list[int]] = []
    one, other = _run(tmp_path / "a", ScriptedSource(TEXTS)), _run(tmp_path / "b", _Backwards(), told)
    assert list(one.samples) == list(other.samples) and other.num_generated == 17 and other.seconds == 3.0
    assert told == [[15, 16], [12, 13, 14], [9, 10, 11], [6, 7, 8], [3, 4, 5], [0, 1, 2]]
    assert {path.name for path in (tmp_path / "a").glob("*.jsonl")} == {
        path.name for path in (tmp_path / "b").glob("*.jsonl")
    }


def test_a_shard_is_told_of_once_whether_found_or_new(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="all replicas"):
        _run(tmp_path, _Backwards(fail_after=2))
    told: list[list[int]] = []
    counted: list[int] = []
    sampled = _run(tmp_path, _Backwards(), told, on_progress=counted.append)
    assert told == [[12, 13, 14], [15, 16], [9, 10, 11], [6, 7, 8], [3, 4, 5], [0, 1, 2]]  # the two found come first
    assert sampled.num_reused == counted[0] == 5 and counted[1:] == [3] * 4
    told.clear()
    assert _run(tmp_path, _Backwards(), told).num_generated == 0 and len(told) == _SHARDS


def test_without_deterministic_what_is_found_is_told_first_and_calls_suit_the_replicas(tmp_path: Path) -> None:
    source, told = _Backwards(), []
    _run(tmp_path, source, deterministic=False, num_parallel=3)
    assert sorted(source.calls) == [5, 6, 6]  # one for each of three replicas, not one of 17
    sorted(tmp_path.glob("*.jsonl"))[0].unlink()
    again = _Backwards()
    _run(tmp_path, again, told, deterministic=False, num_parallel=3)
    assert 5 <= sum(again.calls) <= 6
    assert list(map(len, told[:4])) == [3, 3, 3, 17 - sum(again.calls) - 9]  # as many at a time as a shard has
    assert sorted(index for indices in told for index in indices) == list(range(17))


# ---- real Ray actors, with scripted sources ----


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray with three logical CPUs; nothing of it is left afterwards."""
    import ray

    from verl_dft.sampling.cluster import ray_session

    ray.cloudpickle.register_pickle_by_value(replica_helpers)
    before = shared_memory_files()
    with ray_session(num_cpus=3):
        listening = [c.laddr.ip for p in psutil.Process().children(recursive=True) for c in p.net_connections("tcp")]
        assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
        yield
    left = [p for p in psutil.Process().children(recursive=True) if "ray" in p.name()]
    assert not left and shared_memory_files() <= before


def _texts(make: Make, num_replicas: int, **options: int) -> list[list[GeneratedText]]:
    from verl_dft.sampling.actors import ActorPool

    with ActorPool(make, num_replicas, _BUNDLE, **options) as pool:
        found = {number: texts for number, texts, _, _ in pool.generate_shards(_shards())}
    assert sorted(found) == list(range(_SHARDS))
    return [found[number] for number in range(_SHARDS)]


@pytest.fixture(scope="module")
def expected() -> list[list[GeneratedText]]:
    return [[plain_text(request) for request in requests] for requests in _shards()]


@pytest.mark.integration
@pytest.mark.alone
@pytest.mark.parametrize("num_replicas", [1, 3])
def test_any_number_of_actors_gives_the_same(cluster: None, expected: list, num_replicas: int) -> None:
    assert _texts(Make(), num_replicas) == expected


@pytest.mark.integration
@pytest.mark.alone
@pytest.mark.parametrize("trouble", ["killed", "bug"])
def test_the_shard_of_an_actor_that_fails_is_done_by_another(
    cluster: None, expected: list, tmp_path: Path, trouble: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make = Make(trouble=trouble, at=2, times=2, folder=str(tmp_path))
    assert _texts(make, 2) == expected
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]  # it happened twice
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: replica")]
    assert len(warnings) == 2 and all("start 1 of 3 again" in w or "start 2 of 3 again" in w for w in warnings)


@pytest.mark.integration
@pytest.mark.alone
def test_when_all_are_dead_the_cause_is_told_and_nothing_finished_is_lost(
    cluster: None, expected: list, tmp_path: Path
) -> None:
    from verl_dft.sampling.actors import ActorPool

    make = Make(trouble="killed", at=4, times=9, folder=str(tmp_path))
    with ActorPool(make, 2, _BUNDLE, max_restarts=0) as pool, SampleStore(tmp_path / "store") as store:
        with pytest.raises(RuntimeError, match=r"all 2 replicas failed, the last one so: ActorDied.*same command"):
            sample_all(store, _wanted(), lambda: nullcontext(pool), shard_size=_SIZE)
        kept = len(store)
        assert kept in (12, 14)  # shards 0 to 3, perhaps the last; the one between killed both
    with ActorPool(Make(), 1, _BUNDLE) as pool, SampleStore(tmp_path / "store") as store:
        resumed = sample_all(store, _wanted(), lambda: nullcontext(pool), shard_size=_SIZE)
    assert resumed.num_reused == kept
    assert [sample.text for sample in resumed.samples] == [text for texts in expected for text in texts]


@pytest.mark.integration
@pytest.mark.alone
@pytest.mark.slow
def test_a_shard_that_fails_everywhere_does_not_go_round_for_ever(cluster: None, tmp_path: Path) -> None:
    make = Make(trouble="bug", at=0, times=99, folder=str(tmp_path))
    with pytest.raises(RuntimeError, match=r"shard 0 failed 3 times, at last so: KeyError: 'no block'"):
        _texts(make, 1, max_restarts=9)
    assert len(os.listdir(tmp_path)) == 3


@pytest.mark.integration
@pytest.mark.alone
@pytest.mark.slow
def test_errors_of_the_user_and_of_the_start_come_as_they_are(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^prompt 0 is too long$"):
        _texts(Make(trouble="input", at=1, folder=str(tmp_path)), 2)
    with pytest.raises(RuntimeError, match="could not be started: ValueError: no such device"):
        _texts(Make(trouble="start"), 1)
    with pytest.raises(InputError, match=r"40 replica\(s\) with 1 CPU each .* has room for \d+ \(its machines: "):
        _texts(Make(), 40)


@pytest.mark.integration
@pytest.mark.alone
@pytest.mark.slow
def test_a_call_given_up_leaves_the_pool_usable_and_a_change_reaches_every_actor(cluster: None, expected: list) -> None:
    from verl_dft.sampling.actors import ActorPool

    other = tuple(f"no {text}" for text in TEXTS)
    with ActorPool(Make(slow_s=0.2), 3, _BUNDLE) as pool:
        first = pool.generate_shards(_shards())
        next(first)
        first.close()  # two actors are at shards of this call
        second = {number: texts for number, texts, _, _ in pool.generate_shards(_shards())}
        assert [second[number] for number in range(_SHARDS)] == expected
        pool.change(Make(other))
        third = {number: texts for number, texts, _, _ in pool.generate_shards(_shards())}
        assert [third[i] for i in range(_SHARDS)] == [[plain_text(r, other) for r in rs] for rs in _shards()]
        assert pool.generate(_shards()[0]) == third[0] and pool.facts() == {"source": "scripted"}


DYING = """
import os, signal, sys, threading, time
import psutil
from verl_dft.errors import MachineFailed
from verl_dft.sampling.actors import ActorPool
from verl_dft.sampling.cluster import ray_session

def make(_):
    time.sleep(600)

def kill_raylet():
    time.sleep(3)
    for child in psutil.Process().children(recursive=True):
        if child.name() == "raylet":
            child.kill()

os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
with ray_session(num_cpus=2):
    threading.Thread(target=kill_raylet).start()
    try:
        ActorPool(make, 1, {"CPU": 1})
    except MachineFailed as error:
        print(error, flush=True)
"""


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.alone
def test_a_start_that_nobody_will_finish_ends(run_command: Callable, tmp_path: Path) -> None:
    """The machine's raylet is killed while the first source is made: no answer will ever come. Nothing of Ray stays."""
    mark = str(tmp_path)
    code, stdout, stderr = run_command([sys.executable, "-c", DYING], timeout=120, env={"VERL_DFT_LEFTOVERS": mark})
    assert code == 0 and "Ray on this machine has died" in stdout, stderr[-2000:]
    assert [process.cmdline() for process in of_mark(mark)] == []
