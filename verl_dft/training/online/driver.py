"""The process that starts Ray and verl's PPO trainer: ``python -m verl_dft.training.online.driver CONFIG.yaml``.

``verl-dft rl`` runs it as a child, so that whatever becomes of it, nothing is left behind.
"""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf
from verl.trainer.main_ppo import run_ppo
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl.utils.device import auto_set_device

from verl_dft.errors import InputError
from verl_dft.processes import end_with_parent
from verl_dft.sampling.cluster import loopback_kept
from verl_dft.training.online.runner import Runner
from verl_dft.training.online.trainer import RolloutFailed

BAD_INPUT = 2


def _environment() -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def ray_options(config: DictConfig) -> dict[str, Any]:
    """Arguments of ``ray.init``: ``ray_kwargs.ray_init``, over those of a Ray on this machine, loopback only."""
    given = OmegaConf.to_container(config.ray_kwargs.ray_init, resolve=True)
    given = {key: value for key, value in given.items() if value is not None}
    options: dict[str, Any] = {"include_dashboard": False}
    if not os.environ.get("RAY_ADDRESS") and "address" not in given:
        workers = config.trainer.n_gpus_per_node + _teacher_gpus(config)
        # logical CPUs: verl reserves ten per worker, more than most machines have
        cpus = 11 * workers + config.actor_rollout_ref.rollout.agent.num_workers + config.reward.num_workers + 4
        options |= {"address": "local", "_node_ip_address": "127.0.0.1", "num_cpus": max(cpus, os.cpu_count() or 1)}
        if config.trainer.device == "cpu":
            options |= {"num_gpus": workers, "object_store_memory": 200_000_000}
    return options | given


def _teacher_gpus(config: DictConfig) -> int:
    return config.distillation.n_gpus_per_node * config.distillation.nnodes if config.distillation.enabled else 0


def run(config: DictConfig) -> None:
    """Train with a prepared configuration.

    Raises:
        InputError: what verl's validation or a worker refuses.
    """
    auto_set_device(config)
    try:
        validate_config(
            config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config)
        )
    except (ValueError, AssertionError) as error:
        raise InputError(f"verl refuses the configuration: {' '.join(str(error).split())}") from None
    _environment()
    options = ray_options(config)
    with loopback_kept() if options.get("address") == "local" else nullcontext():
        config.ray_kwargs.ray_init = OmegaConf.create(options)
        try:
            run_ppo(config, task_runner_class=ray.remote(num_cpus=1)(Runner))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError | RolloutFailed):
                raise error.cause from None
            raise
        finally:
            ray.shutdown()


def main(argv: Sequence[str]) -> int:
    """Exit code: 0 done, 1 failed, 2 bad input. SIGTERM and a parent that is gone end it, Ray included."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    end_with_parent(signal.SIGTERM)
    try:
        run(OmegaConf.load(argv[0]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    except RolloutFailed as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
