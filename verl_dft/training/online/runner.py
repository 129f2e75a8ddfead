"""verl's task runner under a watchdog. In a module of its own: Ray sends a class of ``__main__`` by value."""

import os
import time
from pathlib import Path

import ray
from omegaconf import DictConfig
from verl.plugin.platform import get_platform
from verl.trainer.main_ppo import TaskRunnerV1

from verl_dft.training.online import health
from verl_dft.training.online.failures import RolloutFailed, advice, leave_reason, place
from verl_dft.training.online.ray_errors import failure, root_cause
from verl_dft.training.online.room import check_room
from verl_dft.training.online.trainer import OnlineTrainer
from verl_dft.training.online.watchdog import Watchdog

_TOLD_S = 3.0
"""How long Ray may take to note the death that an error came of."""


class Runner(TaskRunnerV1.__ray_metadata__.modified_class):
    """Runs in the process that drives the training, a Ray actor."""

    def run(self, config: DictConfig) -> None:
        """Train.

        Raises:
            InputError: bad input, the cluster's size included.
            RunFailed: anything else.
        """
        with Watchdog(config.limits, lambda reason: self._give_up(config, reason), health.trouble) as watchdog:
            OnlineTrainer.watchdog = watchdog
            try:
                check_room(
                    config, [n["Resources"] for n in ray.nodes() if n["Alive"]], get_platform().ray_resource_name()
                )
                with watchdog.phase("start"):
                    super().run(config)
            except Exception as error:
                go_on = advice(config.trainer.default_local_dir)
                raise failure(error, _died_of(error), self._step(), watchdog.failed_in, go_on) from error

    def init_agent_loop_manager(self) -> None:
        super().init_agent_loop_manager()
        OnlineTrainer.watchdog.begun()

    def _step(self) -> int:
        return getattr(self.trainer, "global_steps", 0)

    def _give_up(self, config: DictConfig, reason: str) -> None:
        """Called by the watchdog: the trainer's thread hangs and cannot raise."""
        where = place(self._step(), OnlineTrainer.watchdog.doing)
        leave_reason(Path(config.output_dir), f"{reason} {where}; {advice(config.trainer.default_local_dir)}")
        os._exit(1)


def _died_of(error: BaseException) -> str | None:
    """What has died, where an error may have come of that."""
    cause = root_cause(error)
    patience = _TOLD_S if isinstance(cause, ray.exceptions.RayActorError | RolloutFailed) else 0.0
    deadline = time.monotonic() + patience
    while (died := health.trouble()) is None and time.monotonic() < deadline:
        time.sleep(0.5)
    return died
