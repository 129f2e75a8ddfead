"""DPO through TRL on the tiny world: what it trains on, its loss and gradient, its runs, kills and exports."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ForkServer, TrainArgv, assert_same_weights, losses, turn_a_bit, weights
from transformers import AutoModelForCausalLM

from verl_dft.data.arithmetic import make_problems
from verl_dft.data.sources import load_tokenizer
from verl_dft.data.template import ConversationEncoder
from verl_dft.training.preference import make_trainer, prepare
from verl_dft.training.resume import completed_steps

pytestmark = pytest.mark.integration
MAIN = "verl_dft.training.preference:main"
NUM_PAIRS, BATCH, BETA = 40, 8, 0.1
DpoArgv = Callable[..., list[str]]


@pytest.fixture(scope="module")
def pair_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Worked solutions against the same with another answer; a third of the pairs has sampled ids."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    rows = []
    for index, problem in enumerate(make_problems(NUM_PAIRS, 3)):
        wrong = problem.solution.replace(f"{{ {problem.answer} }}", f"{{ {int(problem.answer) + 1} }}")
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": problem.problem}], "problem_id": problem.id}
        row |= {"chosen": [{"role": "assistant", "content": problem.solution}]}
        row |= {"rejected": [{"role": "assistant", "content": wrong if index % 2 else f"{wrong} {wrong}"}]}
        row["rejected_ids"] = [9 + index, 10, 11, 12] if index % 3 == 0 else None
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def argv(pair_file: Path, small_model: Path) -> DpoArgv:
    """What the runs here have in common."""

    def build(out: Path, *overrides: str, model: Path = small_model) -> list[str]:
        common = (f"data={pair_file}", f"model={model}", f"output_dir={out}", f"data.train_batch_size={BATCH}")
        fixed = ("optim.lr=1e-2", "trainer.logger=[]", "hardware=cpu")
        return ["objective=dpo", *common, *fixed, "trainer.save_freq=2", *overrides]

    return build


# ---- one batch against a direct computation ----


def logps(model: torch.nn.Module, batch: list[Any], side: str) -> torch.Tensor:
    """[pairs] sum of the response's log-probs, from one unpadded sequence at a time."""
    sums = []
    for pair in batch:
        response = getattr(pair, side)
        ids = torch.from_numpy(np.concatenate([pair.prompt, response]).astype(np.int64))
        table = torch.log_softmax(model(ids[None]).logits[0, :-1], dim=-1)
        sums.append(table.gather(1, ids[1:, None])[len(pair.prompt) - 1 :].sum())
    return torch.stack(sums)


def in_double(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval()


@pytest.mark.parametrize("smoothing", [0.0, pytest.param(0.2, marks=pytest.mark.slow)])
def test_loss_and_gradient_of_a_batch_are_those_of_the_formula(
    argv: DpoArgv, small_model: Path, other_model: Path, tmp_path: Path, smoothing: float
) -> None:
    """DPO, arXiv 2305.18290, Eq. 7, in float64; with a reference that differs, so that margins are not 0."""
    one_pass = (f"data.micro_batch_size_per_gpu={BATCH}", f"objective.label_smoothing={smoothing}")
    config, pairs = prepare(argv(tmp_path, f"objective.beta={BETA}", f"reference.path={other_model}", *one_pass))
    trainer = make_trainer(config, pairs)
    batch = [pairs.pairs[i] for i in trainer.batches.rows(0)]
    inputs = next(iter(trainer.get_train_dataloader()))
    policy, reference = in_double(small_model), in_double(other_model)
    policy.requires_grad_(True)
    chosen, rejected = logps(policy, batch, "chosen"), logps(policy, batch, "rejected")

    with torch.no_grad():
        ours = trainer.concatenated_forward(trainer.model, inputs)
        base = trainer.compute_ref_log_probs(inputs)
        expected_base = [logps(reference, batch, side) for side in ("chosen", "rejected")]
    for found, expected in zip(
        [ours["chosen_logps"], ours["rejected_logps"], *base], [chosen, rejected, *expected_base], strict=True
    ):
        torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-4)

    margin = BETA * (chosen - expected_base[0] - rejected + expected_base[1])
    log_sigmoid = torch.nn.functional.logsigmoid
    direct = -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
    assert direct.detach().std() > 0.01
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, inputs)
    torch.testing.assert_close(loss.double(), direct.mean(), rtol=1e-5, atol=1e-6, check_dtype=False)
    loss.backward()
    direct.mean().backward()
    assert_same_gradients(trainer.model, policy)

    if not smoothing:  # the closed form: each pair pulls the harder, the more its implicit rewards are the wrong way
        policy.zero_grad()
        difference = logps(policy, batch, "chosen") - logps(policy, batch, "rejected")
        (-BETA * torch.sigmoid(-margin.detach()) * difference).mean().backward()
        assert_same_gradients(trainer.model, policy)


