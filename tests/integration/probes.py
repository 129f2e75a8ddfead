"""Functions that the fork server runs in ranks: real trainers, with what a test needs written to files."""

import json
from pathlib import Path

import numpy as np
import torch
from verl.trainer import sft_trainer
from verl.utils import tensordict_utils as tu
from verl.utils.distributed import destroy_global_process_group

from verl_dft.training import sft
from verl_dft.training.reference_scores import forward_settings
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
    settings = forward_settings(trainer.config, trainer.model_config.tokenizer)
    settings |= {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 1}
    output = trainer.training_client.compute_logp(tu.get_tensordict(batch, settings))
    scores = {row: logp.tolist() for row, logp in zip(mine, output["logp"].unbind(), strict=True)}
    Path(config.output_dir, f"scores_{rank}.json").write_text(json.dumps(scores))
    destroy_global_process_group()
    return 0


def sequence_parallel_hook(argv: list[str]) -> int:
    """The logits hook on each rank's shard of a packed sequence; rank 0 writes both ways' log-probs."""
    from tensordict import TensorDict
    from verl.utils.ulysses import gather_outputs_and_unpad, set_ulysses_sequence_parallel_group

    from verl_dft.objectives import get_objective
    from verl_dft.training.bridge import LossBridge

    sft.init_distributed()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    set_ulysses_sequence_parallel_group(torch.distributed.group.WORLD)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(9, (length,), generator=generator) for length in (4, 7, 2)]
    masks = [(torch.arange(len(row)) > 0).long() for row in rows]
    total = sum(map(len, rows))  # 13 tokens: the last shard is padded
    logits = torch.randn(total, 9, generator=generator)

    def data(sp_size: int) -> TensorDict:
        columns = {"input_ids": rows, "loss_mask": masks}
        nested = {name: torch.nested.as_nested_tensor(value, layout=torch.jagged) for name, value in columns.items()}
        return tu.get_tensordict(nested, {"sp_size": sp_size})

    bridge = LossBridge(get_objective("sft"))
    whole = bridge(student_logits=logits[None], data=data(1))["logp"][0]
    pad = -total % world
    shard = torch.nn.functional.pad(logits, (0, 0, 0, pad)).chunk(world)[rank]
    part = bridge(student_logits=shard[None], data=data(world))["logp"][0]
    joined = gather_outputs_and_unpad(part, gather_dim=0, unpad_dim=0, padding_size=pad)
    if rank == 0:
        Path(argv[0]).write_text(json.dumps({"whole": whole.tolist(), "joined": joined.tolist()}))
    destroy_global_process_group()
    return 0


def in_turn(argv: list[str]) -> int:
    """``verl-dft`` with each of the command lines (JSON lists), one after the other in this process."""
    from verl_dft.cli import main

    for line in argv:
        code = main(json.loads(line))
        if code:
            return code
    return 0


def masked_rows(argv: list[str]) -> int:
    """One step in which the longest rows have no trained token, each a micro-batch alone."""
    config = prepare_run(argv)
    sft.init_distributed()
    trainer = sft.ObjectiveSFTTrainer(config)
    batch = next(iter(trainer.train_dataloader))
    longest = torch.tensor([max(len(row) for row in batch["input_ids"].unbind())])
    torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX)
    masks = [m * (len(m) < int(longest) - 5) for m in batch["loss_mask"].unbind()]
    batch["loss_mask"] = torch.nested.as_nested_tensor(masks, layout=torch.jagged)
    data = tu.get_tensordict(batch, forward_settings(trainer.config, trainer.model_config.tokenizer))
    metrics = tu.get(trainer.training_client.train_batch(data), "metrics")
    kept = {name: metrics[name] for name in ("loss", "grad_norm", "train/nll", "train/num_tokens")}
    kept["masked"] = sum(not bool(m.any()) for m in masks)
    Path(config.output_dir, f"masked_{torch.distributed.get_rank()}.json").write_text(json.dumps(kept))
    destroy_global_process_group()
    return 0
