"""The bridge on plain tensors: alignment, reductions against direct sums, rank invariance, metrics."""

import math

import pytest
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from verl_dft.objectives import TokenBatch, TokenLoss, get_objective
from verl_dft.training.bridge import SUMS, LossBridge, ScoreBridge, loss_weight, shift_left
from verl_dft.training.configure import REDUCTIONS
from verl_dft.training.logprob import token_logp

VOCAB = 11
LENGTHS, PROMPTS = [6, 3, 8, 4], [2, 1, 5, 3]


def rows(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length, prompt in zip(LENGTHS, PROMPTS, strict=True):
        ids = torch.randint(VOCAB, (length,), generator=generator)
        mask = (torch.arange(length) >= prompt).long()
        found.append({"ids": ids, "mask": mask, "logits": torch.randn(length, VOCAB, generator=generator)})
    return found


def nested(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)


def micro_batch(part: list[dict[str, torch.Tensor]], **facts: object) -> TensorDict:
    columns = {"input_ids": nested([r["ids"] for r in part]), "loss_mask": nested([r["mask"] for r in part])}
    for name in ("advantage", "ref_logp", "behavior_logp"):
        if name in part[0]:
            columns[name] = nested([r[name] for r in part])
    return tu.get_tensordict(columns, facts)


def run(bridge: LossBridge, part: list[dict[str, torch.Tensor]], logits: torch.Tensor, **facts: object):
    """Both of verl's calls on one micro-batch."""
    data = micro_batch(part, **facts)
    hook = bridge(student_logits=logits[None], data=data)
    offsets = data["input_ids"].offsets()
    output = {name: torch.nested.nested_tensor_from_jagged(v.squeeze(0), offsets) for name, v in hook.items()}
    return bridge(model_output=output, data=data, dp_group=None)


def direct(part: list[dict[str, torch.Tensor]], weighted: bool = True) -> list[torch.Tensor]:
    """Token losses of each row, indexed by hand: token t is predicted by the logits at t - 1."""
    found = []
    for row in part:
        log_p = row["logits"].log_softmax(-1)
        trained = [t for t in range(len(row["ids"])) if row["mask"][t]]
        logp = torch.stack([log_p[t - 1, row["ids"][t]] for t in trained])
        found.append(-(logp.exp() if weighted else 1) * logp)
    return found


def test_shift_left_keeps_rows_apart() -> None:
    shifted = shift_left(torch.arange(6.0), torch.tensor([0, 2, 6]), fill=-1.0)
    assert shifted.tolist() == [1, -1, 3, 4, 5, -1]


def expected(reduction: str, ranks: list[list[list[dict]]]) -> float:
    """Mean over ranks of the summed micro-batch losses, from the definition of each reduction."""
    tokens = [[torch.cat(direct(micro)) for micro in rank] for rank in ranks]
    everything = torch.cat([micro for rank in tokens for micro in rank])
    match reduction:
        case "token_mean":
            return float(everything.mean())
        case "sequence_sum":
            return float(everything.sum() / len(LENGTHS))
        case "micro_batch_mean":
            return sum(float(sum(m.mean() for m in rank) / len(rank)) for rank in tokens) / len(tokens)
        case "micro_batch_sum":
            return sum(float(sum(m.mean() for m in rank)) for rank in tokens) / len(tokens)
    raise AssertionError(reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "split",
    [[[[0, 1, 2, 3]]], [[[0, 1], [2, 3]]], [[[0, 3]], [[1, 2]]], [[[0], [3]], [[1], [2]]]],
    ids=["1x1", "1x2", "2x1", "2x2"],
)
def test_reduction_equals_its_definition(reduction: str, split: list[list[list[int]]]) -> None:
    every = rows()
    ranks = [[[every[i] for i in micro] for micro in rank] for rank in split]
    tokens = sum(int(r["mask"].sum()) for r in every)
    total = 0.0
    for rank in ranks:
        for micro in rank:
            facts = {"dp_size": len(ranks), "batch_num_tokens": tokens, "batch_num_seqs": len(every)}
            logits = torch.cat([r["logits"] for r in micro])
            loss, _ = run(
                LossBridge(get_objective("dft"), reduction), micro, logits, **facts, num_micro_batches=len(rank)
            )
            total += float(loss) / len(ranks)  # FSDP averages over ranks
    assert math.isclose(total, expected(reduction, ranks), rel_tol=1e-5)


def test_gradient_reaches_only_the_predicting_positions() -> None:
    every = rows()
    logits = torch.cat([r["logits"] for r in every]).requires_grad_()
    facts = {"dp_size": 1, "batch_num_tokens": 10, "batch_num_seqs": 4}
    loss, _ = run(LossBridge(get_objective("sft")), every, logits, **facts)
    loss.backward()
    positions, start = [], 0
    for length, prompt in zip(LENGTHS, PROMPTS, strict=True):
        positions += [prompt - 1 <= t < length - 1 for t in range(length)]
        start += length
    assert [bool(row.abs().sum() > 0) for row in logits.grad] == positions


def test_sums_are_numerators() -> None:
    every = rows()
    facts = {"dp_size": 1, "batch_num_tokens": 10, "batch_num_seqs": 4}
    logits = torch.cat([r["logits"] for r in every])
    _, metrics = run(LossBridge(get_objective("dft")), every, logits, **facts)
    sums = metrics[SUMS]
    assert sums["tokens"] == sum(int(r["mask"].sum()) for r in every)
    assert math.isclose(sums["nll"], float(torch.cat(direct(every, weighted=False)).sum()), rel_tol=1e-5)
    assert math.isclose(sums["objective"], float(torch.cat(direct(every)).sum()), rel_tol=1e-5)


class Columns:
    """Shows what it was given."""

    requires = frozenset({"advantage", "ref_logp", "behavior_logp", "entropy"})

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        self.seen = batch
        return TokenLoss(torch.zeros_like(batch.logp), {"answer": torch.tensor(2.0)})


def test_columns_arrive_at_the_position_that_predicts_their_token() -> None:
    every = rows()
    for index, row in enumerate(every):
        length = len(row["ids"])
        row["advantage"] = torch.tensor([float(index)])
        row["ref_logp"] = torch.arange(length, dtype=torch.float32) + 100 * index
        row["behavior_logp"] = torch.full((length,), math.nan)
    objective = Columns()
    logits = torch.cat([r["logits"] for r in every])
    facts = {"dp_size": 1, "batch_num_tokens": 10, "batch_num_seqs": 4}
    _, metrics = run(LossBridge(objective), every, logits, **facts)
    batch = objective.seen
    start = 0
    for index, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        for t in range(prompt, length):
            at = start + t - 1
            assert batch.mask[at] and batch.ref_logp[at] == 100 * index + t
            assert batch.advantage[at] == index and batch.seq[at] == index and batch.behavior_logp[at].isnan()
        start += length
    assert int(batch.mask.sum()) == sum(int(r["mask"].sum()) for r in every)
    _, entropy = token_logp(logits, torch.zeros(len(logits), dtype=torch.int64), batch.mask, with_entropy=True)
    assert torch.allclose(batch.entropy, entropy)
    assert metrics[SUMS]["answer"] == 2.0 * metrics[SUMS]["tokens"]  # a scalar metric, weighted by tokens


def test_validation_without_the_objectives_columns_gives_nll_alone() -> None:
    every = rows()
    logits = torch.cat([r["logits"] for r in every])
    facts = {"dp_size": 1, "batch_num_tokens": 10, "batch_num_seqs": 4}
    loss, metrics = run(LossBridge(Columns()), every, logits, **facts, validation=True)
    assert float(loss) == 0 and set(metrics[SUMS]) == {"nll", "tokens"}
    with pytest.raises(AssertionError):
        run(LossBridge(Columns()), every, logits, **facts)


def test_scoring_computes_no_loss() -> None:
    every = rows()
    logits = torch.cat([r["logits"] for r in every])
    loss, metrics = run(ScoreBridge(get_objective("dft")), every, logits)
    assert float(loss) == 0 and metrics == {}


def test_loss_weight_of_a_micro_batch_without_tokens_is_finite() -> None:
    for reduction in REDUCTIONS:
        facts = {"dp_size": 2, "batch_tokens": 5, "batch_seqs": 2, "tokens": 0, "micros": 3}
        assert math.isfinite(loss_weight(reduction, **facts))