def assert_same_gradients(model: torch.nn.Module, exact: torch.nn.Module) -> None:
    expected = {name: parameter.grad for name, parameter in exact.named_parameters()}
    for name, parameter in model.named_parameters():
        tolerance = 1e-5 * float(expected[name].norm() + 1)
        torch.testing.assert_close(parameter.grad.double(), expected[name], rtol=1e-3, atol=tolerance)


def test_trl_trains_on_the_tokens_of_our_encoder(argv: DpoArgv, small_model: Path, tmp_path: Path) -> None:
    """And not on its own, which end a response twice."""
    from trl import DPOTrainer

    config, pairs = prepare(argv(tmp_path))
    trainer = make_trainer(config, pairs)
    tokenizer = load_tokenizer(str(small_model))
    encoder = ConversationEncoder(tokenizer)
    records = pq.read_table(config.data.train_files[0]).to_pylist()
    inputs = next(iter(trainer.get_train_dataloader()))
    for row, index in enumerate(trainer.batches.rows(0)[: len(inputs["prompt_input_ids"])]):
        record = records[index]
        for side in ("chosen", "rejected"):
            tokens = encoder.encode([[*record["prompt"], *record[side]]], lambda _: "x")[0]
            stored = record.get(f"{side}_ids")
            expected = [*stored, encoder.end_id] if stored else tokens.response
            kept = inputs[f"{side}_attention_mask"][row].bool()
            assert inputs[f"{side}_input_ids"][row][kept].tolist() == expected
            assert expected.count(encoder.end_id) == 1 and expected[-1] == encoder.end_id
        kept = inputs["prompt_attention_mask"][row].bool()
        assert inputs["prompt_input_ids"][row][kept].tolist() == tokens.prompt
        assert tokens.prompt == encoder.encode_prompts([record["prompt"]], lambda _: "x")[0]
    text = {"prompt": "a", "chosen": "b<|im_end|>\n", "rejected": "c<|im_end|>\n"}
    own = DPOTrainer.tokenize_row(text, tokenizer, add_special_tokens=False)["chosen_input_ids"]
    assert own.count(encoder.end_id) == 2, "TRL no longer appends a second end token"


# ---- runs ----


