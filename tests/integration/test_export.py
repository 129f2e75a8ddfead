"""The exported model is the trained one: log-probs after reloading, full and LoRA; vLLM agrees with transformers."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ForkServer, TrainArgv

pytestmark = pytest.mark.integration


@pytest.fixture
def train(ranks: ForkServer, train_argv: TrainArgv) -> Callable[..., dict[int, list[float]]]:
    """``train(out, world, *overrides)``: train 3 steps; returns the live log-probs by row."""

    def run(out: Path, world: int, *overrides: str, **kwargs: Path) -> dict[int, list[float]]:
        common = ("trainer.total_training_steps=3", "optim.lr_warmup_steps_ratio=0")
        ranks.ok(train_argv(out, *common, *overrides, **kwargs), world=world, call="probes:export_and_score")
        parts = [json.loads((out / f"scores_{rank}.json").read_text()) for rank in range(world)]
        return {int(row): logp for part in parts for row, logp in part.items()}

    return run


def reloaded_logp(folder: Path, rows: Path, cache: Path) -> tuple[dict[int, list[float]], list[int]]:
    """Log-probs by row under the exported folder alone, at predicting positions, 0 where not trained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from verl_dft.data.dataset import load_dataset

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dataset = load_dataset([rows], AutoTokenizer.from_pretrained(folder), max_length=256, cache_dir=cache)
    found = {}
    for index in range(len(dataset)):
        item = dataset[index]
        with torch.no_grad():
            log_p = model(item["input_ids"][None]).logits[0].log_softmax(-1)
        logp = log_p[:-1].gather(-1, item["input_ids"][1:, None])[:, 0] * item["loss_mask"][1:]
        found[index] = [*logp.tolist(), 0.0]
    return found, [int(n) for n in dataset.lengths]


LORA = ("model.lora_rank=4", "model.lora_alpha=32", "optim.lr=1e-2")


@pytest.mark.parametrize("world", [1, 2], ids=["1-rank", "2-ranks"])
@pytest.mark.parametrize("options", [(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_reloaded_log_probs_equal_the_live_trainers(
    train: Callable[..., dict[int, list[float]]],
    small_model: Path,
    untied_model: Path,
    uneven_rows: Path,
    cache_dir: Path,
    tmp_path: Path,
    world: int,
    options: tuple[str, ...],
    tied: bool,
) -> None:
    model = small_model if tied else untied_model
    out = tmp_path / "run"
    live = train(out, world, *options, model=model)
    reloaded, lengths = reloaded_logp(out / "model", uneven_rows, cache_dir)
    base, _ = reloaded_logp(model, uneven_rows, cache_dir)
    assert sorted(live) == list(range(len(lengths)))
    for row, length in enumerate(lengths):
        assert len(live[row]) == length
        torch.testing.assert_close(torch.tensor(live[row]), torch.tensor(reloaded[row]), atol=1e-5, rtol=0)
    moved = max(abs(a - b) for row in base for a, b in zip(base[row], reloaded[row], strict=True))
    assert moved > 1e-2, "training must have changed the model, or this test shows nothing"
    names = json.loads((out / "model" / "config.json").read_text())
    assert names["dtype"] == "float32" and not list((out / "model").glob("adapter*"))


def test_bf16_export_says_so(train: Callable[..., dict[int, list[float]]], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    train(tmp_path / "run", 1, "export.dtype=bf16")
    tensors = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_bf16_and_gradient_checkpointing_train(train: Callable[..., dict[int, list[float]]], tmp_path: Path) -> None:
    """The other precision and the other memory mode, close to the plain run."""
    plain = train(tmp_path / "plain", 1)
    options = ("precision=bf16", "model.enable_gradient_checkpointing=true", "export.dtype=fp32")
    other = train(tmp_path / "bf16", 2, *options)
    error = [abs(a - b) for row in plain for a, b in zip(plain[row], other[row], strict=True)]
    assert 0 < sum(error) / len(error) < 0.2


_GREEDY = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl_dft.data.arithmetic import heldout_problems
from verl_dft.sampling.engine import SampleRequest, VLLMEngine

def main():
    folder = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "user", "content": p.problem}] for p in heldout_problems(12, seed=3)]
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    stop = [tokenizer.eos_token_id]
    with VLLMEngine(folder, max_model_len=160) as engine:
        requests = [SampleRequest(p, 0, temperature=0, max_tokens=60, stop_token_ids=stop) for p in prompts]
        greedy = engine.generate(requests)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    options = {"max_new_tokens": 60, "do_sample": False}
    expected = [model.generate(torch.tensor([p]), **options)[0, len(p):].tolist() for p in prompts]
    found = {"vllm": [list(g.token_ids) for g in greedy], "texts": [g.text for g in greedy]}
    print(json.dumps({**found, "transformers": expected}))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_vllm_greedy_equals_transformers_on_an_export(
    ranks: ForkServer, train_argv: TrainArgv, tmp_path: Path, run_command: Callable
) -> None:
    """The tiny base after three steps of DFT with LoRA on two ranks."""
    from verl_dft.paths import recipes_dir

    overrides = ("data.train_batch_size=16", "model.lora_rank=8", "trainer.total_training_steps=3", "optim.lr=1e-3")
    argv = train_argv(tmp_path / "run", *overrides, model=recipes_dir() / "tiny" / "base", rows="arithmetic")
    ranks.ok(argv, world=2)
    script = tmp_path / "greedy.py"
    script.write_text(_GREEDY)
    done = run_command([sys.executable, script, tmp_path / "run" / "model"], timeout=180)
    assert done.rc == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["vllm"] == seen["transformers"]
    assert len(set(seen["texts"])) == 12 and sum("boxed" in text for text in seen["texts"]) > 6
