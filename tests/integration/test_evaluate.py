"""The real command on a real vLLM engine, and vLLM against plain transformers on the same weights."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.alone]

_SMALL = ["benchmark=arithmetic", "benchmark.generator.num_problems=4", "n=4", "max_tokens=16", "seed=3"]
_SMALL += ["++shard_size=5"]  # shards that end inside a problem: 5, 5, 5 and 1
_TIMED = {"written_at", "seconds", "command", "num_reused", "num_generated"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model whose next token is rarely a near-tie: the output layer is scaled up."""
    from transformers import AutoModelForCausalLM

    from verl_dft.tiny import init_model

    folder = init_model(tmp_path_factory.mktemp("model") / "tiny", seed=1, tied=False)
    peaked = AutoModelForCausalLM.from_pretrained(folder)
    peaked.lm_head.weight.data *= 20
    peaked.save_pretrained(folder)
    return folder


def _shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory, run_cli: Callable) -> tuple[Path, str, str]:
    """The folder of an evaluation that nothing interrupted, and what it printed."""
    before, folder = _shared_memory(), tmp_path_factory.mktemp("whole") / "one"
    done = run_cli(["evaluate", f"model={model}", *_SMALL, f"output_dir={folder}"], timeout=120)
    assert done.rc == 0, done.stderr[-3000:]
    assert not _shared_memory() - before
    return folder, done.stdout, done.stderr


@pytest.mark.slow
def test_evaluate_twice_gives_the_same_samples(
    model: Path, whole: tuple[Path, str, str], tmp_path: Path, run_cli: Callable
) -> None:
    """Two processes, one with a second model behind the first: the same texts, verdicts and numbers."""
    before, other = _shared_memory(), tmp_path / "other"
    other.symlink_to(model)
    one, stdout, stderr = whole
    again = run_cli(["evaluate", f"model=[{model},{other}]", *_SMALL, f"output_dir={tmp_path / 'two'}"], timeout=120)
    assert again.rc == 0, again.stderr[-3000:]
    folders = [one, *sorted((tmp_path / "two").iterdir())]
    assert len(folders) == 3
    samples = [pq.read_table(folder / "samples.parquet").to_pylist() for folder in folders]
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    for rows, result in zip(samples[1:], results[1:], strict=True):
        assert [{**row, "model": ""} for row in rows] == [{**row, "model": ""} for row in samples[0]]
        differing = {key for key in result if result[key] != results[0][key]}
        assert differing <= _TIMED | {"model"}

    _check_result(results[0], samples[0])
    assert "avg@4" in stdout and "no answer" in stdout and "warning" in stderr
    assert not _shared_memory() - before


def _check_result(result: dict, rows: list[dict]) -> None:
    assert len(rows) == result["num_samples"] == 16 and result["num_problems"] == 4
    assert sum(result["verdicts"].values()) == 16
    assert len({row["seed"] for row in rows}) == 16 and {row["index"] for row in rows} == {0, 1, 2, 3}
    for row in rows:
        assert row["num_tokens"] == len(row["token_ids"]) <= 16
        assert (row["finish_reason"] == "length") == (row["num_tokens"] == 16)
    assert len({row["response"] for row in rows}) > 8  # samples of one prompt differ
    assert result["engine"]["dtype"] == "float32"
    assert result["truncated_frac"] == sum(row["finish_reason"] == "length" for row in rows) / 16


# Killed at each of these in turn, in one folder: with nothing stored, inside a shard's file, between two shards.
_KILLS = ["store.before_append", "store.after_append:9", "store.after_rename"]


