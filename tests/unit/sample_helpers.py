"""Watching how many samples of a file are in memory."""

import weakref

import pytest

from verl_dft.sampling import record


def watch_samples(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by a number with each sample that is read from a file: of those so far, how many are still alive."""
    read = record._sample
    alive: list[weakref.ref[record.Sample]] = []
    counts: list[int] = []

    def counting(values: dict) -> record.Sample:
        sample = read(values)
        alive[:] = [one for one in alive if one() is not None]
        alive.append(weakref.ref(sample))
        counts.append(len(alive))
        return sample

    monkeypatch.setattr(record, "_sample", counting)
    return counts
