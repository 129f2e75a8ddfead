"""``verl-dft score`` with real engines: against the trainer, plain transformers and vLLM; ranks; kills."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dense
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SMALL, ForkServer, TrainArgv, losses

from verl_dft.data.records import Row, write_rows
from verl_dft.training.score_rows import KL_COLUMNS

pytestmark = pytest.mark.integration
COMMAND = "verl_dft.training.score_command:main"
TOLERANCE = 1e-5
"""Between numbers of ranks, micro-batches, packed and padded input, float32; largest difference seen 2e-6."""
VLLM_TOLERANCE = 1e-4
"""Between verl's engine and vLLM's, both in float32 on a CPU; largest difference seen 2e-5."""

ScoreArgv = Callable[..., list[str]]


@pytest.fixture(scope="session")
def score_argv(tiny_base: Path, uneven_rows: Path, cache_dir: Path) -> ScoreArgv:
    """``score_argv(out, *overrides, model=…, rows=…)``."""

    def build(out: Path, *overrides: str, model: Path = tiny_base, rows: Path = uneven_rows) -> list[str]:
        common = [f"model={model}", f"data={rows}", f"data.cache_dir={cache_dir}", "data.max_length=256"]
        return [*common, f"output_dir={out}", "shard_size=12", *overrides]

    return build


def column(out: Path, name: str = "ref_logp") -> list[list[float]]:
    return pq.read_table(out / "rows.parquet")[name].to_pylist()


def assert_close(a: list[list[float]], b: list[list[float]], atol: float) -> None:
    assert len(a) == len(b)
    for ours, theirs in zip(a, b, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0)


def files(out: Path) -> dict[str, bytes]:
    """What must not depend on interruptions, byte for byte."""
    found = {path.name: path.read_bytes() for path in (out / "shards").rglob("*.npy")}
    return found | {name: (out / name).read_bytes() for name in ("rows.parquet", "statistics.json", "statistics.md")}


@pytest.fixture(scope="module")
def scored(ranks: ForkServer, score_argv: ScoreArgv, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uneven rows under the tiny base, on one rank."""
    out = tmp_path_factory.mktemp("scored") / "one"
    ranks.ok(call=COMMAND, argv=score_argv(out))
    return out


def test_equals_plain_transformers(scored: Path, tiny_base: Path, uneven_rows: Path, cache_dir: Path) -> None:
    rows, model = dense.load_rows(uneven_rows, tiny_base, cache_dir), dense.load_model(tiny_base).double()
    expected = []
    for index in range(len(rows)):
        with torch.no_grad():
            logp = dense.logp(model, rows[index])
        expected.append(logp[dense.targets(rows[index])[1]].tolist())
    assert_close(column(scored), expected, 1e-4)
    ids = pq.read_table(scored / "rows.parquet")["response_ids"].to_pylist()
    assert ids == [row["input_ids"][row["loss_mask"].bool()].tolist() for row in (rows[i] for i in range(len(rows)))]


def test_equals_the_live_trainers_own(
    ranks: ForkServer, train_argv: TrainArgv, score_argv: ScoreArgv, tmp_path: Path
) -> None:
    """A trainer's log-probs of its rows after two steps, and those of the model it exports."""
    out = tmp_path / "run"
    options = ("objective=sft", "trainer.total_training_steps=2", "optim.lr=1e-3")
    ranks.ok(train_argv(out, *options), call="probes:export_and_score")
    ranks.ok(call=COMMAND, argv=score_argv(tmp_path / "scored", model=out / "model"))
    live = json.loads((out / "scores_0.json").read_text())
    table = pq.read_table(tmp_path / "scored" / "rows.parquet")
    counts = [len(ids) for ids in table["response_ids"].to_pylist()]
    ours = [live[str(i)][-count - 1 : -1] for i, count in enumerate(counts)]
    assert_close(column(tmp_path / "scored"), ours, 1e-4)