@pytest.mark.slow
@pytest.mark.nightly
def test_an_evaluation_killed_thrice_goes_on_to_the_same_bytes(
    model: Path, whole: tuple[Path, str, str], tmp_path: Path, run_cli: Callable
) -> None:
    """``kill -9`` under real vLLM; then the rest is generated, what is stored is not, and no byte differs."""
    command = ["evaluate", f"model={model}", *_SMALL, f"output_dir={tmp_path / 'out'}"]
    for place in _KILLS:
        killed = run_cli(command, timeout=120, env={"VERL_DFT_FAILPOINT": place})
        assert killed.rc == -signal.SIGKILL, killed.stderr[-3000:]
        assert not (tmp_path / "out" / "result.json").exists()
    stored = {path: path.read_bytes() for path in (tmp_path / "out" / "store").glob("*.jsonl")}
    assert 0 < len(stored) < 4
    done = run_cli(command, timeout=120)
    assert done.rc == 0, done.stderr[-3000:]
    assert all(path.read_bytes() == content for path, content in stored.items())
    assert (tmp_path / "out" / "samples.parquet").read_bytes() == (whole[0] / "samples.parquet").read_bytes()
    first, resumed = (json.loads((folder / "result.json").read_text()) for folder in (whole[0], tmp_path / "out"))
    assert {key for key in first if first[key] != resumed[key]} <= _TIMED
    assert first["num_generated"] == 16 and resumed["num_generated"] == 16 - resumed["num_reused"] < 16


_ENGINE_SCRIPT = """
import json, os, sys
import psutil, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl_dft.sampling.engine import SampleRequest, VLLMEngine
from verl_dft.sampling.seeds import sample_seed

def main():
    folder = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = [f"Eve has {n} keys : a loses 2 , b times 2 . How many ?" for n in range(3, 15)]
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    environment, set_num_threads = dict(os.environ), torch.set_num_threads
    with VLLMEngine(folder, max_model_len=128) as engine:
        preload = os.environ.get("LD_PRELOAD")
        greedy = engine.generate([SampleRequest(p, 0, temperature=0, max_tokens=24) for p in prompts])
        sampled = [SampleRequest(p, 7 + i, max_tokens=24) for i, p in enumerate(prompts)]
        one, two = ([g.token_ids for g in engine.generate(sampled)] for _ in range(2))
        # more prompt tokens than one step takes, so that some prompts are cut into chunks
        seeds = [sample_seed(0, "p", i) for i in range(3000)]
        many = engine.generate([SampleRequest(prompts[0], s, temperature=3.0, max_tokens=2) for s in seeds])
    engine.close()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        expected.append(reference.generate(ids, max_new_tokens=24, do_sample=False)[0, len(prompt):].tolist())
    first = torch.tensor([g.token_ids[0] for g in many]).bincount(minlength=512).double()
    with torch.no_grad():
        p = (reference(torch.tensor([prompts[0]])).logits[0, -1] / 3.0).double().softmax(-1)
    often = p * 3000 >= 5
    chi_square = ((first - p * 3000) ** 2 / (p * 3000))[often].sum().item()
    changed = {k for k in os.environ if os.environ[k] != environment.get(k)}
    print(json.dumps({
        "greedy": [list(g.token_ids) for g in greedy], "expected": expected, "repeats": one == two,
        "children": len(psutil.Process().children(recursive=True)), "changed": sorted(changed),
        "threads_restored": torch.set_num_threads is set_num_threads, "preload": preload,
        "chi_square": chi_square, "degrees": int(often.sum()), "rare": first[~often].sum().item() / 3000,
        "rare_expected": p[~often].sum().item(), "nearest_seeds_differ": len({tuple(ids) for ids in one}),
    }))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_greedy_equals_transformers_and_the_engine_cleans_up(
    model: Path, tmp_path: Path, run_command: Callable
) -> None:
    """Token for token in float32; samples follow the model's own distribution; a repeated call repeats; nothing is left
    behind in the process or in /dev/shm."""
    script, before = tmp_path / "engine.py", _shared_memory()
    script.write_text(_ENGINE_SCRIPT)
    done = run_command([sys.executable, script, model], timeout=120)
    assert done.rc == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    print({k: seen[k] for k in ("chi_square", "degrees", "rare", "rare_expected")})
    assert seen["greedy"] == seen["expected"]
    assert len({tuple(ids) for ids in seen["expected"]}) > 6, "the model says the same to everything: a weak test"
    assert seen["repeats"] and seen["nearest_seeds_differ"] == 12
    assert seen["degrees"] > 5, "too few likely tokens: a weak test"
    assert seen["chi_square"] < seen["degrees"] + 5 * (2 * seen["degrees"]) ** 0.5  # mean and 5 deviations
    assert abs(seen["rare"] - seen["rare_expected"]) < 0.05
    assert seen["children"] == 0 and seen["threads_restored"] and "LD_PRELOAD" not in seen["changed"]
    assert not _shared_memory() - before
