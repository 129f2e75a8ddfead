"""TRL's ``DPOTrainer`` with our pairs, batches, checkpoints, tracking and export. Imports TRL.

TRL's own tokenisation is not used: it appends the eos token to responses that already end with the template's end of
turn, and cuts long sequences without a word. What it trains on here are the ids of ``verl_dft.data.pairs``.
"""

import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import trl.import_utils as trl_checks
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from verl_dft.data.pairs import EncodedPair
from verl_dft.failpoints import failpoint
from verl_dft.files import write_json, writing
from verl_dft.training.batches import StepBatchSampler
from verl_dft.training.export import write_model
from verl_dft.training.resume import MARKER, checkpoint_path, checksums, forget_old
from verl_dft.training.tracking import RunTracker

_find = trl_checks._is_package_available
# TRL 0.27 takes a yes or no; transformers 5 answers (False, None), which counts as yes, and TRL imports what is missing
trl_checks._is_package_available = lambda name, return_version=False: (
    _find(name, return_version=True) if return_version else bool(np.atleast_1d(_find(name))[0])
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import DPOConfig, DPOTrainer

transformers_logging.disable_progress_bar()

METRICS = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "logps/chosen": "logp_chosen",
    "logps/rejected": "logp_rejected",
}
"""TRL's names -> ours, under ``train/``. Rewards are beta times the log-ratio to the reference, means over pairs."""


