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

from verl.utils.dataset.dataset_utils import SFTTensorCollator

from verl_dft.data.dataset import RowDataset
from verl_dft.objectives import objective_name
from verl_dft.training.batches import StepBatchSampler, ValidationLoader, train_loader
from verl_dft.training.bridge import LossBridge
from verl_dft.training.checkpoint import MarkedCheckpoints
from verl_dft.training.configure import objective_of, updates_per_step
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

    def set_run_length(self) -> None:
        """``total_training_steps`` steps if given, else ``total_epochs`` epochs; ``fit`` loops over epochs."""
        trainer, steps = self.config.trainer, len(self.train_dataloader)
        if trainer.total_training_steps is not None:
            trainer.total_epochs = math.ceil(trainer.total_training_steps / steps)
        left_out = len(self.train_dataset) - steps * self.global_batch_size
        if left_out and self.is_first_rank:
            print(f"{left_out} of {len(self.train_dataset)} rows do not fill a batch: left out of each epoch by turns")

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
        """verl's loop from the first step that is not done, then the export."""
        if self.resume_global_step < self.total_training_steps:
            self.train_sampler.start_at(self.resume_global_step % len(self.train_dataloader))
            # verl's closing prints are a train time of 0 and the mean of batch means: the tracker has both right
            with replaced(self.verl_module, Tracking=self._tracker, tqdm=_pass_through, print=_silent):
                super().fit()  # type: ignore[misc]
            if getattr(self, "tracker", None) is not None:
                self.tracker.finish()
        elif self.is_first_rank:
            print(f"all {self.total_training_steps} steps are done already", flush=True)
        self.export()

    def _tracker(self, **kwargs: Any) -> RunTracker:
        self.tracker = RunTracker(self, **kwargs)
        return self.tracker

    def export(self) -> None:
        """Write ``<output_dir>/model`` as a Hugging Face folder."""
        path = Path(self.config.output_dir) / "model"
        self.training_client.export(str(path), self.config.export.dtype)
        if self.is_first_rank:
            print(f"exported the model to {path}", flush=True)


def _pass_through(iterable: Iterable[Any], **_: Any) -> Iterable[Any]:
    """In place of ``tqdm`` in ``fit``: the tracker keeps one bar for the whole run instead of one an epoch."""
    return iterable


def _silent(*_: Any, **__: Any) -> None:
    """In place of ``print``."""
