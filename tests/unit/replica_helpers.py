"""Sources for Ray actors without a model. Sent to the actors by value; without torch, which takes seconds to import."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from verl_dft.errors import InputError
from verl_dft.sampling.engine import GeneratedText, SampleRequest

TEXTS = [f"the answer is {number}" for number in range(40)]


def plain_text(request: SampleRequest, texts: Sequence[str] = TEXTS) -> GeneratedText:
    """What an actor writes for a request."""
    text = texts[request.seed % len(texts)]
    return GeneratedText(list(text.encode()), text, "stop")


@dataclass(frozen=True)
class Make:
    """Makes a :class:`Trouble`; ``texts`` is what stands for a model's weights."""

    texts: tuple[str, ...] = tuple(TEXTS)
    trouble: str = ""
    at: int = -1
    times: int = 1
    folder: str = ""
    slow_s: float = 0.0

    def __call__(self, opened: "Trouble | None") -> "Trouble":
        if self.trouble == "start":
            raise ValueError("no such device")
        return Trouble(self)


class Trouble:
    """Gets into ``trouble`` at the shard whose first request has prompt ``[at]``, ``times`` times in all actors."""

    def __init__(self, make: Make) -> None:
        self.make = make

    def generate(self, requests: Sequence[SampleRequest]) -> list[GeneratedText]:
        time.sleep(self.make.slow_s)
        if list(requests[0].prompt_ids) == [self.make.at] and self._is_my_turn():
            if self.make.trouble == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"input": InputError("prompt 0 is too long"), "bug": KeyError("no block")}[self.make.trouble]
        return [plain_text(request, self.make.texts) for request in requests]

    def facts(self) -> dict[str, str]:
        return {"source": "scripted"}

    def _is_my_turn(self) -> bool:
        for number in range(self.make.times):
            try:
                os.close(os.open(f"{self.make.folder}/{number}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            return True
        return False
