"""Sampling shard by shard through a store: what is there is taken, what is missing is generated.

Which requests share a batch changes the last bits of a model's logits, so a seed alone does not fix a sample. A shard
does: its members and their order are a function of the request list, it is generated alone, and an unfinished one is
redone whole. An interrupted run therefore ends with the samples it would have had.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_dft.data.lazy import LazySequence
from verl_dft.errors import InputError
from verl_dft.sampling.engine import GeneratedText, SampleRequest
from verl_dft.sampling.shard_file import StoredSample, read_shard, shard_id
from verl_dft.sampling.source import TextSource
from verl_dft.sampling.store import SampleStore

# Without `deterministic`, so many shards are generated in one call: the end of a call, where few sequences are left to
# run, is then met less often.
_SHARDS_AT_ONCE = 16


@dataclass(frozen=True)
class Wanted:
    """A sample that a run needs. ``name`` is for messages."""

    key: str
    index: int
    request: SampleRequest
    name: str = ""


OnShard = Callable[[Sequence[Wanted], Sequence[StoredSample]], None]
"""Told of a shard: what was wanted, and the sample of each, in order."""


class WantedSamples(LazySequence[StoredSample]):
    """Samples in the order they were wanted, read from the store as they are used, one after the other best."""

    def __init__(self, store: SampleStore, places: Sequence[tuple[str, int]]) -> None:
        self._store, self._places = store, places

    def __len__(self) -> int:
        return len(self._places)

    def item(self, index: int) -> StoredSample:
        return self._store.sample(self._places[index])


@dataclass(frozen=True)
class Sampled:
    """The samples in the order they were wanted, and how they came about.

    ``seconds`` is what generating them took, in this run or an earlier one, summed over the replicas where several
    worked at a time; ``facts`` are those of each distinct source that had a part.
    """

    samples: WantedSamples
    facts: list[dict[str, Any]]
    seconds: float
    num_reused: int
    num_generated: int


def sample_all(
    store: SampleStore,
    wanted: Sequence[Wanted],
    open_source: Callable[[], AbstractContextManager[TextSource]] | None,
    *,
    shard_size: int,
    deterministic: bool = True,
    on_progress: Callable[[int], None] | None = None,
    on_shard: OnShard | None = None,
    num_parallel: int = 1,
) -> Sampled:
    """Every wanted sample, from the store where it is there.

    A source that has ``generate_shards`` (:class:`verl_dft.sampling.source.ShardSource`) gets all missing shards at
    once and may finish them in any order; any other gets one after the other.

    Args:
        open_source: called once, and only if something is missing; None: nothing may be generated.
        shard_size: samples of a shard; a kill costs at most one (16 without ``deterministic``).
        deterministic: a sample is reused as a member of its shard only. If false, any stored sample of the same key is,
            and larger calls are made: faster on a GPU, but bytes then depend on where earlier runs were interrupted.
        on_progress: called with the number of samples just obtained.
        on_shard: called once per shard when its samples are in the store: first for those found there, then for each
            new one as it is finished, so that grading can go on beside generation. Without ``deterministic``, the
            samples found come in lots of ``shard_size``. Runs in this thread: what takes long belongs into another.
        num_parallel: shards that the source works on at a time; without ``deterministic`` calls are then kept small
            enough for all to have work.

    Raises:
        InputError: samples are missing and ``open_source`` is None.
    """
    assert len({want.key for want in wanted}) == len(wanted), "two wanted samples have the same key"
    tell, tell_shard = on_progress or (lambda count: None), on_shard or (lambda wants, samples: None)
    missing = _missing(store, wanted, shard_size, deterministic, num_parallel)
    num_missing = sum(map(len, missing))
    if missing and open_source is None:
        raise InputError(_missing_text(store, len(wanted), num_missing, missing[0][0]))
    tell(len(wanted) - num_missing)
    for members, samples in _found(store, wanted, shard_size, deterministic):
        tell_shard(members, samples)
    if missing:
        assert open_source is not None
        with open_source() as source, closing(_answers(source, missing)) as answers:
            for number, texts, facts, seconds in answers:
                members = missing[number]
                tell_shard(members, store.append(_stored(members, texts), facts, seconds).samples)
                tell(len(members))
    places = _places(store, wanted, shard_size, deterministic)
    used = [store.entry(id) for id in dict.fromkeys(id for id, _ in places)]
    facts: list[dict[str, Any]] = []
    for entry in used:
        facts += [] if entry.facts in facts else [entry.facts]
    seconds = sum(entry.seconds for entry in used)
    samples = WantedSamples(store, places)
    return Sampled(samples, facts, round(seconds, 2), len(wanted) - num_missing, num_missing)


def missing_of(folder: Path, wanted: Sequence[Wanted], config: Mapping[str, Any]) -> list[Wanted]:
    """What :func:`sample_all` would generate, by the files in a store's folder; the store is neither opened nor locked.

    Args:
        config: ``shard_size`` and ``deterministic``.
    """
    shards = (shard for path in sorted(folder.glob("*.jsonl")) if (shard := read_shard(path)) is not None)
    if not config["deterministic"]:
        stored = {sample.key for shard in shards for sample in shard.samples}
        return [want for want in wanted if want.key not in stored]
    ids = {shard.id for shard in shards}
    chunks = _chunks(wanted, config["shard_size"])
    return [want for members in chunks if shard_id([w.key for w in members]) not in ids for want in members]


def _missing(
    store: SampleStore, wanted: Sequence[Wanted], shard_size: int, deterministic: bool, num_parallel: int
) -> list[Sequence[Wanted]]:
    if deterministic:
        chunks = _chunks(wanted, shard_size)
        return [members for members in chunks if not store.has_shard(_id(members))]
    pending = [want for want in wanted if store.place(want.key) is None]
    at_once = min(_SHARDS_AT_ONCE, -(-len(pending) // (shard_size * num_parallel)))
    return _chunks(pending, shard_size * max(1, at_once))


def _found(
    store: SampleStore, wanted: Sequence[Wanted], shard_size: int, deterministic: bool
) -> Iterator[tuple[Sequence[Wanted], Sequence[StoredSample]]]:
    if deterministic:
        for members in _chunks(wanted, shard_size):
            shard = store.shard(_id(members))
            if shard is not None:
                yield members, shard.samples
        return
    found = [want for want in wanted if store.place(want.key) is not None]
    for members in _chunks(found, shard_size):
        yield members, [store.sample(place) for want in members if (place := store.place(want.key)) is not None]


def _places(
    store: SampleStore, wanted: Sequence[Wanted], shard_size: int, deterministic: bool
) -> list[tuple[str, int]]:
    """Where each sample is. Everything is there now."""
    if deterministic:
        chunks = _chunks(wanted, shard_size)
        places = [(id, i) for members in chunks if store.has_shard(id := _id(members)) for i in range(len(members))]
    else:
        places = [place for want in wanted if (place := store.place(want.key)) is not None]
    assert len(places) == len(wanted), "a sample is missing"
    return places


def _id(members: Sequence[Wanted]) -> str:
    return shard_id([want.key for want in members])


def _chunks(wanted: Sequence[Wanted], size: int) -> list[Sequence[Wanted]]:
    return [wanted[i : i + size] for i in range(0, len(wanted), size)]


def _answers(
    source: TextSource, shards: Sequence[Sequence[Wanted]]
) -> Iterator[tuple[int, list[GeneratedText], dict[str, Any], float]]:
    """(number of the shard, its texts, facts of what wrote them, seconds it took), as they are finished."""
    requests = [[want.request for want in members] for members in shards]
    together = getattr(source, "generate_shards", None)
    if together is not None:
        yield from together(requests)
        return
    for number, members in enumerate(requests):
        begun = time.monotonic()
        texts = source.generate(members)
        yield number, texts, source.facts(), time.monotonic() - begun


def _stored(members: Sequence[Wanted], texts: Sequence[GeneratedText]) -> list[StoredSample]:
    assert len(texts) == len(members), f"the source gave {len(texts)} texts for {len(members)} requests"
    return [
        StoredSample(want.key, want.index, want.request.seed, text) for want, text in zip(members, texts, strict=True)
    ]


def _missing_text(store: SampleStore, num_wanted: int, num_missing: int, first: Wanted) -> str:
    return (
        f"{num_missing} of {num_wanted} samples are not in {store.folder} (first: {first.name or first.key}, sample "
        f"{first.index}), so there is nothing to grade again; leave out regrade=true to generate them"
    )
