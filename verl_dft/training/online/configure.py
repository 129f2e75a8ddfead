"""A run's configuration: composed, completed for the machine, and checked before Ray is started."""

import os
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_dft.build.group_plan import Composition, parse_composition
from verl_dft.config import blamed, compose, require, split_config_name
from verl_dft.errors import InputError
from verl_dft.training.configure import (
    MAX_AUTO_MICRO_BATCH,
    attention_for,
    check_choice,
    check_loggers,
    choose_hardware,
    world_size,
)
from verl_dft.training.online.failures import one_line
from verl_dft.training.policy_options import check_policy_loss

LOOPS = {"plain": "verl_dft", "group": "verl_dft_group", "rewrite": "verl_dft_rewrite"}
"""What writes the responses -> the name of the agent loop (``loops.py``)."""
TRAINER = "verl_dft"
"""``trainer.v1.trainer_mode`` of our trainer."""
_LIMITS = ("start", "weight_sync", "sample", "update")


@blamed
def compose_rl(argv: Sequence[str]) -> DictConfig:
    """The checked configuration of ``verl-dft rl`` for a command line.

    Raises:
        InputError: whatever cannot work, with the key and what to do.
    """
    name, overrides = split_config_name(argv, "rl")
    choose_hardware()
    config = compose(name, overrides)
    require(config, "model.path", "output_dir")
    complete(config)
    check(config)
    return config


def validate_rl(config: DictConfig) -> None:
    """verl's own validator, which builds its configuration classes: of a run before Ray is started.

    Raises:
        InputError: what verl refuses.
    """
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    try:
        validate_config(
            config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config)
        )
    except (ValueError, AssertionError) as error:
        raise InputError(f"verl refuses the configuration: {one_line(error)}") from None


def composition_of(config: DictConfig) -> Composition | None:
    """Who writes the responses of a group; None where all are the policy's."""
    given = config.group.composition
    return None if given is None else parse_composition(str(given))


def demonstrates(config: DictConfig) -> bool:
    """Whether responses that the policy did not write for the plain problem can be among those trained on."""
    return bool(config.rewrite.enabled or config.group.composition is not None)


def seed_of(config: DictConfig) -> int | None:
    """The seed of the responses; None where vLLM's own order decides."""
    return int(config.seed) if config.seeded_rollouts else None


def complete(config: DictConfig) -> None:
    """Fill in what needs no model or data, in place."""
    with open_dict(config):
        _complete(config)


def _complete(config: DictConfig) -> None:
    config.output_dir = os.path.abspath(config.output_dir)  # a Ray worker's working directory is another
    for model in (config.actor_rollout_ref.model, config.critic.model):
        override = model.get("override_config") or {}
        if override.get("attn_implementation") == "auto":
            override.attn_implementation = attention_for(config.precision)
        if model.use_remove_padding == "auto":
            model.use_remove_padding = str(override.get("attn_implementation")).startswith("flash")
    rollout = config.actor_rollout_ref.rollout
    if rollout.max_model_len is None:
        rollout.max_model_len = config.data.max_prompt_length + config.data.max_response_length + _guided_extra(config)
    if rollout.agent.default_agent_loop == LOOPS["plain"]:
        kind = "rewrite" if config.rewrite.enabled else "group" if config.group.composition is not None else "plain"
        rollout.agent.default_agent_loop = LOOPS[kind]
    _set_micro_batches(config)
    if config.trainer.save_freq == -1:  # verl saves nothing then, not even the last step
        config.trainer.save_freq = 2**31


def _set_micro_batches(config: DictConfig) -> None:
    """Rows per pass where they are ``auto``: verl wants a divisor of the rows that a rank has of an update."""
    actor, rollout, ranks = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, world_size(config)
    rows = actor.ppo_mini_batch_size * rollout.n // ranks
    size = next((size for size in range(min(rows, MAX_AUTO_MICRO_BATCH), 0, -1) if rows % size == 0), 1)
    places = ((actor, "ppo"), (config.critic, "ppo"), (rollout, "log_prob"), (config.actor_rollout_ref.ref, "log_prob"))
    for node, kind in places:
        if node[f"{kind}_micro_batch_size_per_gpu"] == "auto":
            node[f"{kind}_micro_batch_size_per_gpu"] = size


def _guided_extra(config: DictConfig) -> int:
    """Tokens by which a guided prompt, which holds the solution too, can be longer than a plain one."""
    return config.data.max_response_length if config.rewrite.enabled else 0


