"""What an OpenAI-compatible endpoint answered: a text, or a failure and whether to try again."""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from verl_dft.sampling.engine import GeneratedText

_SHOWN = 80
_SHOWN_MESSAGE = 200
_REASONS = {"stop": "stop", "length": "length", "eos_token": "stop", "stop_sequence": "stop", "max_tokens": "length"}
# With these an answer may have no content: nothing was left to say, or to show.
_MAY_BE_EMPTY = ("length", "content_filter")


class Failed(Exception):
    """One attempt failed: what happened, what to do, and after how long it may be tried again (not if ``final``)."""

    def __init__(self, what: str, advice: str, *, final: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(f"{what}; {advice}")
        self.what, self.advice, self.final, self.wait_s = what, advice, final, wait_s

    def after(self, attempts: int) -> "Failed":
        """The same, with how often it was tried."""
        return self if attempts == 1 else self.but(f"tried {attempts} times")

    def but(self, remark: str) -> "Failed":
        """The same with a remark, for good."""
        return Failed(f"{self.what} ({remark})", self.advice, final=True)


@dataclass(frozen=True)
class Answer:
    """A text, the model that the server says it is from (or nothing), and what is to be counted."""

    text: GeneratedText
    model: str
    counts: Counter[str]


def parse_answer(body: str) -> Answer | None:
    """A chat completion, or None where the body is none with a text.

    ``finish_reason`` is ``stop`` or ``length`` where the server means that, else the server's own word
    (``content_filter``, …) or ``unknown``. A refusal is a text whose reason is ``refusal``.
    """
    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        message = choice["message"]
        content, refusal, reason = message.get("content"), message.get("refusal"), choice.get("finish_reason")
        tokens = (answer.get("usage") or {}).get("completion_tokens")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None
    reason = _REASONS.get(str(reason), str(reason)) if reason else "unknown"
    if content is None and isinstance(refusal, str):
        content, reason = refusal, "refusal"
    if content is None and reason in _MAY_BE_EMPTY:
        content = ""
    if not isinstance(content, str):
        return None
    # JSON can spell half of a surrogate pair (a server cut an emoji in two), which no file of ours can hold
    content = content.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        tokens = None
    thought = message.get("reasoning_content") or message.get("reasoning")
    seen = {
        f"finish_reason {reason}": reason not in ("stop", "length"),
        "answer without a count of its tokens": tokens is None,
        "reasoning apart from the answer, which is not kept": bool(thought),
    }
    counts = Counter({what: 1 for what, is_so in seen.items() if is_so})
    return Answer(GeneratedText([], content, reason, reported_tokens=tokens), str(answer.get("model") or ""), counts)


def no_text_failure(body: str, hide: Callable[[str], str]) -> Failed:
    """What :func:`parse_answer` found no text in. ``hide`` takes secrets out of what is shown."""
    shown = _one_line(hide(body), _SHOWN) or "nothing"
    advice = "check that base_url is an OpenAI-compatible endpoint"
    return Failed(f"answered with no chat completion with a text: {shown}", advice)


def connection_failure(error: BaseException) -> Failed:
    """Nothing listens there, or it hung up."""
    chain: list[BaseException] = []
    reason: BaseException | None = error
    while reason is not None:
        chain.append(reason)
        reason = reason.__cause__ or reason.__context__
    # the system's own words are best, else those of the lowest layer that has some
    words = [_system_words(e) for e in chain if isinstance(e, OSError)] or [str(e) for e in chain[1:]]
    words = [_one_line(text, _SHOWN) for text in words if text.strip()]
    advice = "check that the server runs and that base_url is right"
    return Failed("no connection" + (f" ({words[-1]})" if words else ""), advice)


def _system_words(error: OSError) -> str:
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)  # asyncio puts words of its own there
    return error.strerror or str(error)


def status_failure(response: Any, hide: Callable[[str], str], asked: str, key_env: str) -> Failed:
    """What a status other than 200 means. ``asked``: the turn that was sent, which a refusal of it shows."""
    status, headers = response.status_code, response.headers
    message, code = _message(response.text)
    message = _one_line(hide(message), _SHOWN_MESSAGE)
    what = f"status {status}" + (f": {message}" if message else "")
    if status == 429 and code != "insufficient_quota":
        return Failed(what, "lower concurrency, or try again later", wait_s=_retry_after(headers))
    if status == 408 or status >= 500:
        return Failed(what, "see the server's log, or try again later", wait_s=_retry_after(headers))
    if status in (401, 403):
        advice = f"set ${key_env} to a key that this server takes"
    elif status in (404, 405):
        advice = "base_url must end where /chat/completions begins (mostly /v1), and model be a name that it serves"
    elif status in (402, 429):
        advice = "the account has no quota left; add to it or use another"
    else:
        what += f" [prompt: {_one_line(asked, _SHOWN)}]"
        advice = "change the setting or the prompt that it names"
    return Failed(what, advice, final=True)


def _message(body: str) -> tuple[str, str]:
    """The server's own words and its code, from whichever place it has them in."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return body, ""
    code = ""
    for _ in range(3):
        if not isinstance(found, dict):
            break
        code = str(found.get("code") or found.get("type") or "")
        inner = next((found[key] for key in ("error", "message", "detail") if found.get(key)), None)
        if inner is None:
            break
        found = inner
    return found if isinstance(found, str) else json.dumps(found), code


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds of ``Retry-After`` (RFC 9110, 10.2.3: a number of seconds or a date), 0 where there is none."""
    value: Any = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return seconds if seconds > 0 else 0.0


def _one_line(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length] + "…"
