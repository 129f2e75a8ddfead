"""Where texts come from: the interface that the vLLM engine has, and a source without a model."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from verl_dft.sampling.choose import uniforms
from verl_dft.sampling.engine import GeneratedText, SampleRequest


class TextSource(Protocol):
    """Something that answers requests. :class:`verl_dft.sampling.engine.VLLMEngine` is one."""

    def generate(self, requests: Sequence[SampleRequest]) -> list[GeneratedText]:
        """One text per request, in order; a function of the requests of this call alone."""
        ...

    def facts(self) -> dict[str, Any]:
        """What a result should say about where its texts came from. JSON values."""
        ...


class ShardSource(TextSource, Protocol):
    """A source that works on several shards at a time, such as ``verl_dft.sampling.replicas.ReplicaEngines``."""

    def generate_shards(
        self, shards: Iterable[Sequence[SampleRequest]]
    ) -> Iterator[tuple[int, list[GeneratedText], dict[str, Any], float]]:
        """(number of the shard, its texts in order, facts of what wrote them, seconds it took), in any order.

        Every shard once; a shard's texts are what ``generate`` would give for it.
        """
        ...


class ScriptedSource:
    """Picks each text from a list by the request's seed, in no time: for testing storage, faults and reports.

    A text's tokens are its UTF-8 bytes; it is cut at ``max_tokens`` like a model's (``finish_reason`` ``length``).
    ``calls`` holds the number of requests of each call so far.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        assert texts, "a scripted source needs a text"
        self.texts, self.calls = list(texts), []

    def generate(self, requests: Sequence[SampleRequest]) -> list[GeneratedText]:
        """The text that each request's seed picks."""
        self.calls.append(len(requests))
        drawn = uniforms([request.seed for request in requests], [0] * len(requests))
        return [self._text(request, float(u)) for request, u in zip(requests, drawn, strict=True)]

    def facts(self) -> dict[str, Any]:
        """Nothing but its name."""
        return {"source": "scripted"}

    def _text(self, request: SampleRequest, u: float) -> GeneratedText:
        tokens = list(self.texts[int(u * len(self.texts))].encode())
        kept = tokens[: request.max_tokens]
        reason = "length" if len(kept) < len(tokens) else "stop"
        return GeneratedText(kept, bytes(kept).decode(errors="replace"), reason)