def check(config: DictConfig) -> None:
    """Raise :class:`InputError` for the first thing about the configuration that cannot work."""
    check_choice(config, "precision", ("fp32", "bf16"))
    check_choice(config, "export.dtype", ("fp32", "bf16", "fp16"))
    check_choice(config, "overlong", ("drop", "error"))
    check_choice(config, "rollout_failure", ("stop", "skip"))
    check_choice(config, "trainer.resume_mode", ("auto", "disable", "resume_path"))
    check_choice(config, "rewrite.stages", ("full", "self_only", "guided_only"))
    check_choice(config, "rewrite.verifier", ("strict", "qwen"))
    check_loggers(config.trainer.logger)
    policy_loss = config.actor_rollout_ref.actor.policy_loss
    check_policy_loss(policy_loss.loss_mode, OmegaConf.to_container(policy_loss.objective, resolve=True))
    if config.data.get("apply_chat_template_kwargs"):
        raise InputError(
            "data.apply_chat_template_kwargs is not read here, where prompts have the tokens of offline training; "
            "change the template itself: actor_rollout_ref.model.custom_chat_template"
        )
    _check_numbers(config)
    _check_batch(config)
    _check_demonstrations(config)
    _check_mix(config)


def _check_numbers(config: DictConfig) -> None:
    if not isinstance(config.seed, int) or config.seed < 0:
        raise InputError(f"seed={config.seed} must be a whole number of at least 0")
    for name in _LIMITS:
        value = config.limits[name]
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise InputError(f"limits.{name}={value} must be a number of seconds above 0, or null for none")
    if not isinstance(config.poll_s, int | float) or config.poll_s <= 0:
        raise InputError(f"poll_s={config.poll_s} must be a number of seconds above 0")


def _check_batch(config: DictConfig) -> None:
    batch, mini = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    n, ranks = config.actor_rollout_ref.rollout.n, world_size(config)
    if mini > batch or batch % mini:
        raise InputError(
            f"data.train_batch_size={batch} is not a multiple of actor_rollout_ref.actor.ppo_mini_batch_size={mini} "
            "(problems per update); change one"
        )
    if (mini * n) % ranks:
        raise InputError(
            f"{mini} problems x {n} responses per update do not split over {ranks} ranks; change "
            "actor_rollout_ref.actor.ppo_mini_batch_size or trainer.n_gpus_per_node"
        )
    actor = config.actor_rollout_ref.actor
    micro = actor.ppo_micro_batch_size_per_gpu
    if not actor.use_dynamic_bsz and micro and (mini * n // ranks) % micro:
        raise InputError(
            f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={micro} does not divide the {mini * n // ranks} rows"
            " that a rank has of an update; use auto, or a divisor"
        )


def _check_demonstrations(config: DictConfig) -> None:
    composition, rollout = composition_of(config), config.actor_rollout_ref.rollout
    if composition is not None and config.rewrite.enabled:
        raise InputError("group.composition and rewrite.enabled are two algorithms; set one")
    if composition is not None:
        if composition.alone:
            raise InputError("group.composition=no_gal trains on expert texts alone: verl-dft train objective=gft")
        if composition.size != rollout.n:
            raise InputError(
                f"group.composition={composition} has {composition.size} responses and actor_rollout_ref.rollout.n="
                f"{rollout.n}; make them equal"
            )
    if config.rewrite.enabled and rollout.n != 1:
        raise InputError(f"actor_rollout_ref.rollout.n={rollout.n}: rewriting keeps one response of a problem; set 1")
    if config.rewrite.enabled:
        from verl_dft.training.online.rewriting import options_of

        options_of(config)
    if not demonstrates(config):
        return
    if config.distillation.enabled:
        raise InputError(
            "distillation.enabled=true: verl's distillation loss does not know who wrote a response; unset "
            "group.composition and rewrite.enabled"
        )
    if config.trainer.v1.trainer_mode != TRAINER:
        raise InputError(f"trainer.v1.trainer_mode={config.trainer.v1.trainer_mode}: demonstrations need {TRAINER}")
    if config.algorithm.rollout_correction.get("bypass_mode"):
        raise InputError(
            "algorithm.rollout_correction.bypass_mode=true takes the sampler's log-probs for the old policy's, and "
            "stored responses have none; set it to false"
        )
    if config.algorithm.adv_estimator == "gae":
        raise InputError("algorithm.adv_estimator=gae fits a critic to the policy's responses; use grpo with groups")


def _check_mix(config: DictConfig) -> None:
    mix, actor = config.mix, config.actor_rollout_ref.actor
    if mix.peak is None:
        return
    for name in ("peak", "valley"):
        value = mix[name]
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"mix.{name}={value} must be a share of the loss, in [0, 1]")
    for name in ("warmup_steps", "decay_steps"):
        value = mix[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InputError(f"mix.{name}={value} must be a whole number of steps, at least 0")
    if config.group.composition is None:
        raise InputError("mix.peak mixes in demonstrations: set group.composition, e.g. 1:0:7")
    if actor.loss_agg_mode != "token-mean":
        raise InputError(
            f"actor_rollout_ref.actor.loss_agg_mode={actor.loss_agg_mode}: mix makes shares of a mean over tokens; "
            "use token-mean"
        )
    if config.algorithm.rollout_correction.get("rollout_is") is not None:
        raise InputError("algorithm.rollout_correction.rollout_is and mix.peak weigh the same tokens; unset one")
