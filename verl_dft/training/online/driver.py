"""The process that starts Ray and verl's PPO trainer: ``python -m verl_dft.training.online.driver CONFIG.yaml PARENT``.

``verl-dft rl`` runs it as a child, so that whatever becomes of it, nothing is left behind.
"""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf
from verl.trainer.main_ppo import run_ppo
from verl.utils.device import auto_set_device

from verl_dft.errors import InputError
from verl_dft.processes import end_with_parent
from verl_dft.sampling.cluster import loopback_kept
from verl_dft.training.online.configure import validate_rl
from verl_dft.training.online.failures import (
    RunFailed,
    advice,
    forget_reason,
    last_step,
    left_reason,
    one_line,
)
from verl_dft.training.online.ray_errors import root_cause
from verl_dft.training.online.remains import Remains
from verl_dft.training.online.runner import Runner

BAD_INPUT = 2
ENDED = 128 + signal.SIGTERM
"""Exit code after SIGTERM."""


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
        RunFailed: the run has failed; a traceback that is wanted has been printed.
    """
    auto_set_device(config)
    validate_rl(config)
    _environment()
    options = ray_options(config)
    with loopback_kept() if options.get("address") == "local" else nullcontext():
        config.ray_kwargs.ray_init = OmegaConf.create(options)
        try:
            run_ppo(config, task_runner_class=ray.remote(num_cpus=1)(Runner))
        except ray.exceptions.RayError as error:
            raise _told(error, config) from None
        except ConnectionError as error:
            where = options.get("address") or os.environ.get("RAY_ADDRESS")
            if where == "local":
                raise
            raise InputError(
                f"no Ray cluster answers at {where} ({one_line(error)}); start it, or unset RAY_ADDRESS and "
                "ray_kwargs.ray_init.address"
            ) from None
        finally:
            ray.shutdown()


def _told(error: ray.exceptions.RayError, config: DictConfig) -> Exception:
    """The one line that an error of the trainer's process comes to."""
    cause = root_cause(error)
    if isinstance(cause, InputError):
        return cause
    if isinstance(cause, RunFailed):
        if not cause.shown:
            print(error, file=sys.stderr, flush=True)
        return cause
    output, go_on = Path(config.output_dir), advice(config.trainer.default_local_dir)
    if (reason := left_reason(output)) is not None:
        return RunFailed(reason)
    if isinstance(cause, ray.exceptions.RayActorError):
        how = "killed, crashed, or ended by the system because memory ran out"
        return RunFailed(f"the trainer's process has died {last_step(output)} ({how}); {go_on}")
    print(error, file=sys.stderr, flush=True)
    return RunFailed(f"{type(cause).__name__}: {one_line(cause)} {last_step(output)}; {go_on}")


def main(argv: Sequence[str]) -> int:
    """Train with the configuration in the file ``argv[0]``, a child of process ``argv[1]``.

    Returns:
        0 done, 1 failed, 2 bad input; 1 and 2 with a line that says why. SIGTERM, and a parent that is gone, end it.
    """
    signal.signal(signal.SIGTERM, _end)
    end_with_parent(signal.SIGTERM)
    if os.getppid() != int(argv[1]):
        return 1
    remains = Remains()
    try:
        return _run_told(OmegaConf.load(argv[0]))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        remains.end()


def _run_told(config: DictConfig) -> int:
    forget_reason(Path(config.output_dir))
    try:
        run(config)
    except InputError as error:
        told, code = str(error), BAD_INPUT
    except RunFailed as error:
        told, code = str(error), 1
    except Exception as error:
        traceback.print_exc()
        told, code = f"{type(error).__name__}: {one_line(error)} (its traceback is above)", 1
    else:
        return 0
    print(f"error: {told}", file=sys.stderr, flush=True)
    return code


def _end(*_: object) -> None:
    """Ray's own handler, which comes in its place later, does the same."""
    sys.exit(ENDED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
