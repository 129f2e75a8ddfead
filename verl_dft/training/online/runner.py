"""verl's task runner under a watchdog. In a module of its own: Ray sends a class of ``__main__`` by value."""

from omegaconf import DictConfig
from verl.trainer.main_ppo import TaskRunnerV1

from verl_dft.training.online.trainer import OnlineTrainer
from verl_dft.training.online.watchdog import Watchdog


class Runner(TaskRunnerV1.__ray_metadata__.modified_class):
    """Runs in the process that drives the training, a Ray actor."""

    def run(self, config: DictConfig) -> None:
        with Watchdog(config.limits) as watchdog:
            OnlineTrainer.watchdog = watchdog
            with watchdog.phase("start"):
                super().run(config)

    def init_agent_loop_manager(self) -> None:
        super().init_agent_loop_manager()
        OnlineTrainer.watchdog.begun()
