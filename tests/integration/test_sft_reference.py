"""``objective=sft`` against verl's own loss, and against transformers with hand-indexed cross-entropy."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, ForkServer, TrainArgv, losses, weights

pytestmark = pytest.mark.integration
_spec = importlib.util.spec_from_file_location(
    "data_helpers", Path(__file__).resolve().parent.parent / "unit" / "data_helpers.py"
)
assert _spec and _spec.loader
data_helpers = sys.modules.setdefault("data_helpers", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(data_helpers)

ANSWERS = [
    ("What is 2 + 3?", "The answer is \\boxed{5}."),
    ("How many apples?", "Let x be the number of apples.\nThen x = 4 + 7 = 11."),
    ("Solve for y", "y = 6"),
    ("Hm?", "  Indented, and with a blank line.\n\nDone"),
]


@pytest.mark.parametrize("world", [1, 2])
def test_equals_verls_own_sft_loss_step_by_step(
    ranks: ForkServer, train_argv: TrainArgv, tmp_path: Path, world: int
) -> None:
    options = ("objective=sft", "trainer.total_training_steps=6", "optim.lr_warmup_steps_ratio=0")
    ranks.ok(train_argv(tmp_path / "ours", *options), world=world)
    ranks.ok(train_argv(tmp_path / "verl", *options), world=world, call="probes:stock")
    for metric in ("train/loss", "train/grad_norm", "train/lr", "train/global_tokens"):
        ours, verl = losses(tmp_path / "ours", metric), losses(tmp_path / "verl", metric)
        assert len(ours) == 6
        np.testing.assert_allclose(ours, verl, rtol=1e-5, err_msg=metric)
    ours, verl = weights(tmp_path / "ours" / "model"), np.load(tmp_path / "verl" / "weights.npz")
    for name, value in ours.items():
        np.testing.assert_allclose(value, verl[name], atol=1e-5, err_msg=name)


def make_model(folder: Path, family: str) -> Path:
    """A random model whose vocabulary fits the family's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = data_helpers.family(family)
    torch.manual_seed(0)
    # a Llama: transformers keeps the saved pre-tokenizer of this type
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=256, **SMALL,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id or 0,
    )  # fmt: skip
    LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["qwen2", "qwen2-base", "llama3", "smollm2", "plain"])
def test_equals_transformers_with_hand_indexed_targets(
    ranks: ForkServer, train_argv: TrainArgv, tmp_path: Path, family: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from verl_dft.data.records import Row, write_rows

    model_path = make_model(tmp_path / "model", family)
    rows = [
        Row([{"role": "user", "content": q}, {"role": "assistant", "content": a}], problem_id=str(i), origin="expert")
        for i, (q, a) in enumerate(ANSWERS)
    ]
    write_rows(tmp_path / "rows.parquet", rows)
    out = tmp_path / "run"
    options = ("objective=sft", "trainer.total_training_steps=1", "data.train_batch_size=4")
    ranks.ok(train_argv(out, *options, model=model_path, rows=tmp_path / "rows.parquet"))

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    end = data_helpers.FAMILIES[family]["end"]
    total, count = 0.0, 0
    for row in rows:
        rendered = tokenizer.apply_chat_template(row.messages, tokenize=False)
        answer = row.messages[1]["content"].strip() if family in ("llama3", "plain") else row.messages[1]["content"]
        start = rendered.index(answer, rendered.index(row.messages[0]["content"]) + len(row.messages[0]["content"]))
        prompt = tokenizer(rendered[:start], add_special_tokens=False)["input_ids"]
        target = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if family == "plain":  # the template writes "A: answer": the space belongs to the first word
            prompt = tokenizer(rendered[: start - 1], add_special_tokens=False)["input_ids"]
            target = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
        target = [*target, tokenizer.convert_tokens_to_ids(end)]
        ids = torch.tensor([prompt + target])
        with torch.no_grad():
            log_p = model(ids).logits[0].double().log_softmax(-1)
        for offset, token in enumerate(target):
            total -= float(log_p[len(prompt) + offset - 1, token])
            count += 1
    assert losses(out, "train/num_tokens") == [count]
    np.testing.assert_allclose(losses(out), [total / count], rtol=1e-5)

    stops = GenerationConfig.from_pretrained(out / "model").eos_token_id
    assert tokenizer.convert_tokens_to_ids(end) in ([stops] if isinstance(stops, int) else stops)
    assert tokenizer.eos_token_id in ([stops] if isinstance(stops, int) else stops)
