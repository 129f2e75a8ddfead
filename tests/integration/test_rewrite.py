"""Data rewriting on a real vLLM engine in the tiny world: its rows, its log-probs, early stopping, and kills."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import pytest

from verl_dft.data.records import read_rows
from verl_dft.sampling.record import read_samples

pytestmark = [pytest.mark.integration, pytest.mark.alone]

_TINY = ["data=arithmetic", "guided.prompt=arithmetic-guided", "self.max_tokens=110", "guided.max_tokens=110"]
_TINY += ["engine.dtype=float32", "grading.num_workers=1"]
_FILES = ("rows.parquet", "expert.parquet", "samples.parquet", "statistics.json", "statistics.md")


def _argv(base: Path, folder: Path, *more: str) -> list[str]:
    return ["rewrite", f"model={base}", f"output_dir={folder}", *_TINY, *more]


@pytest.mark.slow
def test_every_stage_has_rows_and_stored_log_probs_are_the_models(
    tiny_base: Path, tmp_path: Path, run_cli: Callable
) -> None:
    done = run_cli(_argv(tiny_base, tmp_path, "limit=40", "self.n=2", "guided.n=2"), timeout=180)
    assert done.rc == 0, done.stderr[-3000:]
    rows = read_rows(tmp_path / "rows.parquet").to_pylist()
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    origins = Counter(row["origin"] for row in rows)
    assert set(origins) == {"self", "guided", "expert"} and origins == statistics["rows"]["by_origin"]
    assert "Self-alignment" in done.stdout and sum(origins.values()) == 40
    assert not any("Reference" in row["messages"][0]["content"] for row in rows)

    log_prob = _log_probs(tiny_base)
    problems = {s.problem_id: s.problem for s in read_samples(tmp_path)}
    solutions = _solutions(40)
    for row in rows:
        if row["origin"] == "expert":
            assert row["messages"][-1]["content"] == solutions[row["problem_id"]] and row["behavior_logp"] is None
            continue
        asked = row["messages"][:-1]
        assert asked == [{"role": "user", "content": problems[row["problem_id"]]}]
        if row["origin"] == "guided":  # its log-probs are of the prompt that it was sampled with
            assert max(_differences(row, log_prob(asked, row["response_ids"]))) > 0.1
            solution = solutions[row["problem_id"]]
            asked = [{"role": "user", "content": f"Reference : {solution}\nRetell .\n{problems[row['problem_id']]}"}]
        assert max(_differences(row, log_prob(asked, row["response_ids"]))) < 1e-3


def _solutions(limit: int) -> dict[str, str]:
    from verl_dft.config import compose
    from verl_dft.data.problems import problems_of
    from verl_dft.sampling.configure import plain

    return {p.id: p.solution or "" for p in problems_of(plain(compose("data", ["data=arithmetic"]))["data"], limit)}


def _differences(row: dict[str, Any], expected: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(row["behavior_logp"], expected, strict=True)]


def _log_probs(folder: Path) -> Callable[[Sequence[dict[str, str]], Sequence[int]], list[float]]:
    """Log-probs of response ids after these turns by plain transformers, float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def log_prob(turns: Sequence[dict[str, str]], response: Sequence[int]) -> list[float]:
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])[:, 0].tolist()

    return log_prob


@pytest.mark.slow
@pytest.mark.nightly
def test_early_stopping_agrees_with_the_literal_procedure(tiny_base: Path, tmp_path: Path, run_cli: Callable) -> None:
    """Different seeds, the same problems: stage counts and lengths of kept responses agree within four deviations."""
    found = {}
    for name, more in (("literal", ["early_stop=false", "seed=1"]), ("early", ["early_stop=true", "seed=2"])):
        folder = tmp_path / name
        done = run_cli(_argv(tiny_base, folder, "limit=400", "self.n=4", "guided.n=4", *more), timeout=300)
        assert done.rc == 0, done.stderr[-3000:]
        rows = read_rows(folder / "rows.parquet").to_pylist()
        lengths = {o: [len(r["response_ids"]) for r in rows if r["origin"] == o] for o in ("self", "guided")}
        found[name] = (json.loads((folder / "statistics.json").read_text()), lengths)
    (literal, literal_lengths), (early, early_lengths) = found["literal"], found["early"]
    for stage in ("self", "guided", "fallback"):
        a, b = (statistics["table1"][stage]["count"] for statistics in (literal, early))
        pooled = (a + b) / 800
        # independent draws of the same problems spread less than this
        assert abs(a - b) < 4 * math.sqrt(800 * pooled * (1 - pooled) / 2) + 1e-9, stage
        assert a > 20 and b > 20
    for origin in ("self", "guided"):
        one, other = literal_lengths[origin], early_lengths[origin]
        spread = math.sqrt(variance(one) / len(one) + variance(other) / len(other))
        assert abs(fmean(one) - fmean(other)) < 4 * spread, origin
    for stage in ("self", "guided"):
        assert early["sampling"][stage]["tokens"] < 0.95 * literal["sampling"][stage]["tokens"]


@pytest.mark.nightly
@pytest.mark.slow
def test_three_kills_at_random_leave_the_same_bytes(tiny_base: Path, tmp_path: Path, run_cli: Callable) -> None:
    options = ["limit=120", "self.n=4", "guided.n=4", "shard_size=16"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_cli(_argv(tiny_base, whole, *options), timeout=300)
    assert done.rc == 0, done.stderr[-3000:]
    total = len(list((whole / "store").glob("*.jsonl")))
    chance = random.Random(time.time_ns())
    for kill in (1, 2, 3):
        _kill_after(
            _argv(tiny_base, killed, *options), killed, chance.randint(1, total * kill // 4), chance.random() / 5
        )
        assert not (killed / "statistics.json").exists()
    assert 0 < len(list((killed / "store").glob("*.jsonl"))) < total
    done = run_cli(_argv(tiny_base, killed, *options), timeout=300)
    assert done.rc == 0, done.stderr[-3000:]
    for name in _FILES:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def _kill_after(argv: Sequence[str], folder: Path, num_shards: int, seconds: float) -> None:
    """Start the command, and ``kill -9`` it ``seconds`` after its store holds so many shards."""
    command = [sys.executable, "-m", "verl_dft.cli", *argv]
    with open(folder.parent / "killed.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while len(list((folder / "store").glob("*.jsonl"))) < num_shards:
            assert process.poll() is None and time.monotonic() < deadline, (folder.parent / "killed.log").read_text()
            time.sleep(0.005)
        time.sleep(seconds)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
