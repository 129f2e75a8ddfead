"""``verl-dft rl``: prepare, then run the driver as a child, and leave nothing behind however that ends."""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_dft.files import atomic_write, scratch_folder
from verl_dft.platform.compat import check_verl_version
from verl_dft.platform.temporary import RUN_FOLDER, temporaries_in
from verl_dft.training.configure import world_size
from verl_dft.training.online.configure import compose_rl
from verl_dft.training.online.progress import LOG_FILE, Progress
from verl_dft.training.online.prompts import prepare_prompts
from verl_dft.training.online.supervise import supervise
from verl_dft.training.online.teachers import check_teachers
from verl_dft.training.only_one import only_run
from verl_dft.training.resume import resume_point
from verl_dft.training.setup import as_recorded, check_output, tokenizer_of

_FREE_KEYS = ("limits", "poll_s", "verbose", "rollout_failure", "ray_kwargs", "reward.num_workers")
"""May differ between a run and its continuation, besides those of ``verl-dft train``."""


def main(argv: Sequence[str]) -> int:
    """Run an online training. Returns 0 done, 1 failed, 2 bad input that the driver found; it has said why.

    Raises:
        InputError: bad input found before Ray is started.
    """
    check_verl_version()
    config = compose_rl(argv)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with only_run(output, "rl") as lock, scratch_folder(RUN_FOLDER) as folder:
        path = prepare(config, output)
        command = [sys.executable, "-m", "verl_dft.training.online.driver", str(path), str(os.getpid())]
        log = None if config.verbose else output / LOG_FILE
        if log:
            print(f"starting Ray, verl and vLLM; what they print is in {_shown(log)}", file=sys.stderr, flush=True)
        begun = _step_of(config)
        with Progress(output, config.trainer.total_training_steps, begun) if log else nullcontext():
            env = environment(config) | temporaries_in(folder)
            code = supervise(command, env, output, config.trainer.default_local_dir, [lock], log)
        if code == 0:
            print(f"trained; the model is in {_shown(output / 'model')}", file=sys.stderr, flush=True)
        return code


def _shown(path: Path) -> Path:
    """As a user would name it: from here, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def prepare(config: DictConfig, output: Path) -> Path:
    """Claim the folder, make the prompts, choose the checkpoint. Returns the file with the driver's configuration."""
    check_output(config, output, _FREE_KEYS)
    as_given = as_recorded(config)
    point = resume_point(
        config.trainer.default_local_dir,
        mode=config.trainer.resume_mode,
        given=config.trainer.resume_from_path,
        world_size=world_size(config),
        thorough=True,  # verl's workers load it as it is
    )
    tokenizer = tokenizer_of(config.actor_rollout_ref.model)
    check_teachers(config, tokenizer)
    report = prepare_prompts(config, tokenizer, output / "data")
    for part, counts in report.items():
        if counts:
            print(
                f"{part}: {', '.join(f'{key} {count}' for key, count in counts.items())}", file=sys.stderr, flush=True
            )
    with atomic_write(output / "config.yaml") as file:  # the input was good: the directory is this run's now
        file.write(as_given)
    config.trainer.resume_mode = "resume_path" if point else "disable"
    config.trainer.resume_from_path = str(point.path) if point else None
    driver = output / "data" / "driver.yaml"
    with atomic_write(driver) as file:
        file.write(OmegaConf.to_yaml(config, resolve=True))
    return driver


def _step_of(config: DictConfig) -> int:
    """The step after which the run goes on; 0 for a new one."""
    path = config.trainer.resume_from_path
    return int(path.rpartition("_")[2]) if config.trainer.resume_mode == "resume_path" else 0


def environment(config: DictConfig) -> dict[str, str]:
    """What the driver and its workers find in their environment besides this process's."""
    found = {"TENSORBOARD_DIR": str(Path(config.output_dir) / "tensorboard"), "WANDB_DIR": config.output_dir}
    if config.trainer.device == "cpu":
        # a KV cache of 1 GiB, and no binding to cores, which other workers need
        found |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {name: os.environ.get(name, value) for name, value in found.items()}
