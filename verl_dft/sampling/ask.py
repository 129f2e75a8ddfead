"""What a step wants sampled: a response to these turns, graded against this gold."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. ``top_k`` 0 means all tokens; ``max_tokens`` is cut to what the context leaves."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 2048


@dataclass(frozen=True)
class Ask:
    """One wanted sample.

    ``index`` counts the samples of one problem and one ``prompt_name``. The sample's seed is a hash of (run seed,
    ``stream``, ``problem_id``, ``index``): two stages that must not share their luck have different streams.
    """

    problem_id: str
    index: int
    messages: Sequence[Mapping[str, str]]
    gold: str
    sampling: Sampling
    prompt_name: str = ""
    stream: str = ""
    problem: str = ""
    answer_type: str = "auto"
    tolerance: float | None = None

    def numbered(self, indices: Iterable[int]) -> list["Ask"]:
        """The same ask once for each of ``indices``."""
        return [replace(self, index=index) for index in indices]
