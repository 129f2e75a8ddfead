"""An endpoint that is down, slow, refuses or talks nonsense: one clear line, in which no key is shown."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from endpoint_helpers import KEY, Reply, Server, ask, completion, error, refused, serving, source

from verl_dft.errors import InputError
from verl_dft.sampling.endpoint import EndpointSource
from verl_dft.sampling.shards import Wanted, sample_all
from verl_dft.sampling.store import SampleStore, sample_key


@pytest.fixture(name="server")
def server_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    yield from serving(monkeypatch)


# ---- failures that stay: one line ----


def test_nothing_listens_there(server: Server) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(InputError) as caught:
            EndpointSource(url, "teacher", retries=2, backoff_s=0.01).generate([ask()])
    assert str(caught.value) == (
        f"{url}: no connection (Connection refused) (tried 3 times); check that the server runs and that base_url is "
        "right"
    )


def test_a_server_that_hangs_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def hang_up() -> None:
            for _ in range(2):
                connection, _ = listening.accept()
                connection.recv(65536)
                connection.close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with pytest.raises(InputError, match=r"no connection \(.+\) \(tried 2 times\); check that the server runs"):
            EndpointSource(url, "teacher", retries=1, backoff_s=0.01).generate([ask()])
        thread.join(10)


def test_an_answer_that_drips_for_ever_is_a_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece comes in time, the whole does not."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n")
                try:
                    for _ in range(100):
                        connection.sendall(b" ")
                        time.sleep(0.05)
                except OSError:
                    pass

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        begun = time.monotonic()
        with pytest.raises(InputError) as caught:
            EndpointSource(url, "teacher", retries=0, timeout_s=0.4).generate([ask()])
        assert time.monotonic() - begun < 4.5  # of the 5 that the dripping takes
        thread.join(10)
    assert str(caught.value) == f"{url}: no answer in 0.4 s; raise timeout_s, or lower concurrency or max_tokens"


def test_always_slow(server: Server) -> None:
    release = threading.Event()
    server.script = lambda body, n: (release.wait(20), completion("late"))[1]
    message = refused(server, timeout_s=0.2, retries=2)
    release.set()
    assert "no answer in 0.2 s (tried 3 times); raise timeout_s" in message
    assert len(server.bodies) <= 3  # under load one may be given up before it is read


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        ((200, {}, "<html>\n  <b>It works!</b>" + "x" * 500), "<html> <b>It works!</b>" + "x" * 57 + "…"),
        ((200, {}, ""), "nothing"),
        (completion(None), '{"id": "x", "model": "teacher", "choices": [{"index": 0, "message": {"role": "as…'),
    ],
)
def test_always_garbage(server: Server, reply: Reply, shown: str) -> None:
    server.script = lambda body, n: reply
    message = refused(server, retries=1)
    assert message == (
        f"{server.url}: answered with no chat completion with a text: {shown} (tried 2 times); "
        "check that base_url is an OpenAI-compatible endpoint"
    )


@pytest.mark.parametrize(
    ("reply", "parts"),
    [
        (error(401, "Incorrect API key"), ["status 401: Incorrect API key", "set $OPENAI_API_KEY"]),
        (error(403, "not for you"), ["status 403: not for you", "set $OPENAI_API_KEY"]),
        (error(404, "The model `teacher` does not exist."), ["404: The model `teacher` does not", "a name that it"]),
        (error(400, "max_tokens is too large"), ["400: max_tokens is too large [prompt: 2 + 2]", "change the setting"]),
        (error(402, "pay first"), ["status 402: pay first", "no quota left"]),
        ((422, {}, {"detail": [{"loc": ["seed"]}]}), ['422: [{"loc": ["seed"]}] [prompt']),
        ((400, {}, {"message": "flat", "code": 400}), ["status 400: flat [prompt"]),
        ((400, {}, {"error": "words"}), ["status 400: words [prompt"]),
        ((400, {}, "plain " + "z" * 900), ["status 400: plain zzz", "z… [prompt"]),
        ((413, {}, ""), ["status 413 [prompt: 2 + 2]"]),
        ((429, {}, {"error": {"message": "no money", "code": "insufficient_quota"}}), ["429: no money; the account"]),
        (
            error(429, "later", retry_after="7200"),
            ["status 429: later (it asks to wait 7200 s, longer than timeout_s)"],
        ),
    ],
)
def test_what_trying_again_does_not_mend_is_asked_once(server: Server, reply: Reply, parts: list[str]) -> None:
    server.script = lambda body, n: reply
    message = refused(server)
    assert all(part in message for part in parts), message
    assert len(server.bodies) == 1


def test_what_stays_is_tried_so_often_and_no_more(server: Server) -> None:
    server.script = lambda body, n: error(503, "loading\nthe model")
    message = refused(server, retries=3)
    assert message == (
        f"{server.url}: status 503: loading the model (tried 4 times); see the server's log, or try again later"
    )
    assert len(server.bodies) == 4


def test_a_url_that_ends_too_late_or_too_early_is_explained(server: Server) -> None:
    server.url += "/chat/completions"
    assert "no route /v1/chat/completions/chat/completions; base_url must end where /chat" in refused(server)


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://h/v1", "http://", "", "http://h:99999/v1", "http://[::1", "http://a b/v1"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(InputError, match=r"no URL; give it as http\(s\)://HOST\[:PORT\]/v1"):
        EndpointSource(url, "teacher")


@pytest.mark.parametrize(
    "options",
    [{"model": ""}, {"concurrency": 0}, {"timeout_s": 0}, {"retries": -1}, {"backoff_s": -1.0}, {"retries": "x"}],
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        EndpointSource(**{"base_url": "http://h/v1", "model": "m", **options})


def test_log_probs_are_refused(server: Server) -> None:
    with pytest.raises(InputError, match="set want_logp=false"):
        source(server).generate([ask(want_logp=True)])
    assert not server.bodies


def test_half_a_character_in_a_prompt_is_refused(server: Server) -> None:
    message = refused(server, ask("a\ud800b"))
    assert "a message has half of a surrogate pair; mend" in message and not server.bodies


# ---- the key ----


def test_the_key_is_sent_and_shown_nowhere(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("TEACHER_KEY", f" {KEY}\r\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-someone-else")
    caplog.set_level(logging.DEBUG)
    server.script = lambda body, n: completion("ok") if n else error(500, f"you sent {KEY}")
    one = source(server, api_key_env="TEACHER_KEY")
    wanted = [Wanted(sample_key("w", ask(), 0), 0, ask())]
    with SampleStore(tmp_path / "store") as store:
        sample_all(store, wanted, lambda: nullcontext(one), shard_size=1)
    assert [headers["authorization"] for headers in server.headers] == [f"Bearer {KEY}"] * 2
    long = "x" * 190 + KEY  # a key that is cut in half is a key half shown
    replies: list[Reply] = [error(401, f"bad key {KEY}"), error(400, long), (500, {}, KEY), (200, {}, f"{KEY} garbage")]
    replies += [(200, {}, "y" * 70 + KEY), (401, {}, {"detail": [{"got": KEY}]})]
    shown = [repr(one), json.dumps(one.facts()), *one.notes(), caplog.text]
    shown += [path.read_text() for path in (tmp_path / "store").glob("*") if path.is_file()]
    for reply in replies:
        server.script = lambda body, n, reply=reply: reply
        shown.append(refused(server, api_key_env="TEACHER_KEY", retries=0))
    assert not [text for text in shown if KEY[:6] in text or "someone-else" in text]
    assert sum("***" in text for text in shown) >= 4


def test_a_key_that_is_a_common_word_changes_no_text(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    server.script = lambda body, n: completion("the set is EMPTY")
    assert source(server).generate([ask()])[0].text == "the set is EMPTY"


@pytest.mark.parametrize("key", ["sk-1\nsk-2", "schlüssel", "a\tb"])
def test_a_key_that_cannot_be_one_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match=r"the key in \$OPENAI_API_KEY has characters that no key has") as caught:
        EndpointSource("http://h/v1", "m")
    assert key not in str(caught.value)


@pytest.mark.parametrize("url", [f"http://user:{KEY}@h/v1", f"http://h/v1?key={KEY}", f"http://h/v1#{KEY}"])
def test_a_url_with_a_secret_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(InputError, match="base_url holds a user, a password") as caught:
        EndpointSource(url, "m")
    assert KEY not in str(caught.value)


def test_without_a_key_no_other_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    source(server, api_key_env="NO_SUCH_KEY").generate([ask()])
    assert server.headers[0]["authorization"] == "Bearer none"
