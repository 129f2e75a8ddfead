"""The same training under Ray: one driver, one ObjectiveWorker actor per GPU, on verl's Ray SFT trainer."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import ray
from omegaconf import DictConfig, OmegaConf
from verl.plugin.platform import get_platform
from verl.trainer import sft_trainer_ray
from verl.utils.checkpoint import OrchestrationMode

from verl_dft.errors import InputError
from verl_dft.sampling.cluster import loopback_kept
from verl_dft.training.launch import run_guarded
from verl_dft.training.setup import prepare_run
from verl_dft.training.trainer import ObjectiveTrainerMixin, replaced
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
        workers = config.trainer.n_gpus_per_node
        # logical CPUs: what verl reserves is more than most machines have, and no worker computes on so many
        cpus = max((CPUS_PER_WORKER + 1) * workers, os.cpu_count() or 1)
        options |= {"address": "local", "_node_ip_address": "127.0.0.1", "num_cpus": cpus}
        if config.trainer.device == "cpu":
            # verl schedules workers by GPU: on a CPU these are logical ones. The object store carries batches only.
            options |= {"num_gpus": workers, "object_store_memory": 200_000_000}
    return options | given


def check_resources(config: DictConfig, machines: Sequence[Mapping[str, float]], device: str) -> None:
    """Raise :class:`InputError` where the cluster can never hold the workers: verl would wait for ever.

    Args:
        config: verl asks for ``trainer.nnodes`` groups of ``trainer.n_gpus_per_node`` workers, each group on one
            machine (which may hold several).
        machines: total resources of each machine, by Ray's names.
        device: Ray's name of the accelerator.
    """
    groups, workers = config.trainer.nnodes, config.trainer.n_gpus_per_node
    need = {device: workers, "CPU": CPUS_PER_WORKER * workers}
    room = sum(int(min(has.get(name, 0) // amount for name, amount in need.items())) for has in machines)
    if room < groups:
        found = "; ".join(", ".join(f"{has.get(name, 0):g} {name}" for name in need) for has in machines)
        raise InputError(
            f"{groups} machine(s) with {workers} {device} and {need['CPU']} CPU each are needed (trainer.nnodes, "
            f"trainer.n_gpus_per_node; verl reserves {CPUS_PER_WORKER} CPUs per worker), the Ray cluster has room for "
            f"{room} (its machines: {found}); change these, or start Ray's nodes with a larger --num-cpus"
        )


@contextmanager
def plain_input_errors() -> Iterator[None]:
    """Raise a worker's :class:`InputError` as it was, without Ray's traceback in its message."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise


def run(config: DictConfig) -> None:
    """Train with a prepared configuration; shuts down the Ray that it started."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    started = not ray.is_initialized()
    if started:
        options = ray_options(config)
        with loopback_kept() if options.get("address") == "local" else nullcontext():
            ray.init(**options)
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        check_resources(config, machines, get_platform().ray_resource_name())
        with plain_input_errors():
            ObjectiveRaySFTTrainer(config).fit()
    finally:
        if started:
            ray.shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    """The driver: compose, prepare rows, train."""
    return run_guarded(lambda: run(prepare_run(list(sys.argv[1:] if argv is None else argv))))


if __name__ == "__main__":
    sys.exit(main())
