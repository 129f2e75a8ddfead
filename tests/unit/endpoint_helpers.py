"""A real HTTP server on loopback that answers as an endpoint by script, for the tests of the endpoint source."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from verl_dft.errors import InputError
from verl_dft.sampling.endpoint import EndpointSource
from verl_dft.sampling.engine import SampleRequest

KEY = "sk-0123456789-very-secret"
Reply = tuple[int, dict[str, str], Any]
"""Status, headers, body: text, or what becomes JSON."""


def completion(content: str | None, reason: str | None = "stop", tokens: int | None = 3, **message: Any) -> Reply:
    usage = {"usage": {"completion_tokens": tokens}} if tokens is not None else {}
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": reason}
    return 200, {}, {"id": "x", "model": "teacher", "choices": [choice], **usage}


def error(status: int, message: str, **headers: str) -> Reply:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, {"error": {"message": message}}


class Server:
    """Answers a request with ``script(body, number of the request)``; keeps bodies, times and headers."""

    def __init__(self) -> None:
        self.script: Callable[[dict[str, Any], int], Reply] = lambda body, n: completion(asked(body) + "!")
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = 0
        self.lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            status, headers, content = self.script(body, number)
        finally:
            with self.lock:
                self.in_flight -= 1
        if handler.path != "/v1/chat/completions":
            status, headers, content = error(404, f"no route {handler.path}")
        sent = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        try:
            handler.send_response(status)
            for name, value in {"content-type": "application/json", **headers}.items():
                handler.send_header(name, value)
            handler.send_header("content-length", str(len(sent)))
            handler.end_headers()
            handler.wfile.write(sent)
        except OSError:
            pass  # the client had no patience, as one test wants

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server, in an environment without a proxy in between and without a key; for a fixture."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running = Server()
    yield running
    running.close()


def asked(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


def source(server: Server, **options: Any) -> EndpointSource:
    return EndpointSource(server.url, "teacher", **{"backoff_s": 0.01, "timeout_s": 20, **options})


def ask(text: str = "2 + 2", **options: Any) -> SampleRequest:
    return SampleRequest((), 2**62 + 5, messages=[{"role": "user", "content": text}], **options)


def refused(server: Server, request: SampleRequest | None = None, **options: Any) -> str:
    """The one line of the error that asking ends with."""
    with pytest.raises(InputError) as caught:
        source(server, **options).generate([request or ask()])
    message = str(caught.value)
    assert message.startswith(f"{server.url}: ") and "\n" not in message and len(message) < 500
    assert caught.value.__suppress_context__ or caught.value.__cause__ is None
    return message
