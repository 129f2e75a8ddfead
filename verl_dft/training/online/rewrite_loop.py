"""Data rewriting while training: the policy's own correct response, else its retelling of the expert's, else that."""

import asyncio
import time
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput

from verl_dft.build.rewrite import RewriteOptions, RewritePlanner, Stage
from verl_dft.data.prompts import find_prompt
from verl_dft.data.records import Problem
from verl_dft.grading.pool import GradeItem, shared_pool
from verl_dft.sampling.ask import Ask, Sampling
from verl_dft.sampling.record import Sample
from verl_dft.training.online.loops import GroupLoop, demonstrations, encoder_of

STAGES = ("self", "guided", "fallback")
"""``extra_fields["stage"]`` of a row, as a number: which stage decided."""


class RewriteLoop(GroupLoop):
    """One row of a problem. Validation asks the policy plainly."""

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        shown = demonstrations(row)
        if not shown:
            return await self.sampled(sampling_params, row)
        problem = _problem(row, shown[0]["text"])
        planner = RewritePlanner([problem], options_of(self.config), {})
        spent, begun, taken = 0, time.perf_counter(), 0
        while (wave := planner.next_wave()) is not None:
            samples = await self._wave(wave.asks, sampling_params, row)
            planner.tell(samples)
            spent, taken = spent + sum(sample.num_tokens for sample in samples), taken + len(samples)
        (outcome,) = planner.outcomes()
        extra = {
            "stage": STAGES.index(outcome.stage),
            "sampled": taken,
            "sampled_tokens": spent,
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
        outputs = await asyncio.gather(*(self._sample(ask, sampling_params, row) for ask in asks))
        ends, length = encoder_of(self.tokenizer).end_ids, self.rollout_config.response_length
        texts = [self.tokenizer.decode(output.token_ids, skip_special_tokens=True) for output in outputs]
        answer_type = row["extra_info"]["answer_type"]
        items = [GradeItem(text, ask.gold, answer_type) for ask, text in zip(asks, texts, strict=True)]
        kwargs = self.config.reward.custom_reward_function.reward_kwargs
        pool = shared_pool(kwargs.get("num_workers"), kwargs.get("timeout_s", 10.0), kwargs.get("memory_mb", 2048))
        grades = await asyncio.get_running_loop().run_in_executor(None, pool.grade, items)
        samples = []
        for ask, output, text, grade in zip(asks, outputs, texts, grades, strict=True):
            cut = len(output.token_ids) >= length and output.token_ids[-1] not in ends
            samples.append(
                Sample(
                    problem_id=ask.problem_id,
                    index=ask.index,
                    response=text,
                    finish_reason="length" if cut else "stop",
                    grade=grade.verdict,
                    qwen=grade.qwen,
                    token_ids=list(output.token_ids),
                    num_tokens=len(output.token_ids),
                    logp=output.log_probs,
                )
            )
        return samples

    async def _sample(self, ask: Ask, sampling_params: dict[str, Any], row: dict[str, Any]) -> Any:
        own = {"temperature": ask.sampling.temperature, "top_p": ask.sampling.top_p}
        params = {**sampling_params, **own}
        return await self.generate(row, self.prompt_ids(ask.messages), params, ask.stream, ask.index)


def _problem(row: dict[str, Any], solution: str) -> Problem:
    extra = row["extra_info"]
    return Problem(extra["problem_id"], extra["problem"], str(row["reward_model"]["ground_truth"]), solution)


def options_of(config: Any) -> RewriteOptions:
    """The planner's options of a run's ``rewrite`` keys; the plain prompt is the run's."""
    rewrite = config.rewrite

    def stage(name: str, given: Any, prompt: str) -> Stage:
        prompt_name, found = find_prompt(prompt)
        sampling = Sampling(given.temperature, given.top_p, 0, config.data.max_response_length)
        return Stage(name, given.n, sampling, prompt_name, found, rewrite.verifier, rewrite.keep_truncated)

    return RewriteOptions(
        stage("self", rewrite.self, config.prompt),
        stage("guided", rewrite.guided, rewrite.guided.prompt),
        stages=rewrite.stages,
        wave_size=rewrite.wave_size,
        seed=config.seed,
    )
