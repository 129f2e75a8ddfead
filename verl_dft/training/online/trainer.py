"""verl's synchronous PPO trainer with demonstrations, ordered rows, limits, marked checkpoints and our export."""

import numbers
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig, open_dict
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.distillation import is_distillation_enabled
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import ActorRolloutRefWorker

from verl_dft.data.turns import trained_with
from verl_dft.failpoints import failpoint
from verl_dft.files import write_json
from verl_dft.training.configure import world_size
from verl_dft.training.export import export_model
from verl_dft.training.metrics import METRICS_FILE, MetricsFile
from verl_dft.training.online import rows
from verl_dft.training.online.configure import TRAINER
from verl_dft.training.online.failures import check_groups
from verl_dft.training.online.mix import mix_rows
from verl_dft.training.online.watchdog import Watchdog
from verl_dft.training.policy_rows import online_loss
from verl_dft.training.resume import MARKER, checkpoint_path, completed_steps, forget_old


class OnlineWorker(ActorRolloutRefWorker):
    """verl's worker of actor, rollout and reference, which can also export the actor."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def export_model(self, path: str, dtype: str, trained_with: dict[str, Any]) -> None:
        """See :func:`verl_dft.training.export.export_model`."""
        export_model(self.actor.engine, Path(path), dtype, trained_with)


class OrderedReplayBuffer(ReplayBuffer):
    """verl's buffer, which gives a step's rows in the order of their problems and not in that of their completion.

    A group of which a response could not be made or is missing is an error, unless ``rollout_failure=skip``.
    """

    responses: Mapping[str, int] | None = None
    """Responses of a problem by partition; None: they may be missing."""

    def _materialize_batch(self, partition_id: str, selected_prompt_uids: list[str], partition_snapshot: dict) -> Any:
        if self.responses is not None:
            check_groups(
                selected_prompt_uids, partition_snapshot, self.failure_keys[partition_id], self.responses[partition_id]
            )
        place = {uid: number for number, uid in enumerate(self.prompt_global_steps[partition_id])}

        def order(item: tuple[str, dict]) -> tuple[int, int, int]:
            uid, session, index = item[0].rsplit("_", 2)
            return place.get(uid, len(place)), int(session), int(index)

        return super()._materialize_batch(
            partition_id, selected_prompt_uids, dict(sorted(partition_snapshot.items(), key=order))
        )


@register_trainer(TRAINER)
class OnlineTrainer(PPOTrainerSync):
    """``trainer.v1.trainer_mode=verl_dft``. ``watchdog`` is set by whoever runs it."""

    watchdog: Watchdog

    def __init__(self, config: DictConfig) -> None:
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # which is what verl asks for in many places
        super().__init__(config=config)
        self._metrics: MetricsFile | None = None
        self._unmarked: Path | None = None
        """A checkpoint that is on disk and does not count yet."""

    def _build_replay_buffer(self) -> ReplayBuffer:
        buffer = super()._build_replay_buffer()
        if type(buffer) is ReplayBuffer:  # a user's own sampler stays what it is
            buffer.__class__ = OrderedReplayBuffer
            if self.config.rollout_failure == "stop":
                rollout = self.config.actor_rollout_ref.rollout
                buffer.responses = {"train": rollout.n, "val": rollout.val_kwargs.n}
        buffer.poll_interval = self.config.poll_s
        return buffer

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in (Role.ActorRollout, Role.ActorRolloutRef):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(OnlineWorker)

    def _setup(self) -> None:
        super()._setup()
        if not is_distillation_enabled(self.config.get("distillation")):
            actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
            self.actor_rollout_wg.set_loss_fn(partial(online_loss, config=actor))

    def on_init_end(self) -> None:
        with self.watchdog.phase("weight_sync"):
            super().on_init_end()

    def on_step_end(self) -> None:
        with self.watchdog.phase("weight_sync"):
            super().on_step_end()

    # ---- a step ----

    def step(self, metrics: dict, timing_raw: dict) -> Any:
        with self.watchdog.phase("update"):
            return super().step(metrics, timing_raw)

    def prepare_step(self) -> dict:
        with self.watchdog.phase("sample"):
            return super().prepare_step()

    def on_sample_begin(self) -> None:
        self._sampling = self.watchdog.phase("sample")
        self._sampling.__enter__()
        super().on_sample_begin()

    def on_sample_end(self) -> None:
        self._sampling.__exit__(None, None, None)
        super().on_sample_end()

    def _compute_old_log_prob(self, batch: Any, metrics: dict) -> Any:
        origin, described = rows.describe_rows(batch)
        metrics.update(described)
        batch = super()._compute_old_log_prob(batch, metrics)
        measured = [name for name in metrics if name.startswith("training/rollout_")]
        if measured:  # of all rows, those that the sampler told nothing about included
            for name in measured:
                del metrics[name]
            metrics.update(rows.settle_sampler_logp(batch, origin))
        return batch

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        batch = super()._compute_advantage(batch, metrics)
        if self.config.mix.peak is not None:
            batch, described = mix_rows(batch, self.config, self.global_steps)
            metrics.update(described)
        return batch

    # ---- checkpoints, metrics, export ----

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        folder = self.config.trainer.default_local_dir
        for later in (step for step in completed_steps(folder) if step > self.global_steps):
            (checkpoint_path(folder, later) / MARKER).unlink()  # another history, not this run's

    def _save_checkpoint(self) -> None:
        path = checkpoint_path(self.config.trainer.default_local_dir, self.global_steps)
        with self.watchdog.phase("save"):
            shutil.rmtree(path, ignore_errors=True)  # left by a run that died while saving
            super()._save_checkpoint()
        self._unmarked = path

    def _mark_checkpoint(self, step: int) -> None:
        """Make the checkpoint of this step count, now that its metrics, which verl logs later, are on disk."""
        path, trainer = self._unmarked, self.config.trainer
        if path is None or step != self.global_steps:
            return
        self._unmarked = None
        failpoint("checkpoint.before_marker")
        write_json(path / MARKER, {"step": step, "world_size": world_size(self.config)})
        forget_old(trainer.default_local_dir, trainer.max_ckpt_to_keep)
        failpoint("checkpoint.after_marker")

    def _validate(self) -> dict[str, float]:
        with self.watchdog.phase("validate"):
            return super()._validate()

    def on_validate_begin(self) -> None:
        self._log_to_file(done=self.global_steps)
        super().on_validate_begin()

    def on_train_begin(self) -> None:
        self._log_to_file(done=self.global_steps - 1)  # verl has counted on to the step that comes
        super().on_train_begin()

    def _log_to_file(self, done: int) -> None:
        """From here on what verl logs goes to ``metrics.jsonl`` too, in which a resumed run has each step once."""
        if self._metrics is None:
            self._metrics = MetricsFile(Path(self.config.output_dir) / METRICS_FILE, done)
            self.logger = _LoggerWithFile(self.logger, self._metrics, done, self._mark_checkpoint)

    def fit(self, agent_loop_manager: Any) -> None:
        super().fit(agent_loop_manager)
        begun = time.perf_counter()
        with self.watchdog.phase("export"):
            record = trained_with([self.config.data.train_files], self.tokenizer)
            self.actor_rollout_wg.export_model(
                str(Path(self.config.output_dir) / "model"), self.config.export.dtype, record
            )
        print(f"exported the model in {time.perf_counter() - begun:.1f} s", flush=True)


class _LoggerWithFile:
    """verl's ``Tracking``, and ``metrics.jsonl``.

    Args:
        done: step after which the run goes on; 0 for one that begins. Its line is there already.
        logged: called with the step when its line is on disk.
    """

    def __init__(self, tracking: Any, file: MetricsFile, done: int, logged: Callable[[int], None]) -> None:
        self.tracking, self.file, self.done, self.logged = tracking, file, done, logged

    def log(self, data: dict[str, Any], step: int, **kwargs: Any) -> None:
        self.tracking.log(data=data, step=step, **kwargs)
        if step > self.done or self.done == 0:  # else: validation before a run goes on
            numbers_of = {name: float(value) for name, value in data.items() if isinstance(value, numbers.Number)}
            self.file.log(numbers_of, step)
        self.logged(step)

    def finish(self, exit_code: int = 0) -> None:
        self.file.file.close()
        self.tracking.finish(exit_code=exit_code)
