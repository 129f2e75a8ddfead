"""Asking an endpoint: requests, answers, failures that pass, and shards."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from email.utils import format_datetime
from typing import Any

import pytest
from endpoint_helpers import Reply, Server, ask, asked, completion, error, serving, source

from verl_dft.sampling.engine import SampleRequest


@pytest.fixture(name="server")
def server_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    yield from serving(monkeypatch)


# ---- what is asked and what comes back ----


def test_texts_come_in_the_order_of_the_requests_with_as_many_in_flight_as_allowed(server: Server) -> None:
    meet = threading.Barrier(4)

    def script(body: dict[str, Any], number: int) -> Reply:
        if number < 4:
            meet.wait(10)
        time.sleep(0.02 * random.Random(number).random())
        return completion(f"{asked(body)}!", tokens=int(asked(body)) + 1)

    server.script = script
    texts = source(server, concurrency=4).generate([ask(str(i)) for i in range(40)])
    assert [text.text for text in texts] == [f"{i}!" for i in range(40)]
    assert [text.num_tokens for text in texts] == [i + 1 for i in range(40)]
    assert all(not text.token_ids and text.finish_reason == "stop" for text in texts)
    assert server.most_in_flight == 4


def test_the_request_holds_the_turns_and_the_sampling(server: Server) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "ü"}]
    request = SampleRequest((), 2**62 + 5, 0.7, 0.9, 20, 77, (1, 2), messages)
    source(server, extra={"repetition_penalty": 1.0}).generate([request])
    source(server, limit_field="max_completion_tokens").generate([replace(request, temperature=0.0)])
    sampled, greedy = server.bodies
    assert sampled == {
        "model": "teacher",
        "messages": messages,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "max_tokens": 77,
        "seed": 2**30,
        "repetition_penalty": 1.0,
    }
    assert greedy == {"model": "teacher", "messages": messages, "temperature": 0.0, "max_completion_tokens": 77}


def test_why_a_text_ended_is_kept_and_what_is_unusual_is_counted(server: Server) -> None:
    replies = {
        "cut": completion("a", "length"),
        "all thought": completion(None, "length", reasoning="hm"),
        "filtered": completion(None, "content_filter"),
        "filtered late": completion("abc", "content_filter"),
        "refused": completion(None, "stop", refusal="I would rather not."),
        "silent": completion(""),
        "half an emoji": completion("a\ud83d"),
        "an emoji": completion("a\U0001f600"),
        "odd": completion("x", "tool_calls"),
        "no reason": completion("x", None),
        "no usage": completion("x", tokens=None),
        "other model": (200, {}, {**completion("x")[2], "model": "teacher-2026"}),
    }
    server.script = lambda body, n: replies[asked(body)]
    one = source(server)
    texts = dict(zip(replies, one.generate([ask(name) for name in replies]), strict=True))
    assert {name: (text.text, text.finish_reason) for name, text in texts.items()} == {
        "cut": ("a", "length"),
        "all thought": ("", "length"),
        "filtered": ("", "content_filter"),
        "filtered late": ("abc", "content_filter"),
        "refused": ("I would rather not.", "refusal"),
        "silent": ("", "stop"),
        "half an emoji": ("a\ufffd", "stop"),
        "an emoji": ("a\U0001f600", "stop"),
        "odd": ("x", "tool_calls"),
        "no reason": ("x", "unknown"),
        "no usage": ("x", "stop"),
        "other model": ("x", "stop"),
    }
    assert texts["no usage"].reported_tokens is None and texts["no usage"].num_tokens == 0
    assert one.notes() == [
        f"{server.url}: {line}"
        for line in (
            "1 x answer by model teacher-2026",
            "1 x answer without a count of its tokens",
            "2 x finish_reason content_filter",
            "1 x finish_reason refusal",
            "1 x finish_reason tool_calls",
            "1 x finish_reason unknown",
            "1 x reasoning apart from the answer, which is not kept",
        )
    ]


def test_waits_and_seeds_leave_the_random_generators_alone(server: Server) -> None:
    server.script = lambda body, n: error(500, "x") if n == 0 else completion("ok")
    random.seed(1)
    before = random.getstate()
    source(server).generate([ask()])
    assert random.getstate() == before


def test_from_another_thread_and_several_times(server: Server) -> None:
    one, found = source(server), []
    thread = threading.Thread(target=lambda: found.extend(one.generate([ask("a")])))
    thread.start()
    thread.join(20)
    found += one.generate([ask("b")])
    assert [text.text for text in found] == ["a!", "b!"]
    assert one.generate([]) == []


# ---- failures that pass ----


@pytest.mark.parametrize(
    "bad",
    [
        error(500, "boom"),
        error(503, "loading"),
        error(408, "too slow"),
        (502, {"content-type": "text/html"}, "<html>Bad gateway</html>"),
        (200, {}, "{not json"),
        (200, {"content-type": "text/html"}, "<html>hello</html>"),
        (200, {}, ""),
        (200, {}, "null"),
        (200, {}, "[" * 100_000),
        (200, {}, {"error": {"message": "upstream"}}),
        (200, {}, {"choices": []}),
        (200, {}, {"choices": {"0": 1}}),
        (200, {}, {"choices": [{"message": "text"}]}),
        completion(None),
        completion(7),  # type: ignore[arg-type]
    ],
)
def test_what_may_pass_is_tried_again(server: Server, bad: Reply) -> None:
    server.script = lambda body, n: bad if n < 2 else completion("ok")
    one = source(server)
    assert [text.text for text in one.generate([ask()])] == ["ok"]
    assert len(server.bodies) == 3 and server.bodies[0] == server.bodies[2]
    assert one.counts == {"request tried again": 2}


def test_waits_double_and_stay_within_their_jitter(server: Server) -> None:
    server.script = lambda body, n: error(500, "x") if n < 4 else completion("ok")
    source(server, backoff_s=0.1).generate([ask()])
    waits = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    for number, wait in enumerate(waits):
        assert 0.05 * 2**number <= wait <= 0.1 * 2**number + 3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(server: Server, form: str) -> None:
    from datetime import datetime, timedelta, timezone

    # a date has whole seconds: two ahead is between one and two
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=2), usegmt=True)
    value, least = ("0.6", 0.6) if form == "seconds" else (date, 0.8)
    server.script = lambda body, n: error(429, "slow down", retry_after=value) if n == 0 else completion("ok")
    assert source(server).generate([ask()])[0].text == "ok"
    assert least <= server.times[1] - server.times[0] < 5


@pytest.mark.parametrize("value", ["soon", "-5", "nan", ""])
def test_a_retry_after_that_says_nothing_is_a_plain_retry(server: Server, value: str) -> None:
    server.script = lambda body, n: error(429, "slow down", retry_after=value) if n == 0 else completion("ok")
    assert source(server).generate([ask()])[0].text == "ok"
    assert server.times[1] - server.times[0] < 2


def test_a_slow_answer_is_tried_again(server: Server) -> None:
    release = threading.Event()
    server.script = lambda body, n: (release.wait(20) if n == 0 else None, completion("ok"))[1]
    assert source(server, timeout_s=1.0).generate([ask()])[0].text == "ok"
    release.set()
    assert len(server.bodies) >= 2
