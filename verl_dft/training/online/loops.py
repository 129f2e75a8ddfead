"""What writes the responses of a group: verl's agent loops, run for each of a problem's ``rollout.n`` responses.

``verl_dft`` samples every response with a seed of its own; ``verl_dft_group`` gives the first ones of a group the
problem's demonstrations instead of asking the model, with the tokens that offline training gives them.
``AgentLoopOutput.extra_fields["origin"]`` says who wrote a response (an index into ``ORIGINS``).
"""

import hashlib
from functools import lru_cache
from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput
from verl.utils.profiler import simple_timer
from verl.workers.rollout.replica import TokenOutput

from verl_dft.data.template import ConversationEncoder
from verl_dft.origins import ORIGINS
from verl_dft.training.online.configure import seed_of
from verl_dft.training.policy_rows import ORIGIN

_UNKNOWN = 0.0
"""In ``response_logprobs`` of text that the policy did not write: verl wants a number (see ``rows.py``)."""


def response_seed(seed: int, step: int, problem_id: str, *parts: Any) -> int:
    """A seed in [0, 2**63) that is a hash of all arguments: the same in any process and with any number of servers."""
    text = "\x1f".join(map(str, (seed, step, problem_id, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@lru_cache(maxsize=2)
def encoder_of(tokenizer: Any) -> ConversationEncoder:
    """The encoder of a worker's tokenizer; a loop is made anew for every response."""
    return ConversationEncoder(tokenizer)


class SeededLoop(AgentLoopBase):
    """One response to the prompt, sampled by the policy."""

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """``row``: the columns of the problem, ``session_id`` (number in the group) and ``global_steps``."""
        return await self.sampled(sampling_params, row)

    def prompt_ids(self, messages: Any) -> list[int]:
        """Ids of the prompt, as in offline training."""
        turns = [dict(message) for message in messages]
        return encoder_of(self.tokenizer).encode_prompts([turns], lambda _: "prompt")[0]

    async def generate(
        self, row: dict[str, Any], prompt: list[int], sampling_params: dict[str, Any], *stream: Any
    ) -> TokenOutput:
        """The policy's continuation of ``prompt``; ``stream`` tells samples of one problem and step apart."""
        params = {**sampling_params, "max_tokens": self.rollout_config.response_length}
        if (seed := seed_of(self.config)) is not None:
            params["seed"] = response_seed(seed, row["global_steps"], row["extra_info"]["problem_id"], *stream)
        output = await self.server_manager.generate(request_id=uuid4().hex, prompt_ids=prompt, sampling_params=params)
        if output.stop_reason == "aborted" or not output.token_ids:  # the group then counts as failed
            raise RuntimeError(f"vLLM gave up a response to problem {row['extra_info']['problem_id']!r}")
        return output

    async def sampled(self, sampling_params: dict[str, Any], row: dict[str, Any]) -> AgentLoopOutput:
        """A response of the policy to the row's own prompt."""
        prompt, times = self.prompt_ids(row["raw_prompt"]), {}
        with simple_timer("generate_sequences", times):
            output = await self.generate(row, prompt, sampling_params, row["session_id"])
        return self.answer("self", prompt, output.token_ids, row, logp=output.log_probs, metrics=times, output=output)

    def answer(
        self,
        origin: str,
        prompt: list[int],
        response: list[int],
        row: dict[str, Any],
        *,
        logp: list[float] | None = None,
        metrics: dict[str, Any] | None = None,
        output: TokenOutput | None = None,
        **extra: Any,
    ) -> AgentLoopOutput:
        """A response as verl wants it; all of its tokens are trained on.

        Args:
            logp: of the sampler under this very prompt; None where there is none (of a run with
                ``calculate_log_probs=false``, of any row: the batch has no such column then).
        """
        length = self.rollout_config.response_length
        assert 0 < len(response) <= length, (
            f"problem {row['extra_info']['problem_id']!r}: a response of {len(response)} tokens ({origin}), and "
            f"rollout.response_length={length}"  # prompts.py has left longer ones out, and the sampler stops there
        )
        if logp is None and self.rollout_config.calculate_log_probs:
            logp = [_UNKNOWN] * len(response)
        # of text that was not sampled in this step the version is that of the weights that it is shown to
        version = {"min_global_steps": row["global_steps"] - 1, "max_global_steps": row["global_steps"] - 1}
        fields = {**version, **(output.extra_fields if output else {}), ORIGIN: ORIGINS.index(origin), **extra}
        preempted = output.num_preempted if output and output.num_preempted is not None else -1
        return AgentLoopOutput(
            prompt_ids=prompt,
            response_ids=response,
            response_mask=[1] * len(response),
            response_logprobs=logp,
            num_turns=2,
            metrics={"num_preempted": preempted, **(metrics or {})},
            extra_fields={**fields, "turn_scores": [], "tool_rewards": []},
        )


class GroupLoop(SeededLoop):
    """The problem's demonstrations first, then responses of the policy."""

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        shown = demonstrations(row)
        number = row["session_id"]
        if number >= len(shown):
            return await self.sampled(sampling_params, row)
        return self.stored(shown[number]["origin"], shown[number]["text"], row)

    def stored(self, origin: str, text: str, row: dict[str, Any], **extra: Any) -> AgentLoopOutput:
        """A stored text as the answer to the row's own prompt, end token included."""
        turns = [*(dict(message) for message in row["raw_prompt"]), {"role": "assistant", "content": text}]
        tokens = encoder_of(self.tokenizer).encode([turns], lambda _: f"problem {row['extra_info']['problem_id']!r}")[0]
        return self.answer(origin, tokens.prompt, tokens.response, row, **extra)


def demonstrations(row: dict[str, Any]) -> list[dict[str, str]]:
    """The row's stored responses; none in validation, whose rows have no such column."""
    return list(row["extra_info"].get("demonstrations") or [])
