"""The chain in the tiny world, by its commands: samples, rows of every builder with real vLLM, and training on them."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import ForkServer, losses

pytestmark = pytest.mark.integration
_PROBLEMS = ["data=arithmetic", "data.source.num_rows=40", "data.source.num_val=0", "engine.dtype=float32"]
_TRAIN = ["data.max_length=256", "data.train_batch_size=8", "trainer.total_training_steps=3", "optim.lr=1e-4"]
_TRAIN += ["trainer.logger=[]", "export.dtype=fp32"]


@pytest.fixture(scope="module")
def built(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, run_cli: Callable) -> Path:
    """The folder in which each builder has run, one command each."""
    root = tmp_path_factory.mktemp("chain")
    asked = [
        "self.n=2",
        "guided.n=2",
        "self.max_tokens=110",
        "guided.max_tokens=110",
        "guided.prompt=arithmetic-guided",
    ]
    drawn = [f"data={root / 'samples' / 'problems.jsonl'}", f"samples={root / 'samples'}"]
    commands = [
        ["sample", f"model={tiny_base}", *_PROBLEMS, "max_tokens=110", "n=4", f"output_dir={root / 'samples'}"],
        ["reject", f"samples={root / 'samples'}", f"output_dir={root / 'rejected'}"],
        ["rewrite", f"model={tiny_base}", *_PROBLEMS, *asked, f"output_dir={root / 'rewritten'}"],
        ["groups", *drawn, "composition=1:0:3", f"output_dir={root / 'groups'}"],
    ]
    for command in commands:
        done = run_cli(command, timeout=180)
        assert done.rc == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return root


def test_every_stage_of_rewriting_has_rows(built: Path) -> None:
    origins = Counter(pq.read_table(built / "rewritten" / "rows.parquet")["origin"].to_pylist())
    assert set(origins) == {"self", "guided", "expert"} and sum(origins.values()) == 40


def test_rejection_sampling_keeps_what_is_right(built: Path) -> None:
    samples = pq.read_table(built / "samples" / "samples.parquet").to_pylist()
    right = {
        (s["problem_id"], s["response"]) for s in samples if s["grade"] == "correct" and s["finish_reason"] == "stop"
    }
    rows = pq.read_table(built / "rejected" / "rft.parquet").to_pylist()
    assert len(rows) == len(right) > 0 and all(len(r["behavior_logp"]) == len(r["response_ids"]) for r in rows)
    wrong = {(s["problem_id"], s["response"]) for s in samples if s["grade"] in ("wrong", "no_answer")}
    pairs = pq.read_table(built / "rejected" / "pairs.parquet").to_pylist()
    assert pairs
    for pair in pairs:
        assert (pair["problem_id"], pair["chosen"][0]["content"]) in right
        assert (pair["problem_id"], pair["rejected"][0]["content"]) in wrong


@pytest.mark.parametrize(
    ("objective", "rows"),
    [
        ("sft", "rejected/rft.parquet"),
        ("dft", "rewritten/rows.parquet"),
        ("is_sft", "rewritten/rows.parquet"),
        ("gft", "groups/rows.parquet"),
    ],
)
def test_training_on_what_was_built(
    built: Path, ranks: ForkServer, tiny_base: Path, cache_dir: Path, objective: str, rows: str
) -> None:
    out = built / f"train-{objective}"
    argv = [f"objective={objective}", f"model={tiny_base}", f"data={built / rows}", f"data.cache_dir={cache_dir}"]
    ranks.ok([*argv, *_TRAIN, f"output_dir={out}"])
    assert len(losses(out)) == 3 and (out / "model" / "model.safetensors").is_file()
    record = json.loads((out / "model" / "trained_with.json").read_text())
    assert list(record["turns"]) == ["user"]


def test_dpo_on_the_pairs(built: Path, tiny_base: Path, run_cli: Callable) -> None:
    out = built / "train-dpo"
    argv = ["train", "objective=dpo", f"model={tiny_base}", f"data={built / 'rejected' / 'pairs.parquet'}"]
    done = run_cli([*argv, *_TRAIN, f"output_dir={out}"], timeout=180)
    assert done.rc == 0, done.stderr[-3000:]
    assert losses(out)[0] == pytest.approx(0.693147, abs=1e-3)
    assert (out / "model" / "model.safetensors").is_file()
    assert list(json.loads((out / "model" / "trained_with.json").read_text())["turns"]) == ["user"]


def test_every_builder_says_what_it_did(built: Path) -> None:
    for folder, rows in (("rejected", "rft"), ("rejected", "pairs"), ("rewritten", "rows"), ("groups", "rows")):
        manifest = json.loads((built / folder / f"{rows}.parquet.manifest.json").read_text())
        assert manifest["command"] and manifest["versions"]["verl_dft"]
        assert (built / folder / "statistics.md").read_text().startswith("|") or (
            built / folder / "statistics.md"
        ).is_file()
