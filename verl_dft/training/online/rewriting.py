"""Online data rewriting before it starts: the planner's options, and which problems it cannot be used on."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_dft.build.rewrite import RewriteOptions, asks_of
from verl_dft.build.rewrite_command import rewrite_options
from verl_dft.data.records import Problem
from verl_dft.data.template import ConversationEncoder
from verl_dft.errors import InputError


def options_of(config: DictConfig) -> RewriteOptions:
    """The planner's options of a run's ``rewrite`` keys, those of ``verl-dft rewrite``; the plain prompt is the run's.

    Raises:
        InputError: a value out of its range, or a prompt that cannot be used where it is.
    """
    given = OmegaConf.to_container(config.rewrite, resolve=True)
    same = {"verifier": given["verifier"], "top_k": 0, "max_tokens": config.data.max_response_length}
    stages = {
        "self": {**given["self"], **same, "prompt": config.prompt},
        "guided": {**given["guided"], **same},
    }
    fixed = {"online": False, "early_stop": True, "want_logp": True, "missing_solution": "refuse"}
    try:
        return rewrite_options({**given, **stages, **fixed, "prompt": config.prompt, "seed": config.seed})
    except InputError as error:
        raise InputError(f"rewrite: {error}") from None


def grading_of(config: DictConfig) -> dict[str, Any]:
    """Options of the grader pool, which are those of the reward."""
    given = config.reward.custom_reward_function.reward_kwargs
    return {
        "num_workers": given.get("num_workers"),
        "timeout_s": given.get("timeout_s", 10.0),
        "memory_mb": given.get("memory_mb", 2048),
    }


def unjudged(problems: Sequence[Problem], config: DictConfig) -> set[str]:
    """Ids of problems with a gold that no response can be judged against: each would always fall back."""
    from verl_dft.build.rewrite_gold import unusable_golds

    return set(unusable_golds(problems, grading_of(config)))


def overlong_when_guided(problems: Sequence[Problem], encoder: ConversationEncoder, config: DictConfig) -> set[int]:
    """Indices of problems whose guided prompt leaves no room for a whole response in ``rollout.max_model_len``."""
    options = options_of(config)
    if options.guided_stage not in options.sampled_stages():
        return set()
    turns = [asks_of(problem, options.guided_stage, range(1))[0].messages for problem in problems]
    prompts = encoder.encode_prompts(turns, lambda i: f"problem {problems[i].id!r} with its solution")
    room = config.actor_rollout_ref.rollout.max_model_len - config.data.max_response_length
    return {i for i, ids in enumerate(prompts) if len(ids) > room}
