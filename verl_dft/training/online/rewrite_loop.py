"""Data rewriting while training: the policy's own correct response, else its retelling of the expert's, else that."""

import asyncio
import time
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput

from verl_dft.build.rewrite import RewritePlanner
from verl_dft.data.records import Problem
from verl_dft.grading.pool import GradeItem, shared_pool
from verl_dft.sampling.ask import Ask
from verl_dft.sampling.record import Sample
from verl_dft.training.online.loops import GroupLoop, demonstrations, encoder_of
from verl_dft.training.online.rewriting import grading_of, options_of

STAGES = ("self", "guided", "fallback")
"""``extra_fields["stage"]`` of a row, as a number: which stage decided."""
UNGRADED = ("timeout", "error")
"""Verdicts of the grader that say nothing about the response; such a sample is not kept."""


class RewriteLoop(GroupLoop):
    """One row of a problem. Validation asks the policy plainly."""

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        shown = demonstrations(row)
        if not shown:
            return await self.sampled(sampling_params, row)
        problem = _problem(row, shown[0]["text"])
        planner, begun = RewritePlanner([problem], options_of(self.config)), time.perf_counter()
        while (wave := planner.next_wave()) is not None:
            planner.tell(await self._wave(wave.asks, sampling_params, row))
        (outcome,) = planner.outcomes()
        drawn = [sample for _, samples in planner.history for sample in samples]
        extra = {
            "stage": STAGES.index(outcome.stage),
            "sampled": len(drawn),
            "sampled_tokens": sum(sample.num_tokens for sample in drawn),
            "no_verdict": sum(sample.grade in UNGRADED for sample in drawn),
            "metrics": {"generate_sequences": time.perf_counter() - begun},
        }
        if outcome.origin == "expert":
            return self.stored("expert", shown[0]["text"], row, **extra)
        kept = outcome.kept
        assert kept is not None and kept.token_ids is not None
        logp = kept.logp if outcome.origin == "self" else None  # a guided one's are of another prompt
        return self.answer(outcome.origin, self.prompt_ids(row["raw_prompt"]), kept.token_ids, row, logp=logp, **extra)

    async def _wave(self, asks: list[Ask], sampling_params: dict[str, Any], row: dict[str, Any]) -> list[Sample]:
        """The graded samples of a wave, in the order of its asks."""
        prompts = [self.prompt_ids(ask.messages) for ask in asks]
        outputs = await asyncio.gather(
            *(self._sample(ask, ids, sampling_params, row) for ask, ids in zip(asks, prompts, strict=True))
        )
        texts = [self.tokenizer.decode(output.token_ids, skip_special_tokens=True) for output in outputs]
        answer_type = row["extra_info"]["answer_type"]
        items = [GradeItem(text, ask.gold, answer_type) for ask, text in zip(asks, texts, strict=True)]
        pool = shared_pool(**grading_of(self.config))
        grades = await asyncio.get_running_loop().run_in_executor(None, pool.grade, items)
        return [
            Sample(
                problem_id=ask.problem_id,
                index=ask.index,
                response=text,
                finish_reason="length" if self._cut(output.token_ids, ids) else "stop",
                grade=grade.verdict,
                qwen=grade.qwen,
                token_ids=list(output.token_ids),
                num_tokens=len(output.token_ids),
                logp=output.log_probs,
            )
            for ask, ids, output, text, grade in zip(asks, prompts, outputs, texts, grades, strict=True)
        ]

    def _cut(self, response: list[int], prompt: list[int]) -> bool:
        """Whether a response was cut off: verl's servers do not tell."""
        room = min(self.rollout_config.response_length, self.rollout_config.max_model_len - len(prompt))
        return len(response) >= room and response[-1] not in encoder_of(self.tokenizer).end_ids

    async def _sample(self, ask: Ask, prompt: list[int], sampling_params: dict[str, Any], row: dict[str, Any]) -> Any:
        own = {"temperature": ask.sampling.temperature, "top_p": ask.sampling.top_p}
        return await self.generate(row, prompt, {**sampling_params, **own}, ask.stream, ask.index)


def _problem(row: dict[str, Any], solution: str) -> Problem:
    extra = row["extra_info"]
    return Problem(extra["problem_id"], extra["problem"], str(row["reward_model"]["ground_truth"]), solution)
