"""The same training under Ray: one driver, one ObjectiveWorker actor per GPU, on verl's Ray SFT trainer."""

import os
import sys
from collections.abc import Sequence

import ray
from omegaconf import DictConfig, OmegaConf
from verl.trainer import sft_trainer_ray
from verl.utils.checkpoint import OrchestrationMode
from verl.utils.device import get_device_name

from verl_dft.errors import InputError
from verl_dft.training.setup import prepare_run
from verl_dft.training.trainer import ObjectiveTrainerMixin, replaced, run_guarded
from verl_dft.training.worker import ObjectiveWorker


class ObjectiveRaySFTTrainer(ObjectiveTrainerMixin, sft_trainer_ray.SFTTrainer):
    """verl's Ray ``SFTTrainer`` with an objective; this process is the driver."""

    verl_module = sft_trainer_ray

    def _build_engine(self) -> None:
        with replaced(sft_trainer_ray, TrainingWorker=ObjectiveWorker):
            super()._build_engine()
        self.training_client.set_loss_fn(self.loss_bridge())

    def _build_dataloader(self) -> None:
        trainer = self.config.trainer
        world = trainer.n_gpus_per_node * trainer.nnodes
        self.build_loaders(world // self.config.engine.ulysses_sequence_parallel_size, dp_rank=None)
        self.set_run_length()
        self.total_training_steps = self._planned_steps()
        self.optimizer_config.total_training_steps = self.total_training_steps
        self.steps_per_epoch = len(self.train_dataloader)
        self.save_freq = self.steps_per_epoch if trainer.save_freq == "after_each_epoch" else trainer.save_freq
        self.test_freq = self.steps_per_epoch if trainer.test_freq == "after_each_epoch" else trainer.test_freq

    def _build_ckpt_handler(self) -> None:
        self.ckpt_handler = self.checkpoints(self.training_client, mode=OrchestrationMode.RAY)


CPUS_PER_WORKER = 10
"""What verl's RayResourcePool reserves per worker (``max_colocate_count``)."""


def ray_options(config: DictConfig) -> dict[str, object]:
    """Arguments of ``ray.init``: the cluster of ``RAY_ADDRESS`` if set, else one on this machine, loopback only."""
    given = OmegaConf.to_container(config.ray_init, resolve=True)
    options: dict[str, object] = {"include_dashboard": False, "log_to_driver": True}
    if not os.environ.get("RAY_ADDRESS") and "address" not in given:
        options |= {"address": "local", "_node_ip_address": "127.0.0.1"}
        if get_device_name() == "cpu":
            # verl schedules workers by GPU: on a CPU these are logical ones. The object store carries batches only.
            workers = config.trainer.n_gpus_per_node
            options |= {"num_gpus": workers, "num_cpus": (CPUS_PER_WORKER + 1) * workers}
            options |= {"object_store_memory": 200_000_000}
    return options | given


def check_resources(config: DictConfig) -> None:
    """Raise :class:`InputError` where the cluster can never hold the workers: verl would wait for ever."""
    workers = config.trainer.n_gpus_per_node * config.trainer.nnodes
    has = ray.cluster_resources()
    for resource, per_worker in (("GPU", 1), ("CPU", CPUS_PER_WORKER)):
        if has.get(resource, 0) < per_worker * workers:
            raise InputError(
                f"the Ray cluster has {has.get(resource, 0):g} {resource}, {workers} workers need "
                f"{per_worker * workers}; lower trainer.n_gpus_per_node or trainer.nnodes, or add nodes"
            )


def run(config: DictConfig) -> None:
    """Train with a prepared configuration; shuts down the Ray that it started."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    started = not ray.is_initialized()
    if started:
        ray.init(**ray_options(config))
    try:
        check_resources(config)
        ObjectiveRaySFTTrainer(config).fit()
    finally:
        if started:
            ray.shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    """The driver: compose, prepare rows, train."""
    return run_guarded(lambda: run(prepare_run(list(sys.argv[1:] if argv is None else argv))))


if __name__ == "__main__":
    sys.exit(main())
