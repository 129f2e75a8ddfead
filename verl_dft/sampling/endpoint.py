"""Texts from an OpenAI-compatible endpoint (``POST {base_url}/chat/completions``): a served teacher, or a bought one.

An endpoint gives text, not token ids, and it is not reproducible: the same request may be answered otherwise tomorrow.
"""

import asyncio
import json
import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from verl_dft.errors import InputError
from verl_dft.sampling.endpoint_answers import Failed, connection_failure, no_text_failure, parse_answer, status_failure
from verl_dft.sampling.engine import GeneratedText, SampleRequest

_MAX_BACKOFF_S = 60.0
_Finished = tuple[int, list[GeneratedText]]


class EndpointSource:
    """A :class:`verl_dft.sampling.source.ShardSource` over chat completions, for a thread without an event loop.

    Tried again, with exponential backoff: no connection, an answer that takes longer than ``timeout_s``, statuses 408,
    429 and 5xx (``Retry-After`` is waited for), and answers that are none (not JSON, no choices, no content).
    ``counts`` holds what a user should hear of; see :meth:`notes`.

    Args:
        base_url: up to and with ``/v1``. A key has no place in it.
        model: the name under which the server has it.
        api_key_env: environment variable with the key; unset is right for a server that needs none.
        concurrency: requests in flight.
        timeout_s: of one attempt, from sending it to the last byte of the answer.
        retries: attempts after the first.
        backoff_s: before the first retry; doubled for each further one, at most a minute, less up to half at random.
        limit_field: what the server calls the largest number of tokens (newer models: ``max_completion_tokens``).
        extra: further fields of the request's body; they win over everything chosen here.

    Raises:
        InputError: a URL or a key that cannot be one, a number out of range, or no ``openai`` package.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout_s: float = 600.0,
        retries: int = 5,
        backoff_s: float = 1.0,
        limit_field: str = "max_tokens",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if not model:
            raise InputError("an endpoint needs the name of its model; set model")
        _check_number("concurrency", concurrency, int, 1)
        _check_number("timeout_s", timeout_s, int | float, 0.001)
        _check_number("retries", retries, int, 0)
        _check_number("backoff_s", backoff_s, int | float, 0)
        self.base_url, self.model, self.extra = _checked_url(base_url), model, dict(extra or {})
        self.concurrency, self.timeout_s, self.retries, self.backoff_s = concurrency, timeout_s, retries, backoff_s
        self.limit_field, self._key_env, self._key = limit_field, api_key_env, _read_key(api_key_env)
        self.counts: Counter[str] = Counter()
        # of its own: drawing waits must not move a generator that samples come from
        self._random = random.Random()
        try:
            import openai
        except ImportError:
            raise InputError("an endpoint needs the openai package; pip install openai") from None
        self._openai = openai

    @property
    def writer(self) -> str:
        """What stands for the model in :func:`verl_dft.sampling.store.sample_key`; its files are elsewhere."""
        return json.dumps(["endpoint", self.base_url, self.model, self.extra], sort_keys=True)

    def generate(self, requests: Sequence[SampleRequest]) -> list[GeneratedText]:
        """Ask for every request's ``messages``; the texts in the order of the requests.

        ``token_ids`` are empty and ``reported_tokens`` is what the server counted, if it did. ``prompt_ids`` and
        ``stop_token_ids`` are not used: the server has its own template and end tokens. The seed is sent in 31 bits,
        which every server can hold.

        Raises:
            InputError: a request failed for good, or log-probs are wanted.
        """
        [(_, texts, _, _)] = self.generate_shards([requests])
        return texts

    def generate_shards(
        self, shards: Iterable[Sequence[SampleRequest]]
    ) -> Iterator[tuple[int, list[GeneratedText], dict[str, Any], float]]:
        """Like :meth:`generate` for each shard, with ``concurrency`` requests of whichever shards in flight.

        Yields (number of the shard, its texts, facts, seconds since the shard before). When a request fails for good no
        other is begun, those in flight are waited for, and the shards that this completes are still yielded.
        """
        shards = [list(shard) for shard in shards]
        for request in (request for shard in shards for request in shard):
            assert request.messages, "an endpoint needs messages"
            if request.want_logp:
                raise InputError("an endpoint gives no log-probs of token ids; set want_logp=false")
        yield from ((number, [], self.facts(), 0.0) for number, shard in enumerate(shards) if not shard)
        # The loop runs only while a shard is waited for: what the caller does in between is short, and needs no thread.
        loop = asyncio.new_event_loop()
        finished: asyncio.Queue[_Finished | None] = asyncio.Queue()
        task = loop.create_task(self._answer_all(shards, finished))
        begun = time.monotonic()
        try:
            while (shard := loop.run_until_complete(finished.get())) is not None:
                now = time.monotonic()
                yield *shard, self.facts(), now - begun
                begun = now
            loop.run_until_complete(task)
        finally:
            unfinished = asyncio.all_tasks(loop)
            for one in unfinished:
                one.cancel()
            if unfinished:
                loop.run_until_complete(asyncio.wait(unfinished))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def facts(self) -> dict[str, Any]:
        """Where the texts came from. Never the key."""
        return {
            "source": "endpoint",
            "base_url": self.base_url,
            "model": self.model,
            "extra": self.extra,
            "reproducible": False,
        }

    def notes(self) -> list[str]:
        """One line for each thing that happened and that a user should know, with its count."""
        return [self._hide(f"{self.base_url}: {count} x {what}") for what, count in sorted(self.counts.items())]

    async def _answer_all(
        self, shards: Sequence[Sequence[SampleRequest]], finished: "asyncio.Queue[_Finished | None]"
    ) -> None:
        """Put each shard into ``finished`` when its last text is there, and None at the end."""
        texts = [dict[int, GeneratedText]() for _ in shards]
        todo = ((number, index) for number, shard in enumerate(shards) for index in range(len(shard)))
        failures: list[Failed] = []
        stop = asyncio.Event()

        async def work(client: Any) -> None:
            for number, index in todo:
                shard, have = shards[number], texts[number]
                try:
                    have[index] = await self._answer(client, shard[index], stop)
                except Failed as failure:
                    failures.append(failure)
                    stop.set()
                if len(have) == len(shard):
                    finished.put_nowait((number, [have[i] for i in range(len(shard))]))
                if stop.is_set():
                    return

        try:
            async with self._client() as client:
                await asyncio.gather(*(work(client) for _ in range(min(self.concurrency, sum(map(len, shards))))))
        finally:
            finished.put_nowait(None)
        if failures:
            raise InputError(self._hide(f"{self.base_url}: {failures[0]}"))

    async def _answer(self, client: Any, request: SampleRequest, stop: asyncio.Event) -> GeneratedText:
        """The answer, after as many attempts as it takes and there may be. Others' failure ends the attempts."""
        body = self._body(request)
        wait = self.backoff_s
        for attempt in range(1, self.retries + 2):
            try:
                content = await self._post(client, request.messages or (), body)
                if (answer := parse_answer(content)) is None:
                    raise no_text_failure(content, self._hide)
            except Failed as failure:
                if failure.final or attempt > self.retries:
                    raise failure.after(attempt) from None
                if failure.wait_s > self.timeout_s:
                    raise failure.but(f"it asks to wait {failure.wait_s:.0f} s, longer than timeout_s") from None
                self.counts["request tried again"] += 1
                backoff = min(wait, _MAX_BACKOFF_S) * self._random.uniform(0.5, 1.0)
                if await _set_within(stop, max(failure.wait_s, 0.0) + backoff):
                    raise failure.after(attempt) from None
                wait *= 2
            else:
                self.counts.update(answer.counts)
                if answer.model not in ("", self.model):
                    self.counts[f"answer by model {answer.model}"] += 1
                return answer.text
        raise AssertionError("unreachable")

    async def _post(self, client: Any, turns: Sequence[Mapping[str, str]], body: Mapping[str, Any]) -> str:
        """The body of one answer of status 200. Raises :class:`Failed`, without the key in it."""
        openai = self._openai
        create = client.chat.completions.with_raw_response.create
        messages = [dict(turn) for turn in turns]
        try:
            # The client's own limit is on the time between two pieces of an answer, which could drip for ever.
            request = create(model=self.model, messages=messages, extra_body=dict(body))
            answer = await asyncio.wait_for(request, self.timeout_s)
            return answer.http_response.text
        except (asyncio.TimeoutError, openai.APITimeoutError):
            advice = "raise timeout_s, or lower concurrency or max_tokens"
            raise Failed(f"no answer in {self.timeout_s:g} s", advice) from None
        except openai.APIConnectionError as error:
            raise connection_failure(error) from None
        except openai.APIStatusError as error:
            asked = str(messages[-1].get("content", ""))
            raise status_failure(error.response, self._hide, asked, self._key_env) from None
        except UnicodeEncodeError:
            raise Failed("a message has half of a surrogate pair", "mend the text of the prompt", final=True) from None

    def _body(self, request: SampleRequest) -> dict[str, Any]:
        body: dict[str, Any] = {"temperature": float(request.temperature), self.limit_field: request.max_tokens}
        if request.temperature > 0:
            # sent even if 1: left out, some servers take the model's own default
            body |= {"top_p": float(request.top_p), "seed": request.seed >> 32}
            body |= {"top_k": request.top_k} if request.top_k else {}
        return body | self.extra

    def _client(self) -> Any:
        # A new one for each call: its connections belong to the call's event loop.
        return self._openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self._key or "none", timeout=self.timeout_s, max_retries=0
        )

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


async def _set_within(stop: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except asyncio.TimeoutError:
        return False
    return True


def _check_number(name: str, value: Any, kind: Any, least: float) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or not least <= value < math.inf:
        raise InputError(f"{name}={value}; it must be a {'whole ' if kind is int else ''}number of at least {least}")


def _checked_url(base_url: str) -> str:
    advice = "give it as http(s)://HOST[:PORT]/v1"
    try:
        parts = urlsplit(base_url)
        host = re.fullmatch(r"[A-Za-z0-9_.:%-]+", parts.hostname or "")
        valid = parts.scheme in ("http", "https") and host is not None and parts.port != 0
    except ValueError:
        raise InputError(f"base_url is no URL; {advice}") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        # not shown: it may hold a key
        raise InputError("base_url holds a user, a password or what follows ? or #; leave it out and use api_key_env")
    if not valid:
        raise InputError(f"base_url={base_url} is no URL; {advice}")
    return base_url.rstrip("/")


def _read_key(api_key_env: str) -> str:
    key = os.environ.get(api_key_env, "").strip()
    if not (key.isascii() and (key.isprintable() or not key)):
        raise InputError(f"the key in ${api_key_env} has characters that no key has; set it again")
    return key
