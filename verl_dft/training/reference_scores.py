"""Log-probs of every row under the reference policy, computed once before the first step and kept beside the run.

So no second model stays in memory while training (iw-SFT). A run that continues finds the file, reads it once to see
that it is whole, and computes nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from tqdm import tqdm
from verl.utils import tensordict_utils as tu

from verl_dft.data.dataset import RowDataset
from verl_dft.errors import InputError
from verl_dft.files import atomic_write, missing_files
from verl_dft.training.batches import PaddedRows
from verl_dft.training.checked_array import is_whole, write_array
from verl_dft.training.checkpoint import PATIENCE_S


def forward_settings(config: DictConfig, tokenizer: Any) -> dict[str, Any]:
    """What verl's engine must be told about a batch for a forward pass."""
    data = config.data
    return {
        "use_remove_padding": config.model.use_remove_padding,
        "use_dynamic_bsz": data.use_dynamic_bsz,
        "max_token_len_per_gpu": data.max_token_len_per_gpu,
        "micro_batch_size_per_gpu": data.micro_batch_size_per_gpu,
        "temperature": 1.0,
        "pad_mode": data.pad_mode,
        "pad_token_id": tokenizer.pad_token_id,
    }


def add_reference_logp(trainer: Any, dp_size: int, dp_rank: int | None) -> None:
    """Give the trainer's rows the column ``ref_logp`` where they lack it.

    Args:
        trainer: with its model built and nothing trained or loaded yet.
        dp_size: data-parallel ranks.
        dp_rank: this process's; None where one driver hands out all shares (Ray).
    """
    if "ref_logp" in trainer.train_dataset.columns:
        return  # stored by whatever scored the rows; validation rows without it report the nll only
    scored = False
    for name, rows in (("train", trainer.train_dataset), ("val", trainer.val_dataset)):
        if rows is None or "ref_logp" in rows.columns:
            continue
        file = Path(trainer.config.output_dir) / "data" / f"ref_logp-{name}.npy"
        if not _agreed(is_whole(file), dp_rank):
            scored = True
            values = _score(trainer, rows, name, dp_size, dp_rank)
            if values is not None:
                with atomic_write(file, "wb") as stream:
                    write_array(stream, values)
            _barrier(dp_rank)
        if missing_files([file], PATIENCE_S):
            raise InputError(f"{file} is missing here: output_dir must lie on a file system that all nodes share")
        rows.add_column("ref_logp", file)
    if scored:
        trainer.training_client.reference_scored()


def _score(trainer: Any, rows: RowDataset, name: str, dp_size: int, dp_rank: int | None) -> np.ndarray | None:
    """[total tokens] float32, value of token t at t, 0 where not trained; None on ranks other than the first."""
    size = trainer.global_batch_size
    padded = PaddedRows(rows, size)
    order = [*np.argsort(-rows.lengths, kind="stable").tolist(), *range(len(rows), len(padded))]  # like with like
    settings = forward_settings(trainer.config, trainer.model_config.tokenizer)
    found: dict[int, np.ndarray] = {}
    bar = tqdm(total=len(order), desc=f"reference log-probs ({name})", unit="row", disable=dp_rank not in (0, None))
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        shares = [batch[rank::dp_size] for rank in range(dp_size)]
        mine = shares[dp_rank] if dp_rank is not None else [row for share in shares for row in share]
        data = tu.get_tensordict(trainer.collate_fn([padded[row] for row in mine]), dict(settings))
        output = trainer.training_client.reference_logp(data)
        output = output.get() if dp_rank is None else output
        if output is not None:
            found |= {row: logp.numpy() for row, logp in zip(mine, output["logp"].unbind(), strict=True)}
        bar.update(size)
    bar.close()
    return _joined(rows, _gathered(found, dp_rank))


def _gathered(found: dict[int, np.ndarray], dp_rank: int | None) -> dict[int, np.ndarray] | None:
    if dp_rank is None:
        return found
    first = torch.distributed.get_rank() == 0
    parts: list[Any] | None = [None] * torch.distributed.get_world_size() if first else None
    torch.distributed.gather_object(found, parts)
    return {row: logp for part in parts for row, logp in part.items()} if parts else None


def _joined(rows: RowDataset, found: dict[int, np.ndarray] | None) -> np.ndarray | None:
    if found is None:
        return None
    values = np.zeros(int(rows.lengths.sum()), dtype=np.float32)
    for row in range(len(rows)):
        values[rows.flat(row)][1:] = found[row][:-1]  # the model's value for token t stands at t - 1
    return values


def _agreed(found: bool, dp_rank: int | None) -> bool:
    """Rank 0's view, so that no rank waits for another that found the file a moment later."""
    if dp_rank is None:
        return found
    box = [found]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def _barrier(dp_rank: int | None) -> None:
    if dp_rank is not None:
        torch.distributed.barrier()
