"""The sample store: killed at every named place, torn, damaged, written twice."""

import os
import shutil
import signal
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from store_helpers import PLACES, killed

from verl_dft.errors import InputError
from verl_dft.sampling import store as store_module
from verl_dft.sampling.engine import GeneratedText, SampleRequest
from verl_dft.sampling.fingerprint import model_fingerprint
from verl_dft.sampling.seeds import sample_seed
from verl_dft.sampling.shard_file import StoredSample, read_shard, shard_id
from verl_dft.sampling.shards import Sampled, Wanted, sample_all
from verl_dft.sampling.source import ScriptedSource
from verl_dft.sampling.store import SampleStore, sample_key

_TEXTS = [f"the answer is {number}" for number in range(40)] + ["\\boxed{7}", "é \ud800 \x00 \r\n \u2028 end", ""]
_SIZE, _SHARDS = 3, 4  # 11 samples: three full shards and one of two


def _wanted(n: int = 11, writer: str = "m") -> list[Wanted]:
    requests = [SampleRequest([1, 2, i // 4], sample_seed(0, f"p{i // 4}", i % 4), max_tokens=60) for i in range(n)]
    return [Wanted(sample_key(writer, r, i % 4), i % 4, r, f"problem p{i // 4}") for i, r in enumerate(requests)]


class _Source(ScriptedSource):
    """A scripted source that can write what UTF-8 cannot."""

    def _text(self, request: SampleRequest, u: float) -> GeneratedText:
        text = self.texts[int(u * len(self.texts))]
        return GeneratedText([ord(c) for c in text], text, "stop")


def _run(folder: Path, wanted: list[Wanted], source: ScriptedSource | None = None, **options: bool) -> Sampled:
    source = source or _Source(_TEXTS)
    with SampleStore(folder) as store:
        sampled = sample_all(store, wanted, lambda: nullcontext(source), shard_size=_SIZE, **options)
        return replace(sampled, samples=list(sampled.samples))  # read now: files are damaged and removed later


def _sample_lines(folder: Path) -> dict[str, list[bytes]]:
    """The bytes of every sample line, by file; headers and commit records tell times."""
    return {
        path.name: [line for line in path.read_bytes().splitlines() if b'"sample"' in line]
        for path in folder.glob("*.jsonl")
    }


@pytest.mark.parametrize("deterministic", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("place", "times"), PLACES)
def test_killed_anywhere_and_resumed_is_as_if_never_killed(
    tmp_path: Path, place: str, times: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verl_dft.sampling.shards._SHARDS_AT_ONCE", 1)
    wanted = _wanted()
    whole = _run(tmp_path / "whole", wanted, deterministic=deterministic)
    assert whole.num_generated == 11 and len(_sample_lines(tmp_path / "whole")) == _SHARDS
    for count in range(1, times + 1):
        folder = tmp_path / str(count)
        assert killed(f"{place}:{count}", lambda to=folder: _run(to, wanted, deterministic=deterministic))
        kept = sum(map(len, _sample_lines(folder).values()))
        source = _Source(_TEXTS)
        resumed = _run(folder, wanted, source, deterministic=deterministic)
        assert resumed.samples == whole.samples
        assert _sample_lines(folder) == _sample_lines(tmp_path / "whole")
        # a shard whose commit record was whole is kept, even where the rename was not reached
        promoted = 0 if place not in ("store.before_fsync", "store.after_fsync", "store.before_rename") else 1
        assert len(source.calls) == _SHARDS - -(-kept // _SIZE) - promoted
        assert sum(source.calls) == resumed.num_generated == 11 - resumed.num_reused
        assert not list(folder.glob("*.part*"))
    assert not killed(f"{place}:{times + 1}", lambda: _run(tmp_path / "more", wanted, deterministic=deterministic))


def test_reading_again_gives_every_sample_in_order_and_generates_nothing(tmp_path: Path) -> None:
    wanted = _wanted()
    first = _run(tmp_path, wanted)
    with SampleStore(tmp_path) as store:
        again = sample_all(store, wanted, None, shard_size=_SIZE)
        assert again.samples[2:5] == first.samples[2:5] and again.samples[-1] == first.samples[-1]
        assert len(store) == 11 and not store.recovery.unfinished_shards and not store.recovery.corrupt
    assert list(again.samples) == first.samples and again.num_reused == 11
    assert [s.key for s in again.samples] == [w.key for w in wanted]
    assert [s.seed for s in again.samples] == [w.request.seed for w in wanted]
    expected = _Source(_TEXTS).generate([w.request for w in wanted])
    assert [s.text for s in again.samples] == expected and len({t.text for t in expected}) > 5
    odd = StoredSample("k", 0, 1, GeneratedText([1], _TEXTS[-2], "stop"))
    with SampleStore(tmp_path) as store:
        store.append([odd], {}, 0.0)
    with SampleStore(tmp_path) as store:
        assert store.sample(store.place("k")) == odd and store.place("j") is None


@pytest.mark.parametrize("deterministic", [True, False])
def test_samples_are_read_shard_by_shard_and_few_are_kept(
    tmp_path: Path, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, read = _wanted(120), []
    monkeypatch.setattr("verl_dft.sampling.shards._SHARDS_AT_ONCE", 1)
    first = _run(tmp_path, wanted, deterministic=deterministic)
    with SampleStore(tmp_path) as store:
        again = sample_all(store, wanted, None, shard_size=_SIZE, deterministic=deterministic)
        monkeypatch.setattr(store_module, "read_shard", lambda path: read.append(path.stem) or read_shard(path))
        alive = []
        for sample, same in zip(again.samples, first.samples, strict=True):
            assert sample == same
            alive.append(weakref.ref(sample))
        del sample
        assert len(read) == len(set(read)) == 40
        assert sum(ref() is not None for ref in alive) <= 8 * _SIZE
        assert again.samples[0] == first.samples[0] and len(read) == 41


@pytest.mark.parametrize("damage", ["changed", "removed"])
def test_a_shard_that_is_damaged_while_the_store_is_open_is_told(tmp_path: Path, damage: str) -> None:
    wanted = _wanted()
    _run(tmp_path, wanted)
    with SampleStore(tmp_path) as store:
        path = tmp_path / f"{store.place(wanted[0].key)[0]}.jsonl"
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes().replace(b"answer", b"Answer"))
        with pytest.raises(InputError, match="run the same command again"):
            store.sample(store.place(wanted[0].key))


def test_a_shard_torn_at_any_byte_does_not_count(tmp_path: Path) -> None:
    """Cut short at every length and damaged at every byte: never taken for whole, never an exception."""
    with SampleStore(tmp_path / "a") as store:
        sample = StoredSample("k", 0, 5, GeneratedText([3, 4], "xy", "stop"))
        name = store.append([sample], {"dtype": "float32"}, 0.5).id + ".jsonl"
    content = (tmp_path / "a" / name).read_bytes()
    shard = read_shard(tmp_path / "a" / name)
    assert shard is not None and shard.samples == [sample] and shard.seconds == 0.5
    torn = tmp_path / name
    for cut in range(len(content)):
        torn.write_bytes(content[:cut])
        assert read_shard(torn) is None, content[:cut]
    for place in range(len(content)):
        torn.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert read_shard(torn) is None, place
    lines = content.splitlines(keepends=True)
    torn.write_bytes(b"".join([lines[0], lines[2]]))  # every line whole, one missing
    assert read_shard(torn) is None
    with SampleStore(tmp_path / "b") as store:  # a whole line of the same sample, with another text
        store.append([StoredSample("k", 0, 5, GeneratedText([3], "x", "stop"))], {"dtype": "float32"}, 0.5)
    foreign = (tmp_path / "b" / name).read_bytes().splitlines(keepends=True)
    torn.write_bytes(b"".join([lines[0], foreign[1], lines[2]]))
    assert read_shard(torn) is None
    (tmp_path / f"{'0' * 32}.jsonl").write_bytes(content)  # a whole shard under another's name
    assert read_shard(tmp_path / f"{'0' * 32}.jsonl") is None


@pytest.mark.parametrize(("cut", "half", "samples"), [(-9, 1, 2), (0, 0, 3)])
def test_a_half_written_last_line_is_counted_and_dropped(tmp_path: Path, cut: int, half: int, samples: int) -> None:
    wanted = _wanted(3)
    whole = _run(tmp_path, wanted)
    (path,) = tmp_path.glob("*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.unlink()
    body = b"".join(lines[:-1])
    path.with_name(path.name + ".part").write_bytes(body[: len(body) + cut])
    with SampleStore(tmp_path) as store:
        found = store.recovery
        assert (found.unfinished_shards, found.half_lines, found.dropped_samples) == (1, half, samples)
        assert len(store) == 0 and "1 unfinished" in str(found) and not list(tmp_path.glob("*.part"))
    assert _run(tmp_path, wanted).samples == whole.samples


def test_a_corrupted_shard_is_moved_aside_and_made_again_alone(tmp_path: Path) -> None:
    wanted = _wanted()
    whole = _run(tmp_path, wanted)
    lines = _sample_lines(tmp_path)
    path = tmp_path / f"{shard_id([w.key for w in wanted[3:6]])}.jsonl"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with SampleStore(tmp_path) as store:
        assert store.recovery.corrupt == [path.name] and len(store) == 8
    source = _Source(_TEXTS)
    assert _run(tmp_path, wanted, source).samples == whole.samples
    assert source.calls == [3] and _sample_lines(tmp_path) == lines
    assert path.with_name(path.name + ".corrupt").read_bytes() == content


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with SampleStore(tmp_path), pytest.raises(InputError, match="written by this process"):
        SampleStore(tmp_path)
    ready, go_on = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        SampleStore(tmp_path)
        os.write(ready[1], b"x")
        os.read(go_on[0], 1)  # for ever: killed below, without closing the store
        os._exit(0)
    try:
        os.read(ready[0], 1)
        with pytest.raises(InputError, match=f"written by process {pid};"):
            SampleStore(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for end in (*ready, *go_on):
            os.close(end)
    SampleStore(tmp_path).close()


def test_missing_samples_are_an_error_where_nothing_may_be_generated(tmp_path: Path) -> None:
    _run(tmp_path, _wanted(6))
    with SampleStore(tmp_path) as store:
        with pytest.raises(InputError, match="5 of 11 samples are not in .*problem p1, sample 2"):
            sample_all(store, _wanted(), None, shard_size=_SIZE)


def test_a_source_that_answers_too_little_is_never_stored(tmp_path: Path) -> None:
    class Short(ScriptedSource):
        def generate(self, requests: list[SampleRequest]) -> list[GeneratedText]:
            return super().generate(requests)[1:]

    with pytest.raises(AssertionError, match="2 texts for 3 requests"):
        _run(tmp_path, _wanted(), Short(_TEXTS))
    assert not list(tmp_path.glob("*.jsonl*"))


def test_more_samples_keep_whole_shards_or_with_deterministic_off_every_sample(tmp_path: Path) -> None:
    _run(tmp_path / "fixed", _wanted(8))
    assert _run(tmp_path / "fixed", _wanted(11)).num_reused == 6  # the last shard had two members, now three
    _run(tmp_path / "free", _wanted(8), deterministic=False)
    source = _Source(_TEXTS)
    grown = _run(tmp_path / "free", _wanted(11), source, deterministic=False)
    assert grown.num_reused == 8 and source.calls == [3] and len(grown.samples) == 11


def test_keys_tell_apart_what_changes_a_sample() -> None:
    base = {"prompt_ids": (1, 2), "seed": 3, "temperature": 1, "max_tokens": 8, "stop_token_ids": (5, 4)}
    variants = [
        {"prompt_ids": (1, 2, 2)}, {"seed": 4}, {"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 1}, {"max_tokens": 9},
        {"stop_token_ids": (5,)},
    ]  # fmt: skip
    keys = [sample_key("m", SampleRequest(**(base | change)), 0) for change in [{}, *variants]]
    keys += [sample_key("m", SampleRequest(**base), 1), sample_key("w", SampleRequest(**base), 0)]
    assert len(set(keys)) == len(variants) + 3
    same = base | {"prompt_ids": [1, 2], "temperature": 1.0, "stop_token_ids": [4, 5]}
    assert sample_key("m", SampleRequest(**same), 0) == keys[0]


def test_new_weights_in_an_old_folder_are_another_model(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"abc")
    first = model_fingerprint(str(model), None)
    (model / "weights.manifest.json").write_text("made today")
    shutil.copytree(model, tmp_path / "copy")
    assert model_fingerprint(str(model), None) == model_fingerprint(str(tmp_path / "copy"), None) == first
    (model / "model.safetensors").write_bytes(b"abd")
    assert model_fingerprint(str(model), None) != first
    assert model_fingerprint("org/name", type("C", (), {"_commit_hash": "c0ffee"})()) == "org/name@c0ffee"
