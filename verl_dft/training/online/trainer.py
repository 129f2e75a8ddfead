"""verl's synchronous PPO trainer with demonstrations, ordered rows, limits, marked checkpoints and our export."""

import numbers
import shutil
import time
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
from verl_dft.training.export import export_model
from verl_dft.training.metrics import METRICS_FILE, MetricsFile
from verl_dft.training.online import rows
from verl_dft.training.online.configure import TRAINER, demonstrates
from verl_dft.training.online.watchdog import Watchdog, engine_error
from verl_dft.training.policy_rows import online_loss
from verl_dft.training.resume import MARKER, checkpoint_path, completed_steps, forget_old

HEALTH_TIMEOUT_S = 20.0
"""A server that does not answer for so long is busy, not dead: Ray tells of a dead one at once."""


class OnlineWorker(ActorRolloutRefWorker):
    """verl's worker of actor, rollout and reference, which can also export the actor."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def export_model(self, path: str, dtype: str, trained_with: dict[str, Any]) -> None:
        """See :func:`verl_dft.training.export.export_model`."""
        export_model(self.actor.engine, Path(path), dtype, trained_with)


class OrderedReplayBuffer(ReplayBuffer):
    """verl's buffer, which gives a step's rows in the order of their problems and not in that of their completion.

    A group of which a response could not be made is an error, unless ``rollout_failure=skip``.
    """

    stop_on_failure = True

    def _materialize_batch(self, partition_id: str, selected_prompt_uids: list[str], partition_snapshot: dict) -> Any:
        failed = set(selected_prompt_uids) & self.failure_keys[partition_id]
        if failed and self.stop_on_failure:
            raise RolloutFailed(
                f"{len(failed)} of {len(selected_prompt_uids)} problems of this step lack a response: sampling or "
                "grading failed (its traceback is above); run the same command again to go on from the last "
                "checkpoint, or set rollout_failure=skip"
            )
        place = {uid: number for number, uid in enumerate(self.prompt_global_steps[partition_id])}

        def order(item: tuple[str, dict]) -> tuple[int, int, int]:
            uid, session, index = item[0].rsplit("_", 2)
            return place.get(uid, len(place)), int(session), int(index)

        return super()._materialize_batch(
            partition_id, selected_prompt_uids, dict(sorted(partition_snapshot.items(), key=order))
        )


class RolloutFailed(RuntimeError):
    """A step's responses could not all be made; the message is one line."""


@register_trainer(TRAINER)
class OnlineTrainer(PPOTrainerSync):
    """``trainer.v1.trainer_mode=verl_dft``. ``watchdog`` is set by whoever runs it."""

    watchdog: Watchdog

    def __init__(self, config: DictConfig) -> None:
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # which is what verl asks for in many places
        super().__init__(config=config)
        self._metrics: MetricsFile | None = None

    def _build_replay_buffer(self) -> ReplayBuffer:
        buffer = super()._build_replay_buffer()
        if type(buffer) is ReplayBuffer:  # a user's own sampler stays what it is
            buffer.__class__ = OrderedReplayBuffer
            buffer.stop_on_failure = self.config.rollout_failure == "stop"
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
        self.watchdog.health = self._engine_trouble

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
        if demonstrates(self.config) and (origin != rows.SELF).any():
            stale = [name for name in metrics if name.startswith("training/rollout_")]
            for name in stale:  # of all rows, most of which have no log-probs of the sampler
                del metrics[name]
            metrics.update(rows.settle_sampler_logp(batch, origin))
        return batch

    # ---- checkpoints, metrics, export ----

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        folder = self.config.trainer.default_local_dir
        for later in (step for step in completed_steps(folder) if step > self.global_steps):
            (checkpoint_path(folder, later) / MARKER).unlink()  # another history, not this run's

    def _save_checkpoint(self) -> None:
        trainer = self.config.trainer
        path = checkpoint_path(trainer.default_local_dir, self.global_steps)
        shutil.rmtree(path, ignore_errors=True)  # left by a run that died while saving
        super()._save_checkpoint()
        failpoint("checkpoint.before_marker")
        write_json(path / MARKER, {"step": self.global_steps, "world_size": trainer.n_gpus_per_node * trainer.nnodes})
        forget_old(trainer.default_local_dir, trainer.max_ckpt_to_keep)
        failpoint("checkpoint.after_marker")

    def on_validate_begin(self) -> None:
        self._log_to_file()
        super().on_validate_begin()

    def on_train_begin(self) -> None:
        self._log_to_file()
        super().on_train_begin()

    def _log_to_file(self) -> None:
        """From here on what verl logs goes to ``metrics.jsonl`` too, in which a resumed run has each step once."""
        if self._metrics is None:
            begun = max(self.global_steps - 1, 0)  # verl has counted on to the step that comes
            self._metrics = MetricsFile(Path(self.config.output_dir) / METRICS_FILE, begun)
            self.logger = _LoggerWithFile(self.logger, self._metrics)

    def fit(self, agent_loop_manager: Any) -> None:
        super().fit(agent_loop_manager)
        begun = time.perf_counter()
        with self.watchdog.phase("update"):
            record = trained_with([self.config.data.train_files], self.tokenizer)
            self.actor_rollout_wg.export_model(
                str(Path(self.config.output_dir) / "model"), self.config.export.dtype, record
            )
        print(f"exported the model in {time.perf_counter() - begun:.1f} s", flush=True)

    # ---- health ----

    def _engine_trouble(self) -> str | None:
        """What is wrong with a vLLM engine; None where all run or are too busy to answer."""
        replicas = self.llm_server_manager.get_replicas()
        asked = [(i, server.__ray_call__.remote(engine_error)) for i, r in enumerate(replicas) for server in r.servers]
        for number, answer in asked:
            try:
                trouble = ray.get(answer, timeout=HEALTH_TIMEOUT_S)
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError as error:
                trouble = str(error).splitlines()[0]
            if trouble:
                return (
                    f"the vLLM engine of replica {number} has died in step {self.global_steps} ({trouble}); run the "
                    "same command again to go on from the last checkpoint"
                )
        return None


class _LoggerWithFile:
    """verl's ``Tracking``, and ``metrics.jsonl``."""

    def __init__(self, tracking: Any, file: MetricsFile) -> None:
        self.tracking, self.file = tracking, file

    def log(self, data: dict[str, Any], step: int, **kwargs: Any) -> None:
        self.tracking.log(data=data, step=step, **kwargs)
        self.file.log({name: float(value) for name, value in data.items() if isinstance(value, numbers.Number)}, step)

    def finish(self, exit_code: int = 0) -> None:
        self.file.file.close()
        self.tracking.finish(exit_code=exit_code)