class PairDataset(Dataset[dict[str, np.ndarray]]):
    """Pairs under the column names of TRL's collator, [T] int64 each."""

    def __init__(self, pairs: list[EncodedPair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        pair = self.pairs[index]
        ids = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        return {f"{name}_input_ids": value.astype(np.int64) for name, value in ids.items()}


class PairBatches(Sampler[list[int]]):
    """Row indices of this rank's micro-batches for the whole run: a function of (seed, step) alone."""

    def __init__(self, steps: StepBatchSampler, num_steps: int, micro_batch_size: int) -> None:
        self.steps, self.num_steps, self.size = steps, num_steps, micro_batch_size

    def rows(self, step: int) -> list[int]:
        """Row indices of step ``step`` of the run, counted from 0."""
        return self.steps.rows(*divmod(step, len(self.steps)))

    def __len__(self) -> int:
        return self.num_steps * (self.steps.batch_size // self.steps.dp_size // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.num_steps):
            rows = self.rows(step)
            for start in range(0, len(rows), self.size):
                yield rows[start : start + self.size]


@dataclass
class TrackedRun:
    """What ``RunTracker`` asks of a trainer."""

    config: DictConfig
    total_training_steps: int
    resume_global_step: int = 0
    run_name: str = "dpo"
    ckpt_handler: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(saved_at=0.0))


class StepEnd(TrainerCallback):
    """After each step: whether a checkpoint is due."""

    def __init__(self, save_freq: int) -> None:
        self.save_freq = save_freq

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        failpoint("preference.step")
        due = self.save_freq > 0 and state.global_step % self.save_freq == 0
        control.should_save = due or state.global_step == state.max_steps
        return control


class PreferenceTrainer(DPOTrainer):
    """``DPOTrainer`` on encoded pairs.

    Args:
        model: the policy, in float32 on the CPU.
        reference: the frozen policy; None for a copy of ``model`` (under LoRA: ``model`` without its adapters).
        pairs: of all ranks.
        batches: of this rank.
        run: for the tracker.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        reference: torch.nn.Module | None,
        pairs: list[EncodedPair],
        batches: PairBatches,
        run: TrackedRun,
        **kwargs: Any,
    ) -> None:
        self.pairs, self.batches, self.run, self.tracker = pairs, batches, run, None
        model.warnings_issued = {}  # TRL writes into it; transformers 5 has it no more
        super().__init__(model, reference, train_dataset=PairDataset(pairs), **kwargs)
        self.remove_callback(PrinterCallback)  # the tracker has one line for each step

    def _prepare_dataset(self, dataset: PairDataset, *_: Any) -> PairDataset:
        return dataset

    def get_train_dataloader(self) -> DataLoader:
        """One epoch of the whole run's batches. Not prepared by accelerate, which would split them once more."""
        return DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """TRL's loop, tracked by the first rank."""
        if self.is_world_process_zero():
            trainer = self.run.config.trainer
            self.tracker = RunTracker(
                self.run,
                project_name=trainer.project_name,
                experiment_name=trainer.experiment_name,
                default_backend=list(trainer.logger),
                config=OmegaConf.to_container(self.run.config, resolve=True),
            )
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            if self.tracker is not None:
                self.tracker.bar.close()  # else it would come after the line that says what went wrong
        if self.tracker is not None:
            self.tracker.summarize()
            self.tracker.finish()
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Send a step's metrics to the tracker; TRL has added its own to ``logs``."""
        super().log(logs, start_time)
        if self.tracker is not None and "loss" in logs:
            self.tracker.log(step_metrics(logs, self._pairs_of(self.state.global_step)), self.state.global_step)

    def _pairs_of(self, step: int) -> list[EncodedPair]:
        """The pairs of all ranks in step ``step``, counted from 1."""
        steps = self.batches.steps
        everyone = StepBatchSampler(
            steps.lengths, steps.batch_size, dp_size=1, dp_rank=0, seed=steps.seed, balance=False
        )
        return [self.pairs[i] for i in everyone.rows(*divmod(step - 1, len(steps)))]

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """A checkpoint under the names of the other trainers: it counts once its marker is there."""
        folder, step = Path(self.args.output_dir), self.state.global_step
        temporary, path = folder / f"checkpoint-{step}", checkpoint_path(folder, step)
        if self.is_world_process_zero():
            for left in (temporary, path):  # by a run that died while saving
                shutil.rmtree(left, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with writing(folder):
            Trainer._save_checkpoint(self, model, trial)  # TRL's writes a model card first
        self.accelerator.wait_for_everyone()
        failpoint("checkpoint.before_marker")
        if self.is_world_process_zero():
            temporary.rename(path)
            facts = {"step": step, "world_size": self.args.world_size, "seed": self.args.seed}
            write_json(path / MARKER, facts | {"crc32": checksums(path)})
            forget_old(folder, self.run.config.trainer.max_ckpt_to_keep)
        self.accelerator.wait_for_everyone()
        self.run.ckpt_handler.saved_at = time.perf_counter()
        failpoint("checkpoint.after_marker")

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint has tied weights under one of their names; nothing else may be missing from it."""
        tied = self.model.config.tie_word_embeddings
        missing = [name for name in load_result.missing_keys if not (tied and name.endswith("lm_head.weight"))]
        assert not missing and not load_result.unexpected_keys, f"checkpoint: {load_result}"

    def export(self, path: Path, dtype: str, source: Any, record: Mapping[str, Any]) -> None:
        """Write the policy, adapters merged, as a Hugging Face folder; the last two are those of ``write_model``."""
        if self.is_world_process_zero():
            model = self.accelerator.unwrap_model(self.model)
            if self.is_peft_model:
                model = model.merge_and_unload()
            state = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
            write_model(source, state, path, dtype, trained_with=record)
        self.accelerator.wait_for_everyone()


def step_metrics(logs: Mapping[str, float], pairs: list[EncodedPair]) -> dict[str, float]:
    """A step's metrics under the names of our other trainers; ``nll`` is the chosen responses' mean per token, nats."""
    metrics = {f"train/{ours}": logs[theirs] for theirs, ours in METRICS.items() if theirs in logs}
    return metrics | {
        "train/objective": logs["loss"],
        "train/nll": -logs["logps/chosen"] * len(pairs) / sum(len(pair.chosen) for pair in pairs),
        "train/num_pairs": len(pairs),
        "train/num_tokens": sum(pair.num_trained for pair in pairs),
        "train/global_tokens": sum(pair.num_tokens for pair in pairs),
    }


def dpo_arguments(config: DictConfig, num_steps: int) -> DPOConfig:
    """TRL's arguments for our configuration and a run of ``num_steps`` steps."""
    data, optim, trainer, objective = config.data, config.optim, config.trainer, config.objective
    on_cpu, ranks = trainer.device == "cpu", trainer.n_gpus_per_node
    arguments = DPOConfig(
        output_dir=trainer.default_local_dir,
        beta=objective.beta,
        label_smoothing=objective.label_smoothing,
        rpo_alpha=objective.rpo_alpha,
        max_length=None,  # TRL would cut without a word; load_pairs has seen to it
        max_prompt_length=None,
        per_device_train_batch_size=data.micro_batch_size_per_gpu,
        gradient_accumulation_steps=data.train_batch_size // ranks // data.micro_batch_size_per_gpu,
        max_steps=num_steps,
        learning_rate=optim.lr,
        lr_scheduler_type="cosine" if optim.lr_scheduler_type == "cosine" else "constant_with_warmup",
        warmup_steps=int(optim.lr_warmup_steps_ratio * num_steps),
        optim="adamw_torch",
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.clip_grad,
        seed=trainer.seed,
        bf16=config.precision == "bf16",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and ranks > 1 else None,
        ddp_find_unused_parameters=False,
        gradient_checkpointing=config.model.enable_gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # StepEnd decides
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
    )
    if arguments.n_gpu > 1:  # one process that sees several GPUs would split its batches over them
        arguments._n_gpu = 1
    return arguments
