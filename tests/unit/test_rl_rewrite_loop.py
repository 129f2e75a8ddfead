"""Online rewriting of one problem: verl's agent loop with a scripted generator, the real tokenizer and grader."""

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.rollout.replica import TokenOutput

from verl_dft.data.prompts import find_prompt
from verl_dft.data.records import Problem, write_problems
from verl_dft.errors import InputError
from verl_dft.origins import ORIGINS
from verl_dft.paths import recipes_dir
from verl_dft.training.online.configure import compose_rl
from verl_dft.training.online.loops import ORIGIN, encoder_of
from verl_dft.training.online.prompts import prepare_prompts
from verl_dft.training.online.rewrite_loop import STAGES, RewriteLoop
from verl_dft.training.online.rows import _metrics

QUESTION = "Hal has 3 nuts : a gets 4 . How many ?"
EXPERT = "Note that $ 3 + 4 = 7 $ . Therefore $ \\boxed{ 7 } $ ."
WRONG, WORDLESS = "So we have $ \\boxed{ 8 } $ .", "Note that $ 3 + 4 = 7 $ ."
RIGHT = [f"{word} $ \\boxed{{ 7 }} $ ." for word in ("Now", "Thus", "Clearly", "Hence")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(recipes_dir() / "tiny" / "base")


@lru_cache
def composed(*overrides: str) -> DictConfig:
    """The configuration, composed once for all tests that override the same; nobody writes to it."""
    return compose_rl(["--config-name", "tiny/rl", "algorithm=online_rewrite", "output_dir=/nowhere", *overrides])


class Scripted:
    """Stands where verl's client of the vLLM servers does: answers each stage with its texts, in order."""

    def __init__(self, tokenizer: Any, own: Sequence[str], guided: Sequence[str], cut: Sequence[str]) -> None:
        self.tokenizer, self.texts, self.cut = tokenizer, {"self": list(own), "guided": list(guided)}, cut
        self.calls: list[tuple[str, str, dict[str, Any]]] = []
        """Stage, prompt and sampling parameters of each request."""

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict) -> TokenOutput:
        prompt = self.tokenizer.decode(prompt_ids)
        stage = "guided" if EXPERT in prompt else "self"
        self.calls.append((stage, prompt, sampling_params))
        number = len([call for call in self.calls if call[0] == stage]) - 1
        text = self.texts[stage][number]
        await asyncio.sleep(0.01 * (3 - number % 4))  # later ones are ready first
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if text in self.cut:
            ids = ids[:1] * (sampling_params["max_tokens"] - len(ids)) + ids
        else:
            ids.append(encoder_of(self.tokenizer).end_id)
        return TokenOutput(token_ids=ids, log_probs=[-0.01 * (i + 1) for i in range(len(ids))], num_preempted=0)


Ran = tuple[AgentLoopOutput, Scripted]


