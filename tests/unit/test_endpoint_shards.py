"""Endpoint and store: what was answered is kept, whatever happens to the rest."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from endpoint_helpers import Reply, Server, ask, asked, completion, error, serving, source

from verl_dft.errors import InputError
from verl_dft.sampling.ask import Ask, Sampling
from verl_dft.sampling.engine import GeneratedText
from verl_dft.sampling.sampler import Sampler
from verl_dft.sampling.shard_file import StoredSample, read_shard
from verl_dft.sampling.shards import Wanted, sample_all
from verl_dft.sampling.store import SampleStore, sample_key


@pytest.fixture(name="server")
def server_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    yield from serving(monkeypatch)


def wants(count: int) -> list[Wanted]:
    requests = [ask(str(index)) for index in range(count)]
    return [Wanted(sample_key("w", request, 0), 0, request, f"problem {i}") for i, request in enumerate(requests)]


def test_finished_shards_stay_when_a_request_fails_and_the_rest_is_asked_later(server: Server, tmp_path: Path) -> None:
    server.script = lambda body, n: error(400, "too long") if asked(body) == "13" else completion(asked(body))
    wanted = wants(24)
    with SampleStore(tmp_path) as store, pytest.raises(InputError, match=r"too long \[prompt: 13\]"):
        sample_all(store, wanted, lambda: nullcontext(source(server, concurrency=1)), shard_size=2)
    kept = {sample.text.text for path in tmp_path.glob("*.jsonl") for sample in read_shard(path).samples}
    assert kept == {str(i) for i in range(12)}
    assert len(server.bodies) == 14, "requests went on after the failure"
    server.bodies.clear()
    server.script = lambda body, n: completion(asked(body))
    with SampleStore(tmp_path) as store:
        sampled = sample_all(store, wanted, lambda: nullcontext(source(server)), shard_size=2)
    assert [sample.text.text for sample in sampled.samples] == [str(i) for i in range(24)]
    assert sampled.num_reused == len(kept) and len(server.bodies) == 24 - len(kept)
    assert sampled.facts == [source(server).facts()] and sampled.facts[0]["reproducible"] is False
    assert all(not sample.text.token_ids and sample.text.num_tokens == 3 for sample in sampled.samples)


def test_a_slow_request_holds_up_its_own_shard_only(server: Server) -> None:
    release = threading.Event()
    server.script = lambda body, n: (release.wait(20) if asked(body) == "0" else None, completion(asked(body)))[1]
    shards = [[want.request for want in wants(12)[i : i + 3]] for i in range(0, 12, 3)]
    answers = source(server, concurrency=2).generate_shards(shards)
    first = [next(answers) for _ in range(3)]
    assert sorted(number for number, *_ in first) == [1, 2, 3]
    release.set()
    [(number, texts, _, seconds)] = list(answers)
    assert number == 0 and [text.text for text in texts] == ["0", "1", "2"] and seconds >= 0


def test_others_in_flight_are_waited_for_when_one_fails_and_do_not_try_again(server: Server) -> None:
    failed = threading.Event()

    def script(body: dict[str, Any], number: int) -> Reply:
        if asked(body) == "1":
            failed.set()
            return error(400, "no")
        failed.wait(20)
        time.sleep(0.2)
        return completion("kept") if asked(body) == "0" else error(500, "down")

    server.script = script
    answers = source(server, concurrency=3, backoff_s=30).generate_shards([[want.request] for want in wants(6)])
    begun = time.monotonic()
    number, texts, _, _ = next(answers)
    assert (number, texts[0].text) == (0, "kept")
    with pytest.raises(InputError, match="status 400: no"):
        next(answers)
    assert len(server.bodies) == 3 and time.monotonic() - begun < 10


def test_leaving_early_ends_what_is_in_flight(server: Server) -> None:
    release = threading.Event()
    server.script = lambda body, n: (release.wait(20) if n else None, completion("ok"))[1]
    answers = source(server, concurrency=2).generate_shards([[want.request] for want in wants(4)])
    next(answers)
    begun = time.monotonic()
    answers.close()
    assert time.monotonic() - begun < 5
    release.set()


def test_a_stored_text_comes_back_equal(tmp_path: Path) -> None:
    texts = [
        GeneratedText([], "a\ud83d", "content_filter", None, 7),
        GeneratedText([], "", "stop"),
        GeneratedText([1], "b", "stop"),
    ]
    with SampleStore(tmp_path) as store:
        shard = store.append([StoredSample(str(i), 0, 0, text) for i, text in enumerate(texts)], {}, 0.0)
    with SampleStore(tmp_path) as store:
        assert store.shard(shard.id) == shard


def test_a_sampler_of_a_served_model(server: Server, tmp_path: Path) -> None:
    """Graded, without token ids; another run asks only for what is new, though the number per problem changed."""

    def asks(n: int) -> list[Ask]:
        sampling = Sampling(0.7, max_tokens=50)
        turns = [[{"role": "user", "content": str(number)}] for number in range(5)]
        return [Ask(f"p{i}", k, turns[i], str(i), sampling, "raw") for i in range(5) for k in range(n)]

    server.script = lambda body, n: completion(f"It is \\boxed{{{min(int(asked(body)), 3)}}}.", tokens=9)
    config = {"shard_size": 1, "seed": 4}  # every answer is stored when it is there
    wanted, server.script = server.script, lambda body, n: error(400, "no") if n == 7 else wanted(body, n)
    with (
        pytest.raises(InputError, match="status 400: no"),
        Sampler(tmp_path, "teacher", config, source(server, concurrency=1)) as sampler,
    ):
        sampler.sample(asks(2))
    assert len(list(tmp_path.glob("*.jsonl"))) == 7
    server.bodies.clear()
    server.script = wanted
    with Sampler(tmp_path, "teacher", config, source(server)) as sampler:
        samples = list(sampler.sample(asks(2)))
    assert (sampler.num_reused, sampler.num_generated, len(server.bodies)) == (7, 3, 3)
    assert [s.grade for s in samples] == ["correct"] * 8 + ["wrong"] * 2
    assert {s.num_tokens for s in samples} == {9} and not any(s.token_ids for s in samples)
    assert {s.model for s in samples} == {"teacher"} and sampler.facts == [source(server).facts()]
    assert all(0 <= body["seed"] < 2**31 for body in server.bodies)
    with Sampler(tmp_path, "teacher", config, source(server)) as sampler:
        more = list(sampler.sample(asks(3)))
    assert [s for s in more if s.index < 2] == samples
    assert (sampler.num_reused, sampler.num_generated, len(server.bodies)) == (10, 5, 8)
    assert len({body["seed"] for body in server.bodies}) == 8
    with Sampler(tmp_path, "teacher", config, source(server, extra={"top_k": -1})) as sampler:
        sampler.sample(asks(1))
    assert sampler.num_reused == 0, "another request's answers were taken for this one's"
