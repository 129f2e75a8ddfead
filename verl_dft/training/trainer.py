"""What our two trainers share: verl's ``SFTTrainer`` (torchrun) and its Ray twin, neither of whose ``fit`` is copied.

``fit`` runs as verl wrote it; it finds our data loaders, our checkpoint handler and our worker on ``self``, and, for
the length of the call, our tracker in the place of verl's ``Tracking`` and ``tqdm``.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from verl.utils.dataset.dataset_utils import SFTTensorCollator

from verl_dft.data.dataset import RowDataset
from verl_dft.data.turns import trained_with
from verl_dft.objectives import objective_name
from verl_dft.training.batches import StepBatchSampler, ValidationLoader, group_members, train_loader
from verl_dft.training.bridge import LossBridge
from verl_dft.training.checkpoint import MarkedCheckpoints
from verl_dft.training.configure import objective_of, updates_per_step
from verl_dft.training.evaluate_during import Evaluations
from verl_dft.training.exempt import exempt_ids
from verl_dft.training.reference_scores import add_reference_logp
from verl_dft.training.setup import load_rows
from verl_dft.training.tracking import RunTracker

BALANCED = ("token_mean", "sequence_sum")
"""Reductions that do not depend on which rows share a micro-batch, so that rows may be ordered by length."""


@contextmanager
def replaced(module: ModuleType, **names: Any) -> Iterator[None]:
    """Set module-level names for the length of a block; a name the module lacks (a built-in) is removed again."""
    originals = {name: module.__dict__[name] for name in names if name in module.__dict__}
    module.__dict__.update(names)
    try:
        yield
    finally:
        for name in names:
            del module.__dict__[name]
        module.__dict__.update(originals)


class ObjectiveTrainerMixin:
    """Data, loss, checkpoints, tracking and export for a verl SFT trainer."""

    verl_module: ModuleType
    """verl's trainer module, whose names ``fit`` looks up."""
    config: Any
    training_client: Any
    train_dataset: RowDataset
    resume_global_step: int
    total_training_steps: int
    tracker: RunTracker | None = None
    """The first rank's, from its first step."""

    def __init__(self, config: Any) -> None:
        # verl prints the whole configuration, which is in config.yaml
        with replaced(self.verl_module, print=_silent):
            super().__init__(config)

    @property
    def run_name(self) -> str:
        """Shown in the progress bar."""
        return objective_name(self.config.objective)

    def loss_bridge(self) -> LossBridge:
        """The configured objective with its reduction and what it needs to know of the run."""
        config = self.config
        objective = objective_of(config)
        exempt = ()
        if "exempt" in objective.requires:
            exempt = exempt_ids(objective.exempt_tokens, self.model_config.tokenizer)  # type: ignore[attr-defined]
        return LossBridge(
            objective,
            config.trainer.reduction,
            updates=updates_per_step(config),
            head=config.trainer.log_prob_head,
            exempt_ids=exempt,
            reference_path=config.reference.path,
        )

    def _build_dataset(self) -> None:
        rows = load_rows(self.config, self.model_config.tokenizer)  # type: ignore[attr-defined]
        self.train_dataset, self.val_dataset = rows.train, rows.val

    def build_loaders(self, dp_size: int, dp_rank: int | None) -> None:
        """Set ``train_sampler``, ``train_dataloader`` and ``val_dataloader`` for this rank (None: for all)."""
        config = self.config
        self.global_batch_size = config.data.train_batch_size
        self.collate_fn = SFTTensorCollator(config.data.pad_mode)
        self.train_sampler = StepBatchSampler(
            self.train_dataset.lengths,
            self.global_batch_size,
            dp_size=dp_size,
            dp_rank=dp_rank,
            seed=config.trainer.seed,
            balance=config.trainer.reduction in BALANCED,
            updates=updates_per_step(config),
            members=self._group_members(),
        )
        self.dp_size, self.dp_rank = dp_size, dp_rank
        self.train_dataloader = train_loader(
            self.train_dataset, self.train_sampler, self.collate_fn, config.data.num_workers
        )
        self.val_dataloader = None
        if self.val_dataset is not None:
            self.val_dataloader = ValidationLoader(
                self.val_dataset,
                self.global_batch_size,
                dp_size=dp_size,
                dp_rank=dp_rank,
                collate=self.collate_fn,
                client=lambda: self.training_client,
            )

    def _group_members(self) -> np.ndarray | None:
        """Row indices of each group, where groups are to stay together."""
        data = self.config.data
        if not data.keep_groups:
            return None
        return group_members(self.train_dataset.groups, data.mini_batch_size or data.train_batch_size)

    def set_run_length(self) -> None:
        """``total_training_steps`` steps if given, else ``total_epochs`` epochs; ``fit`` loops over epochs."""
        trainer, steps = self.config.trainer, len(self.train_dataloader)
        if trainer.total_training_steps is not None:
            trainer.total_epochs = math.ceil(trainer.total_training_steps / steps)
        usable = self.train_sampler.members.size
        lost = len(self.train_dataset) - usable
        if lost and self.is_first_rank:
            print(f"{lost} rows are of groups that lost a row (over data.max_length): left out")
        left_out = usable - steps * self.global_batch_size
        if left_out and self.is_first_rank:
            print(f"{left_out} of {usable} rows do not fill a batch: left out of each epoch by turns")

    @property
    def is_first_rank(self) -> bool:
        """Whether this process prints."""
        return getattr(self, "rank", 0) == 0

    def checkpoints(self, engine: Any, **kwargs: Any) -> MarkedCheckpoints:
        """The handler that ``fit`` saves through; made before a checkpoint is loaded, while the model is the base."""
        if "ref_logp" in objective_of(self.config).requires:
            add_reference_logp(self, self.dp_size, self.dp_rank)
        trainer = self.config.trainer
        return MarkedCheckpoints(
            engine=engine,
            train_dataloader=self.train_dataloader,
            default_local_dir=trainer.default_local_dir,
            max_ckpt_to_keep=trainer.max_ckpt_to_keep,
            resume_mode=trainer.resume_mode,
            resume_from_path=trainer.resume_from_path,
            world_size=trainer.n_gpus_per_node * trainer.nnodes,
            facts={"seed": trainer.seed, "total_training_steps": self._planned_steps()},
            **kwargs,
        )

    def _planned_steps(self) -> int:
        trainer = self.config.trainer
        return trainer.total_training_steps or len(self.train_dataloader) * trainer.total_epochs

    def fit(self) -> None:
        """verl's loop from the first step that is not done, then the export and the last step's evaluation."""
        self.steps_done = self.resume_global_step
        self.evaluations = Evaluations(self)
        try:
            if self.steps_done < self.total_training_steps:
                self._train()
            elif self.is_first_rank:
                print(f"all {self.total_training_steps} steps are done already", flush=True)
            self.export()
            self.evaluations.after(self.total_training_steps)
        finally:
            if self.tracker:
                self.tracker.bar.close()  # else it would come after the line that says what went wrong
        if self.tracker:
            self.tracker.finish()

    def _train(self) -> None:
        self.train_sampler.start_at(self.steps_done % len(self.train_dataloader))
        # verl's closing prints are a train time of 0 and the mean of batch means: the tracker has both right
        with replaced(self.verl_module, Tracking=self._tracker, tqdm=self._between_steps, print=_silent):
            super().fit()  # type: ignore[misc]
        if self.tracker:
            self.tracker.summarize()

    def _between_steps(self, batches: Iterable[Any], **_: Any) -> Iterator[Any]:
        """In place of ``tqdm`` in ``fit``, whose bar is the tracker's: what is done between one step and the next.

        All ranks pass here together, after a step's validation and checkpoint. The last step's turn comes after
        ``fit``, which leaves the loop.
        """
        if self.steps_done == self.resume_global_step:
            self.evaluations.after(self.steps_done)
        for batch in batches:
            yield batch
            self.steps_done += 1
            self.evaluations.after(self.steps_done)

    def _tracker(self, **kwargs: Any) -> RunTracker:
        self.tracker = RunTracker(self, **kwargs)
        return self.tracker

    def open_tracker(self) -> RunTracker:
        """The run's tracker; opened here where a run has no step to do, only an evaluation."""
        trainer = self.config.trainer
        return self.tracker or self._tracker(
            project_name=trainer.project_name,
            experiment_name=trainer.experiment_name,
            default_backend=trainer.logger,
            config=OmegaConf.to_container(self.config, resolve=True),
        )

    def export(self) -> None:
        """Write ``<output_dir>/model`` as a Hugging Face folder."""
        path = Path(self.config.output_dir) / "model"
        self.export_to(path)
        if self.is_first_rank:
            print(f"exported the model to {path}", flush=True)

    def export_to(self, path: Path) -> None:
        """Write the weights as they are, and what they were trained on; every rank calls it."""
        tokenizer, record = self.model_config.tokenizer, None  # type: ignore[attr-defined]
        if self.is_first_rank:
            record = trained_with(self.config.data.train_files, tokenizer)
        self.training_client.export(str(path), self.config.export.dtype, record)


def _silent(*_: Any, **__: Any) -> None:
    """In place of ``print``."""