def test_training_on_scored_rows_sees_its_own_log_probs(
    ranks: ForkServer, train_argv: TrainArgv, scored: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """At the first step the policy is the reference: every token's log-prob is the stored one."""
    options = ("trainer.total_training_steps=1", "objective._target_=needs.Recorder", "objective.fields=[ref_logp]")
    ranks.ok(train_argv(tmp_path / "run", *options, model=tiny_base, rows=scored / "rows.parquet"))
    (mean,), (nll,) = (losses(tmp_path / "run", f"train/{name}") for name in ("mean_ref_logp", "nll"))
    assert mean == pytest.approx(-nll, abs=1e-5)


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, ()),
        (1, ("data.micro_batch_size_per_gpu=1", "model.use_remove_padding=true")),
        (1, ("shard_size=64", "trainer.log_prob_head=logits")),
        pytest.param(
            2,
            ("data.use_dynamic_bsz=true", "data.max_token_len_per_gpu=300", "model.use_remove_padding=true"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["2-ranks", "packed-one-row", "logits-one-shard", "2-ranks-dynamic"],
)
def test_ranks_and_batches_do_not_matter(
    ranks: ForkServer, score_argv: ScoreArgv, scored: Path, tmp_path: Path, world: int, options: tuple[str, ...]
) -> None:
    ranks.ok(call=COMMAND, argv=score_argv(tmp_path / "out", *options), world=world)
    assert_close(column(tmp_path / "out"), column(scored), TOLERANCE)


@pytest.mark.parametrize(
    ("world", "failpoints"),
    [
        (1, ("score.before_write:2", "score.before_rename:1", "score.after_write:1", "score.before_rows")),
        pytest.param(2, ("score.before_rename:2", "score.after_write:1"), marks=pytest.mark.slow),
    ],
    ids=["1-rank", "2-ranks"],
)
def test_killed_and_resumed_gives_the_same_bytes(
    ranks: ForkServer, score_argv: ScoreArgv, tmp_path: Path, world: int, failpoints: tuple[str, ...]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ranks.ok(call=COMMAND, argv=score_argv(whole), world=world)
    for name in failpoints:
        finished = ranks.run(call=COMMAND, argv=score_argv(killed), world=world, env={"VERL_DFT_FAILPOINT": name})
        assert finished.codes[0] == -9, f"{name}: {finished.log[-2000:]}"
        assert not (killed / "rows.parquet").exists()
    log = ranks.ok(call=COMMAND, argv=score_argv(killed), world=world)
    assert ("Qwen2ForCausalLM" in log) == ("score.before_rows" not in failpoints), "no model is loaded for nothing"
    assert files(killed) == files(whole)
    left = [path for path in killed.rglob("*") if path.name.endswith(".tmp")]
    assert len(left) <= 1, "what a kill inside an atomic write leaves"


def test_kl_agrees_with_float64(
    ranks: ForkServer, score_argv: ScoreArgv, small_model: Path, other_model: Path, uneven_rows: Path, cache_dir: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Without either model's logits, on two ranks, packed, and over both models' logits."""
    ways = {
        "padded": (1, "model.use_remove_padding=false"),
        "2-ranks-packed": (2, "model.use_remove_padding=true"),
        "logits": (1, "trainer.log_prob_head=logits"),
    }
    for name, (world, option) in ways.items():
        argv = score_argv(tmp_path / name, f"reference.path={other_model}", "kl=true", option, model=small_model)
        log = ranks.ok(argv, world=world, call=COMMAND)
        assert "full logits" not in log
    rows = dense.load_rows(uneven_rows, small_model, cache_dir)
    model, reference = (dense.load_model(path).double() for path in (small_model, other_model))
    expected: dict[str, list[list[float]]] = {name: [] for name in KL_COLUMNS}
    with torch.no_grad():
        for index in range(len(rows)):
            mask = dense.targets(rows[index])[1]
            # dense.kl is KL(first || second)
            expected["kl_model_reference"].append(dense.kl(model, reference, rows[index])[mask].tolist())
            expected["kl_reference_model"].append(dense.kl(reference, model, rows[index])[mask].tolist())
    both = [np.concatenate(expected[name]) for name in KL_COLUMNS]
    assert np.abs(both[0] - both[1]).max() > 0.1, "the directions must differ for this to be a test of them"
    for way in ways:
        for name in KL_COLUMNS:
            assert_close(column(tmp_path / way, name), expected[name], 2e-5)
        found = json.loads((tmp_path / way / "statistics.json").read_text())["by_origin"]["all"]
        for name, values in zip(KL_COLUMNS, both, strict=True):
            assert found[name]["mean"] == pytest.approx(values.mean(), abs=1e-5) and found[name]["se"] > 0


def scaling_model(folder: Path, seed: int, tokenizer: Path) -> Path:
    """A model that divides its logits by 4 after its output layer."""
    from transformers import AutoTokenizer, GraniteConfig, GraniteForCausalLM

    torch.manual_seed(seed)
    config = GraniteConfig(
        vocab_size=512, num_hidden_layers=2, max_position_embeddings=256, logits_scaling=4.0, **SMALL,
        eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = GraniteForCausalLM(config).float()
    model.model.embed_tokens.weight.data *= 20
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def test_kl_of_models_that_change_their_logits(
    ranks: ForkServer, score_argv: ScoreArgv, small_model: Path, tmp_path: Path
) -> None:
    """Recognised in the first micro-batch, whichever of the two it is; then over the logits, on both ranks."""
    scaling = scaling_model(tmp_path / "scaling", 0, small_model)
    for name, (model, reference) in {"model": (scaling, small_model), "reference": (small_model, scaling)}.items():
        argv = ["kl=true", f"reference.path={reference}", "limit=12"]
        log = ranks.ok(score_argv(tmp_path / name, *argv, model=model), world=2, call=COMMAND)
        assert log.count("log-probs are computed from the full logits: the model") == 1
        logits = score_argv(tmp_path / f"{name}-logits", *argv, "trainer.log_prob_head=logits", model=model)
        ranks.ok(logits, world=2, call=COMMAND)
        for found in KL_COLUMNS:
            assert_close(column(tmp_path / name, found), column(tmp_path / f"{name}-logits", found), 1e-6)
    swapped = (column(tmp_path / "model", KL_COLUMNS[0]), column(tmp_path / "reference", KL_COLUMNS[1]))
    assert_close(*swapped, 2e-5)


def test_by_stage(ranks: ForkServer, score_argv: ScoreArgv, uneven_rows: Path, tmp_path: Path) -> None:
    """Rewritten rows of three origins beside the experts' texts; the fallback's text is the expert's own."""
    table = pq.read_table(uneven_rows).to_pylist()[:12]
    question = table[0]["messages"][0]
    rewritten = []
    for index, row in enumerate(table):
        origin = ("self", "guided", "expert")[index % 3]
        turns = row["messages"] if origin == "expert" else [question, {"role": "assistant", "content": f" {index} ."}]
        rewritten.append(Row(turns, row["problem_id"], origin))
    path = write_rows(tmp_path / "rewritten.parquet", rewritten)
    ranks.ok(call=COMMAND, argv=score_argv(tmp_path / "out", f"expert={uneven_rows}", rows=path))
    found = json.loads((tmp_path / "out" / "statistics.json").read_text())
    stages = found["by_stage"]
    assert list(stages) == ["self", "guided", "expert"] and found["expert_rows"]["rows_of_other_problems"] == 28
    for stage in stages.values():
        assert stage["expert"]["problems"] == stage["rewritten"]["problems"] == 4
    assert stages["expert"]["difference"]["sequence_sum"]["mean"] == pytest.approx(0, abs=1e-4)
    assert stages["self"]["difference"]["sequence_sum"]["mean"] > 0, "a short text beside a long one"
    ours = [
        sum(values) for values, row in zip(column(tmp_path / "out"), rewritten, strict=True) if row.origin == "self"
    ]
    assert stages["self"]["rewritten"]["sequence_sum"]["mean"] == pytest.approx(np.mean(ours), abs=1e-3)
    assert "## By stage" in (tmp_path / "out" / "statistics.md").read_text()


def test_another_job_is_not_mixed_in(
    ranks: ForkServer, score_argv: ScoreArgv, scored: Path, small_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(scored, out)
    refused = ranks.run(call=COMMAND, argv=score_argv(out, model=small_model))
    assert refused.codes != [0] and "holds scores of another job (different: model)" in refused.log
    ranks.ok(call=COMMAND, argv=score_argv(out, "overwrite=true", model=small_model))
    assert column(out) != column(scored)
    own = ranks.run(call=COMMAND, argv=score_argv(out, "overwrite=true", rows=out / "rows.parquet"))
    assert own.codes != [0] and "would be replaced by its own scores" in own.log and (out / "rows.parquet").is_file()
    shutil.rmtree(out)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused = ranks.run(call=COMMAND, argv=score_argv(out))
    assert refused.codes != [0] and "holds something else (notes.txt, …)" in refused.log


@pytest.mark.slow
def test_torchrun_dry_run_and_limit(
    run_command: Callable[..., Any], score_argv: ScoreArgv, scored: Path, tmp_path: Path
) -> None:
    """The command as a user starts it: no ranks of its own are left, and one line where it is wrong."""
    python = [
        sys.executable,
        "-c",
        f"import sys; from {COMMAND.replace(':', ' import ')}; sys.exit(main(sys.argv[1:]))",
    ]
    out = tmp_path / "out"
    done = run_command([*python, *score_argv(out, "limit=10", "data.max_length=64"), "--dry-run"], 120)
    assert done.rc == 0 and not out.exists(), done.stderr
    assert "rows_read" in done.stdout and "nothing was scored" in done.stdout
    done = run_command(
        [*python, *score_argv(out, "limit=10", "column=behavior_logp", "trainer.n_gpus_per_node=2")], 240
    )
    assert done.rc == 0, done.stderr[-3000:]
    assert_close(column(out, "behavior_logp"), column(scored)[:10], TOLERANCE)


@pytest.mark.nightly
@pytest.mark.slow
def test_vllm_agrees_and_survives_three_kills(
    run_command: Callable[..., Any], score_argv: ScoreArgv, scored: Path, tmp_path: Path
) -> None:
    python = [
        sys.executable,
        "-c",
        f"import sys; from {COMMAND.replace(':', ' import ')}; sys.exit(main(sys.argv[1:]))",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_command([*python, *score_argv(whole, "backend=vllm")], 240)
    assert done.rc == 0, done.stderr[-3000:]
    assert_close(column(whole), column(scored), VLLM_TOLERANCE)
    for name in ("score.before_write:2", "score.before_rename:1", "score.after_write:1"):
        done = run_command([*python, *score_argv(killed, "backend=vllm")], 240, env={"VERL_DFT_FAILPOINT": name})
        assert done.rc == -9, f"{name}: {done.stderr[-3000:]}"
    assert run_command([*python, *score_argv(killed, "backend=vllm")], 240).rc == 0
    assert files(killed) == files(whole)
