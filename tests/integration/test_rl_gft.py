"""Online GFT on the tiny world, with what reaches the loss of the actor (``rl_capture.py``).

Groups of 1 expert's, 3 teacher's and 4 of the policy's responses to 8 problems a step, one update per step.
"""

import json
import math
import os
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HERE
from rl_capture import VARIABLE

from verl_dft.build.groups import advantages
from verl_dft.data.arithmetic import expert, generate, split_of, teacher
from verl_dft.data.dataset import load_dataset
from verl_dft.data.records import Problem, Row, write_problems, write_rows
from verl_dft.origins import ORIGINS
from verl_dft.training.metrics import read_metrics
from verl_dft.training.resume import completed_steps

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]
STEPS, BATCH, TOKENS = 3, 8, 96
GROUP = ["expert", *["teacher"] * 3, *["self"] * 4]
SELF = ORIGINS.index("self")
LEVELS = (0.1, 0.3, 0.3, 0.2, 0.1)
Key = tuple[int, str, int]
"""Step, problem and number in the group."""


def make_problems(num: int) -> list[Problem]:
    """Problems with three texts of the teacher, and one with a text that is too long for a response."""
    rng, made = random.Random(3), []
    while len(made) < num:
        drawn = generate(rng.choices(range(1, 6), LEVELS)[0], rng)
        if split_of(drawn) == "train":
            texts = [teacher(drawn, rng) for _ in range(3)]
            made.append(Problem(f"p{len(made)}", drawn.question, str(drawn.answer), expert(drawn, rng), texts))
    long = Problem("long", "How many ?", "3", "3", ["3", " 1" * TOKENS, "3"])
    return [*made[: num // 2], long, *made[num // 2 :]]


class Run:
    """A finished run: ``rows`` by key, ``updates`` (gradients by parameter, unclipped), ``metrics`` by step."""

    def __init__(self, folder: Path, capture: Path) -> None:
        self.folder, self.metrics = folder, [m for m in read_metrics(folder / "metrics.jsonl") if m["step"] > 0]
        self.micros = [torch.load(file, weights_only=False) for file in sorted(capture.glob("loss-*.pt"))]
        self.updates = [torch.load(file) for file in sorted(capture.glob("update-0-*.pt"))]
        self.rows: dict[Key, dict[str, Any]] = {}
        for micro in self.micros:
            origins, behavior = micro["rows"]
            for i in range(len(origins)):
                row = {name: value[i] for name, value in micro.items() if isinstance(value, list) and i < len(value)}
                row |= {"told_origin": int(origins[i]), "behavior": behavior[i]}
                key = (row["global_steps"], row["extra_info"]["problem_id"], row["session_id"])
                assert key not in self.rows
                self.rows[key] = row


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return make_problems(STEPS * BATCH)


@pytest.fixture(scope="module")
def trained(run_cli: Callable, problems: list[Problem], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """``trained(name, *overrides)``: the run ``name``, made once."""
    folder, made = tmp_path_factory.mktemp("gft"), {}
    write_problems(folder / "problems.jsonl", problems)

    def run(name: str, *more: str) -> Run:
        if name not in made:
            capture = folder / f"{name}-capture"
            capture.mkdir()
            optim = "actor_rollout_ref.actor.optim"
            args = ["rl", "--config-name", "tiny/rl", "algorithm=gft", "data=files", f"output_dir={folder / name}"]
            args += [f"data.train_files={folder / 'problems.jsonl'}", f"data.train_batch_size={BATCH}"]
            args += [f"trainer.total_training_steps={STEPS}", "trainer.logger=[console]", f"{optim}.lr=1e-3"]
            args += [f"+{optim}.override_optimizer_config={{eps:1e-3}}"]  # as conftest.STEADY
            args += ["actor_rollout_ref.rollout.gpu_memory_utilization=0.1"]
            done = run_cli([*args, *more], timeout=900, env=environment(capture))
            assert done.rc == 0, done.stdout[-3000:] + done.stderr[-3000:]
            made[name] = Run(folder / name, capture)
        return made[name]

    return run


def environment(capture: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    return {VARIABLE: str(capture), "VERL_USE_EXTERNAL_MODULES": "rl_capture", "PYTHONPATH": path}


@pytest.fixture(scope="module")
def one(trained: Callable[..., Run]) -> Run:
    return trained("one")


def groups_of(run: Run) -> list[list[dict[str, Any]]]:
    """The groups of a run, each in the order of its sessions."""
    found = defaultdict(list)
    for key in sorted(run.rows):
        found[run.rows[key]["uid"]].append(run.rows[key])
    return list(found.values())


def test_groups_have_their_members(one: Run, problems: list[Problem]) -> None:
    report = json.loads((one.folder / "data" / "report.json").read_text())
    assert report["train"] == {"overlong": 1, "kept": STEPS * BATCH}
    groups = groups_of(one)
    assert len(groups) == STEPS * BATCH
    assert {group[0]["extra_info"]["problem_id"] for group in groups} == {p.id for p in problems} - {"long"}
    for group in groups:
        assert [row["session_id"] for row in group] == list(range(len(GROUP)))
        assert len({(row["extra_info"]["problem_id"], row["global_steps"]) for row in group}) == 1
        for name in ("told_origin", "origin"):
            assert [ORIGINS[int(row[name])] for row in group] == GROUP
        assert all(torch.equal(row["prompts"], group[0]["prompts"]) for row in group)
    texts = [{tuple(row["responses"].tolist()) for row in group[4:]} for group in groups]
    assert sum(len(different) > 1 for different in texts) > len(groups) / 2  # each has a seed of its own


def test_the_model_is_exported_and_the_checkpoint_whole(one: Run, tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    trained, base = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (one.folder / "model", tiny_base)
    )
    moved = [float((a - b).abs().max()) for a, b in zip(trained.parameters(), base.parameters(), strict=True)]
    assert 1e-6 < max(moved) < 1e-2  # Adam moves a weight by at most about the learning rate per step
    assert tokenizer_of(one.folder / "model").chat_template
    assert json.loads((one.folder / "model" / "trained_with.json").read_text())["turns"] == {"user": STEPS * BATCH}
    assert completed_steps(one.folder / "checkpoints") == [STEPS]
    for step in one.metrics:
        # vLLM sampled with the trainer's weights: some 1e-3 where a weight sync has failed
        assert step["rollout_corr/log_ppl_abs_diff"] < 1e-5 and step["training/rollout_probs_diff_mean"] < 1e-5
        assert step["actor/grad_norm"] > 0 and all(math.isfinite(value) for value in step.values())


def test_demonstrations_have_the_tokens_of_offline_training(
    one: Run, problems: list[Problem], tiny_base: Path, tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(tiny_base)
    texts = {p.id: [p.solution, *(p.teacher_solutions or [])] for p in problems if p.id != "long"}
    rows, keys = [], []
    for problem in problems:
        for number, text in enumerate(texts.get(problem.id, ())):
            talk = [{"role": "user", "content": problem.problem}, {"role": "assistant", "content": text}]
            rows.append(Row(talk, problem.id, "expert"))
            keys.append((problem.id, number))
    write_rows(tmp_path / "rows.parquet", rows)
    dataset = load_dataset(tmp_path / "rows.parquet", tokenizer, max_length=256, cache_dir=tmp_path)
    offline = {key: dataset[i] for i, key in enumerate(keys)}
    compared = 0
    for (_, problem, number), row in one.rows.items():
        if number >= 4:
            continue
        item = offline[problem, number]
        assert torch.equal(row["input_ids"], item["input_ids"])
        trained = item["loss_mask"].bool()
        assert torch.equal(row["prompts"], item["input_ids"][~trained])
        assert torch.equal(row["responses"], item["input_ids"][trained])
        assert row["responses"][-1] == tokenizer.eos_token_id
        compared += 1
    assert compared == STEPS * BATCH * 4


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_masks(one: Run, tiny_base: Path) -> None:
    """Every token of a response and nothing else: by the masks, and by the loss that verl computed with them."""
    end = tokenizer_of(tiny_base).eos_token_id
    for row in one.rows.values():
        length = len(row["responses"])
        assert torch.equal(row["input_ids"], torch.cat([row["prompts"], row["responses"]]))
        assert row["response_mask"].tolist() == row["loss_mask"].tolist() == [1] * length
        assert end not in row["responses"][:-1]
        assert row["responses"][-1] == end or length == TOKENS
    for micro in one.micros:
        total, tau = torch.zeros((), dtype=torch.float64), 0.7
        for i, response in enumerate(micro["responses"]):
            logp = micro["logp"][i][-len(response) - 1 : -1].double()  # verl's is at the position before the token
            advantage = micro["advantages"][i].double()
            weight = torch.where(logp.exp() < tau, logp.exp(), 1.0)
            total -= (advantage * weight * logp).sum()
        assert float(micro["loss"]) == pytest.approx(float(total) / micro["batch_num_tokens"], rel=1e-4, abs=1e-8)
    for step in range(1, STEPS + 1):
        tokens = sum(len(row["responses"]) for key, row in one.rows.items() if key[0] == step)
        assert {m["batch_num_tokens"] for m in one.micros if m["global_steps"][0] == step} == {tokens}
        assert one.metrics[step - 1]["actor/tokens"] == tokens


def test_advantages_are_those_of_the_rewards(one: Run) -> None:
    mixed = 0
    for group in groups_of(one):
        rewards = np.array([float(row["rm_scores"].sum()) for row in group])
        assert all(float(row["rm_scores"][:-1].abs().sum()) == 0 for row in group)
        assert set(rewards) <= {0.0, 1.0} and rewards[:4].tolist() == [1, 1, 1, 1]
        for row, reward in zip(group, rewards, strict=True):
            assert (row["extra_fields"]["reward_extra_info"]["verdict"] == "correct") == bool(reward)
        equal = (rewards == rewards[0]).all()
        direct = np.zeros(8) if equal else (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        mixed += not equal
        for row, value in zip(group, direct, strict=True):
            np.testing.assert_allclose(row["advantages"].double().numpy(), value, rtol=1e-5, atol=0)
    assert mixed > BATCH  # groups that teach something


def test_sampler_log_probs(one: Run) -> None:
    for step in range(1, STEPS + 1):
        rows = [row for key, row in one.rows.items() if key[0] == step]
        for row in rows:
            told = row["behavior"][: len(row["responses"])]
            if int(row["origin"]) == SELF:
                assert torch.equal(told, row["rollout_log_probs"])
            else:
                assert torch.equal(row["rollout_log_probs"], row["old_log_probs"]) and told.isnan().all()
        own = [row for row in rows if int(row["origin"]) == SELF]
        assert len(own) == 4 * BATCH
        old, sampled = (torch.cat([r[name] for r in own]).double() for name in ("old_log_probs", "rollout_log_probs"))
        metrics = one.metrics[step - 1]
        probs, logs = (old.exp() - sampled.exp()).abs(), (old - sampled).abs()
        assert 0 < float(logs.mean()) < 1e-5
        assert metrics["training/rollout_probs_diff_mean"] == pytest.approx(float(probs.mean()), rel=1e-2)
        assert metrics["training/rollout_logp_diff_mean"] == pytest.approx(float(logs.mean()), rel=1e-2)
        assert metrics["training/rollout_logp_diff_max"] == pytest.approx(float(logs.max()), rel=1e-2)
        reward = np.mean([float(row["rm_scores"].sum()) for row in own])
        assert metrics["rows/self_reward"] == pytest.approx(reward)
        shares = [metrics[f"rows/{origin}_frac"] for origin in ORIGINS]
        assert shares == [GROUP.count(origin) / len(GROUP) for origin in ORIGINS]


def test_offline_training_on_the_same_groups_has_the_same_gradient(
    one: Run, problems: list[Problem], tiny_base: Path, run_cli: Callable, tmp_path: Path
) -> None:
    """``verl-dft train objective=gft`` on rows of the first step's texts and rewards, against the online update."""
    asked, rows = {p.id: p for p in problems}, []
    for group in groups_of(one):
        if group[0]["global_steps"] != 1:
            continue
        values = advantages([float(row["rm_scores"].sum()) for row in group])
        for number, (row, value) in enumerate(zip(group, values, strict=True)):
            problem = asked[row["extra_info"]["problem_id"]]
            made = Row([{"role": "user", "content": problem.problem}], problem.id, GROUP[number])
            if number < 4:
                text = [problem.solution, *(problem.teacher_solutions or [])][number]
                made.messages.append({"role": "assistant", "content": text})
            else:
                made.response_ids, made.finish_reason = row["responses"].tolist(), "length"  # as they are
            made.group_id, made.advantage = problem.id, float(value)
            rows.append(made)
    assert len(rows) == 64
    write_rows(tmp_path / "rows.parquet", rows)
    args = ["train", "objective=gft", f"model={tiny_base}", f"data={tmp_path / 'rows.parquet'}", "trainer.logger=[]"]
    args += ["data.max_length=256", "data.train_batch_size=64", f"data.cache_dir={tmp_path}", "precision=fp32"]
    args += [f"output_dir={tmp_path / 'run'}"]
    done = run_cli(args, timeout=300, env=environment(tmp_path))
    assert done.rc == 0, done.stdout[-3000:] + done.stderr[-3000:]

    (offline,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert offline["train/num_tokens"] == one.metrics[0]["actor/tokens"]
    assert offline["train/loss"] == pytest.approx(one.metrics[0]["actor/pg_loss"], rel=1e-4)
    for name in ("nll", "token_weight", "rectified_frac", "advantage"):
        assert offline[f"train/{name}"] == pytest.approx(one.metrics[0][f"actor/{name}"], rel=1e-4), name
    assert_same_gradient(torch.load(tmp_path / "update-0-000.pt"), one.updates[0], 1e-6)


def assert_same_gradient(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], rtol: float) -> None:
    """The largest difference of any element is at most ``rtol`` of the gradient's norm."""
    assert first.keys() == second.keys() and len(first) > 20
    norm = float(torch.cat([value.flatten() for value in second.values()]).norm())
    assert norm > 0.01
    for name, value in first.items():
        assert float((value - second[name]).abs().max()) <= rtol * norm, name


def assert_same_run(first: Run, second: Run) -> None:
    """Equal texts, rewards and advantages; log-probs, losses and gradients within float32's rounding."""
    assert first.rows.keys() == second.rows.keys()
    for key, row in first.rows.items():
        other = second.rows[key]
        for name in ("input_ids", "responses", "rm_scores", "advantages", "response_mask"):
            assert torch.equal(row[name], other[name]), (key, name)
        assert row["told_origin"] == other["told_origin"]
        torch.testing.assert_close(row["old_log_probs"], other["old_log_probs"], rtol=0, atol=2e-5)
    assert len(first.updates) == len(second.updates) == STEPS
    for a, b in zip(first.updates, second.updates, strict=True):
        assert_same_gradient(a, b, 1e-5)
    for a, b in zip(first.metrics, second.metrics, strict=True):
        for name in ("actor/pg_loss", "actor/nll", "actor/token_weight", "actor/grad_norm", "actor/tokens"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
        for name in ("rows/self_reward", "critic/rewards/mean", "response_length/mean"):
            assert b[name] == a[name], name


@pytest.mark.nightly
def test_two_ranks_and_two_replicas_agree_with_one(one: Run, trained: Callable[..., Run]) -> None:
    two = trained("two", "trainer.n_gpus_per_node=2")
    assert {file.name.split("-")[1] for file in two.folder.parent.glob("two-capture/loss-*")} == {"0", "1"}
    assert_same_run(one, two)


@pytest.mark.nightly
def test_seeds_decide_the_responses_however_vllm_batches(one: Run, trained: Callable[..., Run]) -> None:
    """The same run with prefills of at most 384 tokens at a time, a third of a step's prompts."""
    prompts = sum(len(row["prompts"]) for key, row in one.rows.items() if key[0] == 1 and key[2] >= 4)
    assert prompts > 2 * 384
    again = trained("again", "actor_rollout_ref.rollout.max_num_batched_tokens=384")
    assert_same_run(one, again)
