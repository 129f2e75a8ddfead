"""Which objectives verl's online trainer can run, and how their options reach it.

verl's ``PolicyLossConfig`` has a fixed list of fields. It is widened here by one, ``objective``, so that an objective's
options are given as ``+actor_rollout_ref.actor.policy_loss.objective.tau=0.5``. verl builds this config in the driver
before it starts Ray, so a wrong name or option ends the run at once.
"""

import dataclasses
import json
from functools import lru_cache
from types import ModuleType
from typing import Any

from verl_dft.errors import InputError
from verl_dft.objectives import Objective, get_objective, list_objectives, objective_target

AVAILABLE = frozenset({"advantage", "old_logp", "behavior_logp", "origin"})
"""Fields of a TokenBatch that a policy loss can fill (see :mod:`verl_dft.training.policy_loss`)."""
ROLLOUT_IS_REFERENCE = frozenset({"iw_sft"})
"""Objectives whose reference may be the rollout policy: its ratio is defined for any policy that wrote the text. For
the others the reference is what training must stay near, and the rollout policy moves."""

_KEY = "actor_rollout_ref.actor.policy_loss"
_WHY = {
    "ref_logp": "log-probs of a frozen reference model",
    "ref_kl": "the logits of the policy and of a reference model",
    "entropy": "the entropy of the policy",
    "ema_logp": "log-probs of an averaged policy",
    "exempt": "the token ids",
}


def missing_fields(name: str, objective: Objective) -> list[str]:
    """What the objective requires and verl does not hand to a policy loss."""
    reference = {"ref_logp"} if name in ROLLOUT_IS_REFERENCE else set()
    return sorted(objective.requires - AVAILABLE - reference)


def online_names() -> list[str]:
    """Names registered as policy losses: of ours, those that can run online; of plugins, all (checked when used)."""
    return [n for n in list_objectives() if not _is_ours(n) or not missing_fields(n, get_objective(n))]


def _is_ours(name: str) -> bool:
    return objective_target(name).startswith("verl_dft.")


def online_objective(name: str, options: dict[str, Any] | None = None) -> Objective:
    """The objective behind ``policy_loss.loss_mode=name`` with the options of ``policy_loss.objective``.

    Raises:
        InputError: no such objective or option, or one that needs what verl's online trainer does not provide.
    """
    return _online_objective(name, json.dumps(options or {}, sort_keys=True))


@lru_cache(maxsize=32)  # asked for at every micro-batch
def _online_objective(name: str, options: str) -> Objective:
    try:
        objective = get_objective(name, **json.loads(options))
    except InputError as error:
        raise InputError(f"{_KEY}.objective (loss_mode={name}): {error}") from None
    if missing := missing_fields(name, objective):
        needs = "; ".join(_WHY.get(field, field) for field in missing)
        given = f" with the options {options}" if options != "{}" else ""
        raise InputError(
            f"{_KEY}.loss_mode={name}{given} cannot run in verl's online trainer: it needs {needs} "
            f"({', '.join(missing)}), and verl hands a policy loss only old log-probs and advantages. "
            f"Online objectives: {', '.join(online_names())}. Train {name} offline: verl-dft train objective={name}"
        )
    return objective


def check_policy_loss(loss_mode: str, options: dict[str, Any] | None) -> None:
    """Refuse what cannot work; modes of verl or of others pass, as long as they are given no options of ours."""
    if loss_mode in list_objectives():
        online_objective(loss_mode, options)
    elif options:
        raise InputError(
            f"{_KEY}.objective holds options of a verl_dft objective, and loss_mode={loss_mode} is none; "
            f"set {_KEY}.loss_mode to one of {', '.join(online_names())}, or remove {_KEY}.objective"
        )


def widen_policy_loss_config(module: ModuleType) -> None:
    """Give ``PolicyLossConfig`` of ``verl.workers.config.actor`` the field ``objective``."""
    original = module.PolicyLossConfig
    assert "objective" not in {f.name for f in dataclasses.fields(original)}, "verl now has a field of this name"

    @dataclasses.dataclass
    class PolicyLossConfig(original):
        __doc__ = original.__doc__
        objective: dict[str, Any] = dataclasses.field(default_factory=dict)

        def __post_init__(self) -> None:
            check_policy_loss(self.loss_mode, self.objective)

    # so that instances are pickled by the name under which every process with this plugin finds the class
    PolicyLossConfig.__module__, PolicyLossConfig.__qualname__ = original.__module__, original.__qualname__
    module.PolicyLossConfig = PolicyLossConfig
