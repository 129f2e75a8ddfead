"""LUFFY and CHORD on the tiny world: own responses and demonstrations in one step, each with its loss."""

import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import HERE
from rl_capture import VARIABLE

from verl_dft.origins import ORIGINS
from verl_dft.training.metrics import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]
BATCH, GROUP = 8, ["expert", *["self"] * 7]
ACTOR = "actor_rollout_ref.actor"
Captured = tuple[list[dict[str, Any]], list[dict[str, Any]]]


@pytest.fixture
def train(run_cli: Callable, tmp_path: Any) -> Callable[..., Captured]:
    """``train(algorithm, steps, *overrides)``: micro-batches at the loss, and the metrics of each step."""

    def run(algorithm: str, steps: int, *more: str) -> Captured:
        (tmp_path / "capture").mkdir()
        args = ["rl", "--config-name", "tiny/rl", f"algorithm={algorithm}", f"output_dir={tmp_path / 'run'}"]
        args += [f"data.train_batch_size={BATCH}", f"trainer.total_training_steps={steps}", "trainer.logger=[console]"]
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        env = {VARIABLE: str(tmp_path / "capture"), "VERL_USE_EXTERNAL_MODULES": "rl_capture", "PYTHONPATH": path}
        done = run_cli([*args, *more], timeout=900, env=env)
        assert done.rc == 0, done.stdout[-3000:] + done.stderr[-3000:]
        micros = [torch.load(file, weights_only=False) for file in sorted((tmp_path / "capture").glob("loss-*.pt"))]
        return micros, read_metrics(tmp_path / "run" / "metrics.jsonl")

    return run


def rows_of(micro: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a micro-batch, with the log-probs of the response's tokens now and at the start of the step."""
    found = []
    for i, origin in enumerate(micro["rows"][0].tolist()):
        row = {name: value[i] for name, value in micro.items() if isinstance(value, list) and i < len(value)}
        length = len(row["responses"])
        row |= {"who": ORIGINS[origin], "now": micro["logp"][i][-length - 1 : -1].double()}
        found.append({**row, "old": row["old_log_probs"].double(), "a": row["advantages"].double()})
    return found


def clipped(row: dict[str, Any]) -> torch.Tensor:
    """GRPO's token losses with clip 0.2."""
    ratio = (row["now"] - row["old"]).exp()
    return -torch.minimum(ratio * row["a"], ratio.clamp(0.8, 1.2) * row["a"])


@pytest.mark.nightly
def test_luffy(train: Callable[..., Captured]) -> None:
    micros, metrics = train(
        "luffy", 2, f"{ACTOR}.ppo_mini_batch_size=4", f"{ACTOR}.entropy_coeff=0", f"{ACTOR}.optim.lr=1e-3"
    )
    moved = 0.0
    for micro in micros:
        total = 0.0
        for row in rows_of(micro):
            p = row["now"].exp()
            loss = clipped(row) if row["who"] == "self" else -row["a"] * p / (p + 0.1)
            total += float(loss.sum())
            moved = max(moved, float((row["now"] - row["old"]).abs().max()))
        assert float(micro["loss"]) == pytest.approx(total / micro["batch_num_tokens"], rel=1e-4, abs=1e-7)
    assert moved > 1e-3, "the second update of a step has ratios"
    for step in metrics:
        assert step["rows/expert_frac"] == 1 / 8 and 0 < step["actor/others_frac"] < 1
        assert step["rows/expert_reward"] == 1


@pytest.mark.nightly
def test_chord(train: Callable[..., Captured]) -> None:
    """With a decay of 2 steps mu is 0.9, then half-way, then 0.05; the shares are of each step's tokens."""
    micros, metrics = train("chord", 3, "mix.decay_steps=2")
    steps, groups = defaultdict(list), defaultdict(list)
    for micro in micros:
        rows = rows_of(micro)
        steps[rows[0]["global_steps"]] += rows
        total = 0.0
        for row in rows:
            groups[row["uid"]].append(row)
            loss = clipped(row) if row["who"] == "self" else -row["now"]
            total += float((loss * row["rollout_is_weights"].double()).sum())
        assert float(micro["loss"]) == pytest.approx(total / micro["batch_num_tokens"], rel=1e-4, abs=1e-7)
    for number, mu in ((1, 0.9), (2, 0.475), (3, 0.05)):
        rows, reported = steps[number], metrics[number - 1]
        tokens = {who: sum(len(row["responses"]) for row in rows if row["who"] == who) for who in set(GROUP)}
        assert reported["mix/mu"] == pytest.approx(mu) and len(rows) == BATCH * len(GROUP)
        weight = {who: share * sum(tokens.values()) / tokens[who] for who, share in (("self", 1 - mu), ("expert", mu))}
        for row in rows:
            assert row["rollout_is_weights"].tolist() == pytest.approx([weight[row["who"]]] * len(row["responses"]))
        sums = {who: sum(float((clipped(row) if who == "self" else -row["now"]).sum())
                         for row in rows if row["who"] == who) for who in weight}  # fmt: skip
        expected = (1 - mu) * sums["self"] / tokens["self"] + mu * sums["expert"] / tokens["expert"]
        assert reported["actor/pg_loss"] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    mixed = 0
    for group in groups.values():
        own = [row for row in group if row["who"] == "self"]
        rewards = torch.tensor([float(row["rm_scores"].sum()) for row in own])
        equal = bool((rewards == rewards[0]).all())
        direct = torch.zeros(7) if equal else (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        mixed += not equal
        for row, value in zip(own, direct.tolist(), strict=True):
            assert row["a"].tolist() == pytest.approx([value] * len(row["responses"]), rel=1e-5)
    assert mixed > BATCH