@pytest.fixture
def rewrite(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """``rewrite(own, guided, *overrides, …)``: one problem through the loop. What is left of the scripts shows."""
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")

    def run(
        own: Sequence[str],
        guided: Sequence[str] = (),
        *overrides: str,
        cut: Sequence[str] = (),
        solution: str | None = EXPERT,
    ) -> Ran:
        config = composed(*overrides)
        generator = Scripted(tokenizer, own, guided, cut)
        row = {
            "raw_prompt": find_prompt(config.prompt)[1].messages(QUESTION),
            "session_id": 0,
            "global_steps": 3,
            "reward_model": {"ground_truth": "7"},
            "extra_info": {
                "problem_id": "hal",
                "problem": QUESTION,
                "answer_type": "auto",
                "demonstrations": [{"origin": "expert", "text": solution}] if solution else [],
            },
        }

        async def whole() -> AgentLoopOutput:
            loop = RewriteLoop(
                DictConfigWrap(config), generator, tokenizer, None, RLHFDataset, DictConfigWrap(config.data)
            )
            return await loop.run({"temperature": 0.7, "logprobs": True}, **row)

        return asyncio.run(whole()), generator

    return run


def told(done: AgentLoopOutput, tokenizer: Any) -> tuple[str, str, str, int]:
    """Stage, origin, the text that is trained on and how many samples it took."""
    extra = done.extra_fields
    text = tokenizer.decode(done.response_ids, skip_special_tokens=True).strip()
    return STAGES[extra["stage"]], ORIGINS[extra[ORIGIN]], text, extra["sampled"]


def stages(generator: Scripted) -> list[str]:
    return [stage for stage, *_ in generator.calls]


def test_its_own_response_of_the_first_wave(rewrite: Callable[..., Ran], tokenizer: Any) -> None:
    done, generator = rewrite([RIGHT[0], RIGHT[1]])
    assert told(done, tokenizer) == ("self", "self", RIGHT[0], 2) and stages(generator) == ["self"] * 2
    assert done.response_logprobs == pytest.approx([-0.01 * (i + 1) for i in range(len(done.response_ids))])
    assert done.response_ids[-1] == encoder_of(tokenizer).end_id and set(done.response_mask) == {1}
    assert done.extra_fields["sampled_tokens"] > len(done.response_ids) and done.extra_fields["no_verdict"] == 0


def test_the_lowest_right_index_of_a_wave_wins_and_no_wave_follows(rewrite: Callable[..., Ran], tokenizer: Any) -> None:
    """Index 3 is ready before index 2; with all four in one wave the lowest right one wins too."""
    done, generator = rewrite([WRONG, WRONG, RIGHT[2], RIGHT[3]])
    assert told(done, tokenizer) == ("self", "self", RIGHT[2], 4) and stages(generator) == ["self"] * 4
    done, _ = rewrite([WRONG, RIGHT[1], RIGHT[2], RIGHT[3]], (), "rewrite.wave_size=4")
    assert told(done, tokenizer) == ("self", "self", RIGHT[1], 4)
    done, _ = rewrite([WRONG, RIGHT[1]], (), "rewrite.wave_size=1")
    assert told(done, tokenizer) == ("self", "self", RIGHT[1], 2)


def test_a_retelling_answers_the_plain_problem(rewrite: Callable[..., Ran], tokenizer: Any) -> None:
    done, generator = rewrite([WRONG] * 4, [WRONG, RIGHT[1]], "rewrite.guided.temperature=0.5")
    assert told(done, tokenizer) == ("guided", "guided", RIGHT[1], 6)
    assert stages(generator) == ["self"] * 4 + ["guided"] * 2
    trained = tokenizer.decode(done.prompt_ids)
    plain, shown = generator.calls[0], generator.calls[-1]
    assert trained == plain[1] and QUESTION in trained and EXPERT not in trained
    assert EXPERT in shown[1] and QUESTION in shown[1] and "Retell" in shown[1]
    assert {call[2]["temperature"] for call in generator.calls} == {1.0, 0.5}  # not the 0.7 that verl hands over
    assert len({call[2]["seed"] for call in generator.calls}) == 6
    assert not any(done.response_logprobs), "log-probs of another prompt are not the sampler's"


def test_the_experts_text_as_offline_training_has_it(rewrite: Callable[..., Ran], tokenizer: Any) -> None:
    done, generator = rewrite([WRONG, WORDLESS, WRONG, WRONG], [WRONG] * 4)
    assert told(done, tokenizer) == ("fallback", "expert", EXPERT, 8) and len(generator.calls) == 8
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": EXPERT}]
    (tokens,) = encoder_of(tokenizer).encode([turns], lambda _: "")
    assert (done.prompt_ids, done.response_ids) == (list(tokens.prompt), list(tokens.response))


def test_stages(rewrite: Callable[..., Ran], tokenizer: Any) -> None:
    done, generator = rewrite([WRONG] * 4, (), "rewrite.stages=self_only")
    assert told(done, tokenizer)[:2] == ("fallback", "expert") and stages(generator) == ["self"] * 4
    done, generator = rewrite([RIGHT[0], WRONG], (), "rewrite.stages=guided_only")
    assert told(done, tokenizer) == ("self", "expert", EXPERT, 2), "solved, so the expert's text stays"
    done, _ = rewrite([WRONG] * 4, [RIGHT[3], WRONG], "rewrite.stages=guided_only")
    assert told(done, tokenizer) == ("guided", "guided", RIGHT[3], 6)


def test_a_response_that_was_cut_off_is_not_kept(rewrite: Callable[..., Ran], tokenizer: Any) -> None:
    done, _ = rewrite([RIGHT[0], RIGHT[1]], cut=[RIGHT[0]])
    assert told(done, tokenizer) == ("self", "self", RIGHT[1], 2)
    done, _ = rewrite([RIGHT[0], RIGHT[1]], (), "rewrite.keep_truncated=true", cut=[RIGHT[0]])
    assert done.extra_fields["stage"] == 0 and len(done.response_ids) == 96
    assert done.response_ids[-1] != encoder_of(tokenizer).end_id


def test_a_grader_that_times_out_is_counted(
    rewrite: Callable[..., Ran], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real grader with hardly any time, on an answer that its quick rules cannot decide."""
    hard = "So we have $ \\boxed{\\sum_{n=1}^{\\infty} \\frac{1}{n^{3}} + \\int_0^1 x^x dx} $ ."
    limit = "reward.custom_reward_function.reward_kwargs.timeout_s=0.05"
    done, _ = rewrite([hard, RIGHT[0]], (), limit)
    assert told(done, tokenizer) == ("self", "self", RIGHT[0], 2) and done.extra_fields["no_verdict"] == 1


def test_validation_asks_plainly(rewrite: Callable[..., Ran], tokenizer: Any) -> None:
    done, generator = rewrite([WRONG], solution=None)
    assert tokenizer.decode(done.response_ids, skip_special_tokens=True).strip() == WRONG
    assert len(generator.calls) == 1 and generator.calls[0][2]["temperature"] == 0.7
    assert "stage" not in done.extra_fields and ORIGINS[done.extra_fields[ORIGIN]] == "self"


def test_what_a_step_reports() -> None:
    extras = [
        {"stage": 0, "sampled": 2, "sampled_tokens": 30, "no_verdict": 0},
        {"stage": 1, "sampled": 6, "sampled_tokens": 90, "no_verdict": 1},
        {"stage": 2, "sampled": 8, "sampled_tokens": 150, "no_verdict": 2},
        {"stage": 0, "sampled": 4, "sampled_tokens": 50, "no_verdict": 0},
    ]
    origin = torch.tensor([ORIGINS.index(name) for name in ("self", "guided", "expert", "self")])
    found = _metrics(extras, origin, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    shares = {name: found[f"rewrite/{name}_frac"] for name in STAGES}
    assert shares == {"self": 0.5, "guided": 0.25, "fallback": 0.25} and math.isclose(sum(shares.values()), 1)
    assert found["rewrite/sampled"] == 5 and found["rewrite/sampled_tokens"] == 80 and found["rewrite/no_verdict"] == 3
    assert found["rows/self_reward"] == 0.5 and found["rows/guided_reward"] == 1


# ---- before the run ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rewrite.wave_size=0", "rewrite: wave_size=0"),
        ("rewrite.self.n=0", "rewrite: self.n=0"),
        ("rewrite.guided.temperature=-1", "rewrite: guided.temperature=-1"),
        ("rewrite.guided.prompt=raw", "must have {reference} in it"),
        ("distillation.enabled=true", "does not know who wrote a response"),
        ("rewrite.keep_truncated=1", "keep_truncated=1; it must be true or false"),
    ],
)
def test_what_cannot_be_meant(monkeypatch: pytest.MonkeyPatch, override: str, words: str) -> None:
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")
    with pytest.raises(InputError, match=words):
        compose_rl(["--config-name", "tiny/rl", "algorithm=online_rewrite", "output_dir=/nowhere", override])


def prompts(tmp_path: Path, tokenizer: Any, problems: list[Problem], *overrides: str) -> dict[str, Any]:
    write_problems(tmp_path / "given.jsonl", problems)
    data = ["data=files", f"data.train_files={tmp_path / 'given.jsonl'}", f"output_dir={tmp_path / 'run'}"]
    config: DictConfig = compose_rl(
        ["--config-name", "tiny/rl", "algorithm=online_rewrite", *data, "data.train_batch_size=1", *overrides]
    )
    (tmp_path / "run" / "data").mkdir(parents=True, exist_ok=True)
    return prepare_prompts(config, tokenizer, tmp_path / "run" / "data")["train"]


@pytest.mark.slow
def test_problems_that_cannot_be_rewritten_are_left_out_and_counted(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gold that no response can match would send its problem to fallback at every step."""
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")
    problems = [
        Problem("good", QUESTION, "7", EXPERT),
        Problem("braces", QUESTION, "\\frac{7", EXPERT),
        Problem("empty", QUESTION, " ", EXPERT),
        Problem("long", QUESTION, "7", EXPERT + " So we have $ 7 $ ." * 8),
    ]
    assert prompts(tmp_path, tokenizer, problems) == {"without_answer": 1, "gold_not_judged": 1, "kept": 2}
    # the guided prompt of "long" leaves no room for a response in so short a context; without guidance it has room
    short = "actor_rollout_ref.rollout.max_model_len=180"
    again = prompts(tmp_path, tokenizer, problems, short)
    assert again == {"without_answer": 1, "gold_not_judged": 1, "overlong": 1, "kept": 1}
    assert prompts(tmp_path, tokenizer, problems, short, "rewrite.stages=self_only")["kept"] == 2