@pytest.fixture(scope="module")
def whole(ranks: ForkServer, argv: DpoArgv, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run: two epochs of five steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    ranks.ok(argv(out, "trainer.total_epochs=2", "optim.lr=1e-3", model=tiny_base), call=MAIN)
    return out


def test_the_loss_falls_from_ln_2_and_the_margin_grows(whole: Path) -> None:
    loss, margin = losses(whole), losses(whole, "train/reward_margin")
    assert len(loss) == 10 and loss[0] == pytest.approx(math.log(2), abs=1e-6) and margin[0] == 0
    assert np.mean(loss[5:]) < 0.6 and np.mean(margin[5:]) > 0.2 and margin[-1] > margin[1] > 0
    assert losses(whole, "train/reward_accuracy")[-1] > 0.8
    assert losses(whole, "train/lr")[0] == 1e-3, "no warm-up: 5% of 10 steps is less than one"


def test_what_a_run_reports_and_leaves(whole: Path, tiny_base: Path, pair_file: Path) -> None:
    from verl_dft.report.plots import read_metrics, series

    lines = read_metrics(whole / "metrics.jsonl")
    common = {"step", "train/loss", "train/nll", "train/objective", "train/grad_norm", "train/lr", "train/num_tokens",
              "train/global_tokens", "train/updates", "perf/step_s", "perf/tokens_per_s"}  # fmt: skip
    assert common <= lines[0].keys() and [line["step"] for line in lines] == list(range(1, 11))
    assert series(lines, "train/nll")[0] == list(range(1, 11))
    report = json.loads((whole / "data" / "report.json").read_text())["train"]
    assert sum(losses(whole, "train/num_tokens")) == 2 * report["num_trained_tokens"], "each pair once an epoch"
    manifest = json.loads((whole / "model.manifest.json").read_text())
    assert manifest["inputs"]["pairs 0"]["path"] == str(pair_file) and manifest["seed"] == 1
    assert completed_steps(whole / "checkpoints") == [8, 10]


def test_the_export_is_the_trained_model_ready_to_generate(whole: Path, tiny_base: Path) -> None:
    last = {name: value for name, value in weights(whole / "checkpoints" / "global_step_10").items()}
    exported, base = weights(whole / "model"), weights(tiny_base)
    assert last.keys() == exported.keys() == base.keys()
    for name, value in exported.items():
        np.testing.assert_array_equal(value, last[name], err_msg=name)
    assert max(np.abs(value - base[name]).max() for name, value in exported.items()) > 1e-3
    tokenizer = load_tokenizer(str(whole / "model"))
    assert tokenizer.chat_template == load_tokenizer(str(tiny_base)).chat_template
    generation = json.loads((whole / "model" / "generation_config.json").read_text())
    stops = generation["eos_token_id"]
    assert ConversationEncoder(tokenizer).end_id in (stops if isinstance(stops, list) else [stops])


@pytest.mark.parametrize(
    ("failpoint", "saved"),
    [
        ("preference.step:5", [2, 4]),
        pytest.param("checkpoint.before_marker:3", [2, 4], marks=pytest.mark.slow),
    ],
    ids=["after-an-update", "during-a-save"],
)
def test_killed_and_resumed(
    whole: Path, failpoint: str, saved: list[int], ranks: ForkServer, argv: DpoArgv, tiny_base: Path, tmp_path: Path
) -> None:
    command = argv(tmp_path / "run", "trainer.total_epochs=2", "optim.lr=1e-3", model=tiny_base)
    killed = ranks.run(command, call=MAIN, env={"VERL_DFT_FAILPOINT": failpoint})
    assert killed.codes == [-signal.SIGKILL] and completed_steps(tmp_path / "run" / "checkpoints") == saved
    file = tmp_path / "run" / "checkpoints" / "global_step_4" / "model.safetensors"
    turn_a_bit(file)
    refused = ranks.run(command, call=MAIN)
    assert refused.codes != [0] and f"{file} is damaged; delete {file.parent} and run" in refused.log
    turn_a_bit(file)  # back
    assert "resuming after step 4" in ranks.ok(command, call=MAIN)
    for key in ("train/loss", "train/grad_norm", "train/nll", "train/reward_margin", "train/lr"):
        assert losses(tmp_path / "run", key) == losses(whole, key), key
    assert_same_weights(tmp_path / "run" / "model", whole / "model", atol=0)
    assert completed_steps(tmp_path / "run" / "checkpoints") == completed_steps(whole / "checkpoints")


def test_a_finished_run_exports_again_and_changed_pairs_are_refused(
    ranks: ForkServer, argv: DpoArgv, pair_file: Path, tmp_path: Path
) -> None:
    from verl_dft.errors import InputError

    own = tmp_path / "own.parquet"
    own.write_bytes(pair_file.read_bytes())
    command = [*argv(tmp_path / "run", "trainer.total_training_steps=1"), f"data={own}"]
    ranks.ok(command, call=MAIN)
    before = weights(tmp_path / "run" / "model")
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    assert "all 1 steps are done already" in ranks.ok(command, call=MAIN)
    for name, value in weights(tmp_path / "run" / "model").items():
        np.testing.assert_array_equal(value, before[name])
    pq.write_table(pq.read_table(own).slice(1), own)
    with pytest.raises(InputError, match="rows or the tokenizer have changed"):
        prepare(command)


@pytest.mark.slow
def test_two_ranks_train_like_one_even_when_killed(ranks: ForkServer, argv: DpoArgv, tmp_path: Path) -> None:
    alone, pair = (argv(tmp_path / name, "trainer.total_training_steps=4") for name in ("alone", "pair"))
    ranks.ok(alone, call=MAIN)
    killed = ranks.run(pair, world=2, call=MAIN, env={"VERL_DFT_FAILPOINT": "preference.step:3"})
    assert -signal.SIGKILL in killed.codes
    assert "resuming after step 2" in ranks.ok(pair, world=2, call=MAIN)
    for key in ("train/loss", "train/grad_norm", "train/nll", "train/reward_margin", "train/num_tokens"):
        first, second = losses(tmp_path / "alone", key), losses(tmp_path / "pair", key)
        assert len(second) == 4
        np.testing.assert_allclose(second, first, rtol=5e-4, err_msg=key)
    # what two ranks have saved is what two ranks go on from
    refused = ranks.run(pair, world=1, call=MAIN)
    assert refused.codes == [1] and "trainer.n_gpus_per_node: 2 there, 1 here" in refused.log


@pytest.mark.slow
def test_adapters_are_merged_into_the_export(
    ranks: ForkServer, argv: DpoArgv, small_model: Path, tmp_path: Path
) -> None:
    command = argv(tmp_path / "run", "model.lora_rank=4", "trainer.total_training_steps=3", "trainer.save_freq=1")
    killed = ranks.run(command, call=MAIN, env={"VERL_DFT_FAILPOINT": "preference.step:3"})
    assert killed.codes == [-signal.SIGKILL]
    ranks.ok(command, call=MAIN)
    loss = losses(tmp_path / "run")
    assert loss[0] == pytest.approx(math.log(2), abs=1e-6) and loss[-1] < loss[0]
    exported, base = weights(tmp_path / "run" / "model"), weights(small_model)
    assert exported.keys() == base.keys()
    changed = {name for name, value in exported.items() if np.abs(value - base[name]).max() > 1e-5}
    assert changed and all(name.endswith("_proj.weight") for name in changed)


def test_other_trainings_do_not_load_trl(ranks: ForkServer, train_argv: TrainArgv, tmp_path: Path) -> None:
    """verl would, for every model, wherever TRL is installed."""
    log = ranks.ok(train_argv(tmp_path / "run", "trainer.total_training_steps=1"))
    assert "AutoModelForCausalLMWithValueHead" not in log and "TRL" not in log
