"""Functions that the fork server runs in ranks: real trainers, with what a test needs written to files."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from verl.trainer import sft_trainer
from verl.utils import tensordict_utils as tu
from verl.utils.distributed import destroy_global_process_group

from verl_dft.training import sft
from verl_dft.training.setup import prepare_run


class StockTrainer(sft.ObjectiveSFTTrainer):
    """Our data order with verl's own worker and ``sft_loss``, and no export."""

    def _build_engine(self) -> None:
        sft_trainer.SFTTrainer._build_engine(self)

    def export(self) -> None:
        state = {name: value.full_tensor().numpy() for name, value in self.engine.module.state_dict().items()}
        if self.rank == 0:
            np.savez(Path(self.config.output_dir) / "weights.npz", **state)


def stock(argv: list[str]) -> int:
    """Train with verl's worker and loss."""
    config = prepare_run(argv)
    sft.init_distributed()
    StockTrainer(config).fit()
    destroy_global_process_group()
    return 0


def export_and_score(argv: list[str]) -> int:
    """Train, export, and write the live trainer's log-probs of every training row, by row index."""
    config = prepare_run(argv)
    sft.init_distributed()
    trainer = sft.ObjectiveSFTTrainer(config)
    trainer.fit()
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    mine = list(range(rank, len(trainer.train_dataset), world))
    batch = trainer.collate_fn([trainer.train_dataset[i] for i in mine])
    settings = {
        "use_remove_padding": config.model.use_remove_padding,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": 1,
        "temperature": 1.0,
        "pad_mode": config.data.pad_mode,
        "pad_token_id": trainer.model_config.tokenizer.pad_token_id,
    }
    output = trainer.training_client.compute_logp(tu.get_tensordict(batch, settings))
    scores = {row: logp.tolist() for row, logp in zip(mine, output["logp"].unbind(), strict=True)}
    Path(config.output_dir, f"scores_{rank}.json").write_text(json.dumps(scores))
    destroy_global_process_group()
    return 0


def fail(argv: list[str]) -> int:
    """Leaves with the code given, or does not leave in time."""
    if argv[0] == "sleep":
        import time

        time.sleep(60)
    return int(os.environ["RANK"]) + int(argv[0])
