"""Data rewriting while training, on hard problems of the tiny world, with what reaches the loss (``rl_capture.py``)."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HERE
from rl_capture import VARIABLE

from verl_dft.data.arithmetic import make_problems
from verl_dft.data.records import Problem, write_problems
from verl_dft.data.template import ConversationEncoder
from verl_dft.origins import ORIGINS
from verl_dft.training.metrics import read_metrics
from verl_dft.training.online.rewrite_loop import STAGES

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow, pytest.mark.nightly]
STEPS, BATCH = 3, 16
LOSS = "actor_rollout_ref.actor.policy_loss"
Captured = tuple[list[dict[str, Any]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    """Some with the answer wrong in the data: nobody's response is right, and the expert's text is what is left."""
    made = make_problems(STEPS * BATCH, seed=11, level_weights=(0, 0.1, 0.2, 0.3, 0.4))
    for problem in made[::12]:
        problem.answer = "1000"
    return [*made, Problem("unjudged", made[0].problem, "\\frac{7", made[0].solution)]


@pytest.fixture(scope="module")
def train(run_cli: Callable, problems: list[Problem], tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """``train(steps, *overrides)``: micro-batches at the loss, and the metrics of each step."""

    def run(steps: int, *more: str) -> Captured:
        folder = tmp_path_factory.mktemp("rewrite")
        (folder / "capture").mkdir()
        write_problems(folder / "problems.jsonl", problems)
        args = [
            "rl",
            "--config-name",
            "tiny/rl",
            "algorithm=online_rewrite",
            "data=files",
            f"output_dir={folder / 'run'}",
        ]
        args += [f"data.train_files={folder / 'problems.jsonl'}", f"data.train_batch_size={BATCH}"]
        args += [f"trainer.total_training_steps={steps}", "trainer.logger=[console]", *more]
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        env = {VARIABLE: str(folder / "capture"), "VERL_USE_EXTERNAL_MODULES": "rl_capture", "PYTHONPATH": path}
        done = run_cli(args, timeout=900, env=env)
        assert done.rc == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "gold_not_judged 1" in done.stderr
        micros = [torch.load(file, weights_only=False) for file in sorted((folder / "capture").glob("loss-*.pt"))]
        return micros, read_metrics(folder / "run" / "metrics.jsonl")

    return run


@pytest.fixture(scope="module")
def run(train: Callable) -> Captured:
    return train(STEPS)


def rows_of(micros: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The captured rows; ``told`` and ``behavior`` are what the objective gets."""
    found = []
    for micro in micros:
        origins, behavior = micro["rows"]
        for i, origin in enumerate(origins.tolist()):
            row = {name: value[i] for name, value in micro.items() if isinstance(value, list) and i < len(value)}
            found.append({**row, "told": ORIGINS[origin], "behavior": behavior[i, : len(row["responses"])]})
    return found


def test_stages_and_what_they_took(run: Captured) -> None:
    rows, metrics = rows_of(run[0]), run[1]
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1)) and len(rows) == STEPS * BATCH
    assert len({row["extra_info"]["problem_id"] for row in rows}) == STEPS * BATCH
    found = Counter(STAGES[row["extra_fields"]["stage"]] for row in rows)
    assert set(found) == set(STAGES) and found["fallback"] >= 4
    for row in rows:
        stage, drawn = STAGES[row["extra_fields"]["stage"]], row["extra_fields"]["sampled"]
        assert row["told"] == {"fallback": "expert"}.get(stage, stage)
        assert drawn in {"self": (2, 4), "guided": (6, 8), "fallback": (8,)}[stage]
    for number, reported in enumerate(metrics, 1):
        mine = [row for row in rows if row["global_steps"] == number]
        assert len(mine) == BATCH
        for index, stage in enumerate(STAGES):
            share = sum(row["extra_fields"]["stage"] == index for row in mine) / BATCH
            assert reported[f"rewrite/{stage}_frac"] == pytest.approx(share)
        for name in ("sampled", "sampled_tokens"):
            mean = sum(row["extra_fields"][name] for row in mine) / BATCH
            assert reported[f"rewrite/{name}"] == pytest.approx(mean) and mean >= 2
        assert reported["rewrite/no_verdict"] == 0 and reported["training/rollout_probs_diff_mean"] < 1e-5


def test_every_row_answers_the_plain_problem(run: Captured, problems: list[Problem], tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    encoder, asked = ConversationEncoder(tokenizer), {problem.id: problem for problem in problems}
    for row in rows_of(run[0]):
        problem = asked[row["extra_info"]["problem_id"]]
        turns = [{"role": "user", "content": problem.problem}, {"role": "assistant", "content": problem.solution}]
        (expert,) = encoder.encode([turns], lambda _: "")
        assert row["prompts"].tolist() == list(expert.prompt)
        assert row["response_mask"].tolist() == [1] * len(row["responses"])
        assert int(row["responses"][-1]) in encoder.end_ids
        if row["told"] == "expert":
            assert row["responses"].tolist() == list(expert.response)
        else:  # kept because it is right
            assert float(row["rm_scores"].sum()) == 1 and problem.answer != "1000"


def test_only_its_own_responses_have_the_samplers_log_probs(run: Captured) -> None:
    for row in rows_of(run[0]):
        if row["told"] == "self":
            assert torch.equal(row["behavior"], row["rollout_log_probs"])
            torch.testing.assert_close(row["behavior"], row["old_log_probs"], rtol=0, atol=1e-3)
        else:
            assert row["behavior"].isnan().all()


def weighted(micro: dict[str, Any], self_ratio: bool) -> float:
    """The loss by hand: p over the sampler's probability in own rows (or p), p in the others."""
    total = 0.0
    for i, response in enumerate(micro["responses"]):
        logp = micro["logp"][i][-len(response) - 1 : -1].double()  # verl's is at the position before the token
        own = self_ratio and ORIGINS[int(micro["rows"][0][i])] == "self"
        behavior = micro["rollout_log_probs"][i].double() if own else torch.zeros_like(logp)
        total -= float(((logp - behavior).exp() * logp).sum())
    return total / micro["batch_num_tokens"]


def test_the_loss_is_is_sfts(run: Captured) -> None:
    micros, metrics = run
    for micro in micros:
        assert float(micro["loss"]) == pytest.approx(weighted(micro, True), rel=1e-4, abs=1e-8)
    for reported in metrics:
        assert reported["actor/stored_frac"] == reported["actor/self_frac"] > 0 == reported["actor/unknown_frac"]


def test_with_dft(train: Callable) -> None:
    micros, metrics = train(1, f"{LOSS}.loss_mode=dft", f"~{LOSS}.objective.behavior")
    assert len(metrics) == 1 and metrics[0]["rewrite/self_frac"] > 0
    for micro in micros:
        assert float(micro["loss"]) == pytest.approx(weighted(micro, False), rel=1e-4, abs=1e-8)
