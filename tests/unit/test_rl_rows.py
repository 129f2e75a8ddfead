"""Who wrote a row and what the sampler reported, from verl's nested columns to an objective; the metrics by writer."""

import math

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from verl.workers.config import FSDPActorConfig, PolicyLossConfig

from verl_dft.origins import ORIGINS
from verl_dft.training.online.rows import _difference, _metrics
from verl_dft.training.policy_rows import current_rows, online_loss

WRITERS = ("expert", "self", "guided", "self", "teacher")
LENGTHS = (3, 5, 1, 2, 4)
PROMPT = 2


def jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def columns(seed: int = 0) -> dict[str, list[Tensor]]:
    """A micro-batch in verl's columns, row by row; the first token of row 1 is masked (rejected, say)."""
    random = torch.Generator().manual_seed(seed)

    def each(extra: int = 0) -> list[Tensor]:
        return [-torch.rand(extra + length, generator=random) for length in LENGTHS]

    masks = [torch.ones(length, dtype=torch.int64) for length in LENGTHS]
    masks[1][0] = 0
    return {
        "log_probs": each(PROMPT),
        "prompts": [torch.ones(PROMPT, dtype=torch.int64) for _ in LENGTHS],
        "responses": [torch.ones(length, dtype=torch.int64) for length in LENGTHS],
        "response_mask": masks,
        "old_log_probs": each(),
        "rollout_log_probs": each(),
        "advantages": [torch.ones(length) for length in LENGTHS],
        "origin": [torch.tensor([ORIGINS.index(name)]) for name in WRITERS],
    }


def loss_of(given: dict[str, list[Tensor]], name: str, nested_origin: bool = True, **options: object) -> tuple:
    """The loss, its gradient by ``log_probs`` row and the metrics, through verl's own ``ppo_loss``."""
    leaves = [row.clone().requires_grad_() for row in given["log_probs"]]
    fields = {key: jagged(rows) for key, rows in given.items() if key != "log_probs"}
    if "origin" in given and not nested_origin:
        fields["origin"] = torch.stack(given["origin"])
    data = TensorDict(fields, batch_size=len(LENGTHS))
    tokens = int(sum(mask.sum() for mask in given["response_mask"]))
    for key, value in {"dp_size": 1, "batch_num_tokens": tokens, "global_batch_size": len(LENGTHS)}.items():
        data.set_non_tensor(key, value)
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=0.2,
        policy_loss=PolicyLossConfig(loss_mode=name, objective=options),
    )  # fmt: skip
    loss, metrics = online_loss(config=config, model_output={"log_probs": jagged(leaves)}, data=data)
    assert current_rows() is None
    loss.backward()
    return (
        float(loss.detach()),
        [leaf.grad for leaf in leaves],
        {key: float(value.aggregate()) for key, value in metrics.items()},
    )


def expected_is_sft(given: dict[str, list[Tensor]], known: bool = True) -> tuple[float, list[Tensor]]:
    """Loss and gradient with the sampler's log-probs for the policy's own rows and 1 for the others."""
    total, gradients, tokens = 0.0, [], int(sum(mask.sum() for mask in given["response_mask"]))
    for i, writer in enumerate(WRITERS):
        gradient = torch.zeros(PROMPT + LENGTHS[i])
        for t in range(LENGTHS[i]):
            if given["response_mask"][i][t]:
                logp = float(given["log_probs"][i][PROMPT - 1 + t])
                behavior = float(given["rollout_log_probs"][i][t]) if writer == "self" and known else 0.0
                weight = math.exp(logp - behavior)
                total -= weight * logp / tokens
                gradient[PROMPT - 1 + t] = -weight / tokens
        gradients.append(gradient)
    return total, gradients


@pytest.mark.parametrize("nested_origin", [True, False])
@pytest.mark.parametrize("behavior", ["self", "all"])
def test_is_sft_reads_writer_and_sampler(nested_origin: bool, behavior: str) -> None:
    """What the column holds for texts that others wrote is no log-prob, also where an objective asks for all."""
    given = columns()
    loss, gradients, metrics = loss_of(given, "is_sft", nested_origin, behavior=behavior, clip=None)
    expected, expected_gradients = expected_is_sft(given)
    assert loss == pytest.approx(expected, rel=1e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    trained = [int(mask.sum()) for mask in given["response_mask"]]
    for name in ORIGINS:
        share = sum(n for n, writer in zip(trained, WRITERS, strict=True) if writer == name) / sum(trained)
        assert metrics[f"actor/{name}_frac"] == pytest.approx(share), name
    assert metrics["actor/stored_frac"] == pytest.approx(6 / 14)
    assert metrics["actor/unknown_frac"] == pytest.approx(1 / 14 if behavior == "all" else 0)  # the guided one


def test_without_the_samplers_log_probs_they_are_unknown() -> None:
    """``rollout.calculate_log_probs=false``: the column is absent, and nothing takes its place."""
    given = columns()
    expected, _ = expected_is_sft(given, known=False)
    del given["rollout_log_probs"]
    loss, _, metrics = loss_of(given, "is_sft", behavior="self", clip=None)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert metrics["actor/stored_frac"] == 0 and metrics["actor/unknown_frac"] == pytest.approx(6 / 14)


def test_masked_tokens_and_the_log_probs_of_others_reach_nothing() -> None:
    given = columns()
    before = loss_of(given, "is_sft", behavior="self", clip=None)
    for i, writer in enumerate(WRITERS):
        if writer != "self":
            given["rollout_log_probs"][i][:] = 7.0
    for key, nonsense in (("rollout_log_probs", math.nan), ("old_log_probs", math.inf), ("advantages", math.nan)):
        given[key][1][0] = nonsense
    given["log_probs"][1][PROMPT - 1] = -math.inf
    for row in given["log_probs"]:
        row[0] = row[-1] = math.nan  # of prompt tokens, and after the end
    after = loss_of(given, "is_sft", behavior="self", clip=None)
    assert after[0] == before[0] and after[2] == before[2]
    assert all(torch.equal(a, b) for a, b in zip(after[1], before[1], strict=True))


def test_rows_of_verls_own_command_are_all_the_policys() -> None:
    given = columns()
    del given["origin"]
    metrics = loss_of(given, "is_sft", behavior="self", clip=None)[2]
    assert metrics["actor/self_frac"] == metrics["actor/stored_frac"] == pytest.approx(1)


def test_metrics_by_writer() -> None:
    origin = torch.tensor([ORIGINS.index(name) for name in ("expert", "self", "self", "teacher")])
    found = _metrics([{} for _ in origin], origin, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    fractions = {f"rows/{name}_frac": share for name, share in zip(ORIGINS, (0.25, 0.25, 0.5, 0.0), strict=True)}
    assert found == {**fractions, "rows/expert_reward": 1, "rows/teacher_reward": 1, "rows/self_reward": 0.5}


def test_the_samplers_difference_is_over_trained_tokens() -> None:
    old, sampled = (
        torch.tensor([[-1.0, -2.0, 0.0], [-1.0, 0.0, 0.0]]),
        torch.tensor([[-1.5, -2.0, 9.0], [-1.0, 9.0, 9.0]]),
    )
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    rows = TensorDict({"old_log_probs": old, "rollout_log_probs": sampled, "response_mask": mask}, batch_size=2)
    prefix = "training/rollout_logp_diff"
    assert _difference(rows) == {f"{prefix}_mean": pytest.approx(0.5 / 3), f"{prefix}_max": 0.5}
    rows["response_mask"] = torch.zeros_like(mask)
    assert _difference(rows) == {}
