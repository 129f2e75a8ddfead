"""Lets one run of verl's GRPO trainer train with several objectives in turn, each for as many steps.

Starting verl with its vLLM server takes a minute, a step two seconds. verl imports this module in each of its
processes (``VERL_USE_EXTERNAL_MODULES``); it fills verl's own hook for the beginning of a step and changes nothing
else. The loss function it sends to the actor is built as verl builds it, from the actor's config.
"""

import json
import os
from functools import partial
from types import ModuleType
from typing import Any

from verl_dft.platform.hooks import when_imported

VARIABLE = "ONLINE_TURNS"
"""Environment variable with ``[[loss_mode, options], …]`` in JSON, one entry per step."""


def _take_turns(module: ModuleType) -> None:
    def on_step_begin(self: Any) -> None:
        from omegaconf import open_dict
        from verl.utils.config import omega_conf_to_dataclass
        from verl.workers.utils.losses import ppo_loss

        turns = json.loads(os.environ[VARIABLE])
        loss_mode, options = turns[self.global_steps - 1]
        actor = self.config.actor_rollout_ref.actor
        with open_dict(actor.policy_loss) as policy_loss:
            policy_loss.loss_mode, policy_loss.objective = loss_mode, options
        self.actor_rollout_wg.set_loss_fn(partial(ppo_loss, config=omega_conf_to_dataclass(actor)))

    module.PPOTrainerSync.on_step_begin = on_step_begin


if VARIABLE in os.environ:
    when_imported("verl.trainer.ppo.v1.trainer_sync", _take_turns)
