"""Seeds of responses, and stored responses as the rows of a group: the tokens of offline training."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, open_dict
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.rollout.replica import TokenOutput

from verl_dft.data.dataset import load_dataset
from verl_dft.data.records import Row, write_rows
from verl_dft.origins import ORIGINS
from verl_dft.paths import recipes_dir
from verl_dft.training.online.configure import compose_rl
from verl_dft.training.online.loops import ORIGIN, GroupLoop, response_seed

PROMPT = [{"role": "user", "content": "What is 1 + 2 ?"}]
TEXTS = [("expert", "1 + 2 = 3\nso 3"), ("teacher", " it is 3 \n"), ("teacher", "no <|im_end|> here"), ("teacher", "3")]


@pytest.fixture(scope="module")
def config() -> DictConfig:
    return compose_rl(["--config-name", "tiny/rl", "algorithm=gft", "output_dir=unused"])


@pytest.fixture(scope="module")
def loop(config: DictConfig) -> GroupLoop:
    """verl's agent loop with the tiny world's tokenizer; stored responses need no server."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recipes_dir() / "tiny" / "base")
    wrap = DictConfigWrap(config)
    return GroupLoop(wrap, None, tokenizer, None, RLHFDataset, DictConfigWrap(config.data))


def row(**changes: Any) -> dict[str, Any]:
    shown = [{"origin": origin, "text": text} for origin, text in TEXTS]
    given = {"session_id": 0, "global_steps": 5, "extra_info": {"problem_id": "p", "demonstrations": shown}}
    return {"raw_prompt": PROMPT, **given, **changes}


def ran(loop: GroupLoop, **changes: Any) -> AgentLoopOutput:
    return asyncio.run(loop.run({"temperature": 1.0}, **row(**changes)))


def test_stored_responses_have_the_tokens_of_offline_training(loop: GroupLoop, tmp_path: Path) -> None:
    messages = [[*PROMPT, {"role": "assistant", "content": text}] for _, text in TEXTS]
    write_rows(tmp_path / "rows.parquet", [Row(m, f"p{i}", "expert") for i, m in enumerate(messages)])
    dataset = load_dataset(tmp_path / "rows.parquet", loop.tokenizer, max_length=256, cache_dir=tmp_path)
    assert len(dataset) == len(TEXTS)
    for number, (origin, _) in enumerate(TEXTS):
        item, made = dataset[number], ran(loop, session_id=number)
        trained = item["loss_mask"].bool()
        assert made.prompt_ids == item["input_ids"][~trained].tolist() == loop.prompt_ids(PROMPT)
        assert made.response_ids == item["input_ids"][trained].tolist()
        assert made.response_ids[-1] == loop.tokenizer.eos_token_id not in made.response_ids[:-1]
        assert made.response_mask == [1] * len(made.response_ids) and len(made.response_logprobs) == len(
            made.response_ids
        )
        assert made.extra_fields[ORIGIN] == ORIGINS.index(origin)
        assert made.extra_fields["min_global_steps"] == made.extra_fields["max_global_steps"] == 4


def test_a_stored_response_is_never_cut(loop: GroupLoop) -> None:
    """The prompts leave longer ones out (``test_rl_prompts.py``); here they are a bug."""
    most = loop.rollout_config.response_length
    assert len(ran(loop, extra_info=one_text(" 1" * (most - 1))).response_ids) == most
    with pytest.raises(AssertionError, match=rf"'p': a response of {most + 1} tokens \(expert\).*={most}"):
        ran(loop, extra_info=one_text(" 1" * most))


def one_text(text: str) -> dict[str, Any]:
    return {"problem_id": "p", "demonstrations": [{"origin": "expert", "text": text}]}


def test_log_probs_that_the_sampler_did_not_tell(loop: GroupLoop) -> None:
    """verl wants a number where others have one, and no column where nobody has one: zeros would mean certainty."""
    assert set(ran(loop).response_logprobs) == {0.0}
    sampled = loop.answer("self", [1], [5, 2], row(), logp=[-0.5, -0.25], output=TokenOutput(token_ids=[5, 2]))
    assert sampled.response_logprobs == [-0.5, -0.25] and sampled.extra_fields[ORIGIN] == ORIGINS.index("self")
    with open_dict(loop.rollout_config):
        loop.rollout_config.calculate_log_probs = False
    try:
        assert "rollout_log_probs" not in ran(loop).as_dict()
        assert "rollout_log_probs" not in loop.answer("self", [1], [5, 2], row(), logp=None).as_dict()
    finally:
        loop.rollout_config.calculate_log_probs = True


def test_seeds_differ_in_every_part_and_are_always_the_same() -> None:
    assert response_seed(1, 2, "p", 3) == 7811746490309236602  # in any process, on any machine
    parts = [(1, 2, "p", 3), (2, 2, "p", 3), (1, 3, "p", 3), (1, 2, "q", 3), (1, 2, "p", 4), (1, 2, "p", "3", 0)]
    parts += [(12, 3, "p", 3), (1, 23, "p", 3), (1, 2, "p", 33), (1, 2, "p")]
    seeds = [response_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
