"""A training loop in plain torch and transformers, one row at a time, to hold verl's trainer against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from verl_dft.data.dataset import RowDataset, load_dataset
from verl_dft.objectives import Objective, TokenBatch
from verl_dft.training.batches import StepBatchSampler


@dataclass
class Run:
    """What happened: one entry per update."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def load_rows(path: Path, model: Path, cache: Path) -> RowDataset:
    """The rows as the trainer tokenises them."""
    from transformers import AutoTokenizer

    return load_dataset(path, AutoTokenizer.from_pretrained(model), max_length=256, cache_dir=cache)


def load_model(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def targets(row: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Labels and mask of the positions that predict a trained token."""
    return row["input_ids"][1:], row["loss_mask"][1:].bool()


def logits(model: torch.nn.Module, row: dict[str, Tensor]) -> Tensor:
    """[T - 1, V] of one row."""
    return model(row["input_ids"][None]).logits[0, :-1]


def logp(model: torch.nn.Module, row: dict[str, Tensor]) -> Tensor:
    """[T - 1] log-probs of one row's tokens."""
    return logits(model, row).log_softmax(-1).gather(-1, targets(row)[0][:, None])[:, 0]


def kl(reference: torch.nn.Module, model: torch.nn.Module, row: dict[str, Tensor]) -> Tensor:
    """[T - 1] KL(reference || model)."""
    with torch.no_grad():
        log_q = logits(reference, row).log_softmax(-1)
    return (log_q.exp() * (log_q - logits(model, row).log_softmax(-1))).sum(-1)


def batches(rows: RowDataset, size: int, steps: int, updates: int = 1) -> list[list[list[int]]]:
    """Row indices by step and mini-batch, seed 1, one rank."""
    sampler = StepBatchSampler(rows.lengths, size, dp_size=1, dp_rank=None, seed=1, balance=False, updates=updates)
    found = [sampler.rows(step // len(sampler), step % len(sampler)) for step in range(steps)]
    mini = size // updates
    return [[batch[i : i + mini] for i in range(0, size, mini)] for batch in found]


def train(
    model: torch.nn.Module,
    rows: RowDataset,
    plan: Sequence[Sequence[Sequence[int]]],
    objective: Objective,
    lr: float,
    ema_decay: float | None = None,
    beside: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda row: {},
) -> Run:
    """Plain SGD on the token mean of ``objective``; ``model`` is changed.

    Args:
        plan: row indices by step and mini-batch.
        ema_decay: keep a moving average and provide ``ema_logp``.
        beside: further fields of a row, [T - 1] each.
    """
    run = Run()
    average = copy.deepcopy(model)
    for minis in plan:
        frozen = copy.deepcopy(model)
        for mini in minis:
            model.zero_grad()
            total = sum(int(targets(rows[i])[1].sum()) for i in mini)
            value = 0.0
            for i in mini:
                row = rows[i]
                fields = beside(row)
                with torch.no_grad():
                    fields["old_logp"] = logp(frozen, row)
                    if ema_decay is not None:
                        fields["ema_logp"] = logp(average, row)
                own = logp(model, row)
                seq = torch.zeros(len(own), dtype=torch.int64)
                batch = TokenBatch(logp=own, mask=targets(row)[1], seq=seq, num_seqs=1, **fields)
                loss = objective(batch).loss.sum() / total
                loss.backward()
                value += loss.item()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            run.losses.append(value)
            run.norms.append(torch.stack([g.norm() for g in grads]).norm().item())
            with torch.no_grad():
                for p in model.parameters():
                    p -= lr * p.grad
        if ema_decay is not None:
            with torch.no_grad():
                for a, p in zip(average.parameters(), model.parameters(), strict=True):
                    a.mul_(ema_decay).add_(p, alpha=1 - ema_decay)
    return run
