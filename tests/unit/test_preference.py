"""DPO: pair files, their tokens, the configuration and its errors. Training itself: tests/integration/test_dpo.py."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl_dft.data.pairs import EncodedPair, join, load_pairs
from verl_dft.data.sources import load_tokenizer
from verl_dft.data.template import ConversationEncoder
from verl_dft.errors import InputError
from verl_dft.paths import recipes_dir
from verl_dft.training.preference_config import TRL_VERSION, check_trl, compose_dpo, wanted

BASE = recipes_dir() / "tiny" / "base"
USER = [{"role": "user", "content": "Bob has 3 keys . How many ?"}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


PAIR = {"prompt": USER, "chosen": said("He has 3 ."), "rejected": said("He has 12 and 7 .")}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(BASE))


@pytest.fixture
def pair_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes pairs as parquet, or as jsonl where a row does not fit the others."""

    def write(*rows: dict, name: str = "pairs.parquet") -> Path:
        path = tmp_path / name
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


# ---- tokens ----


def test_prompt_and_responses_are_those_of_the_rows(tokenizer: Any, pair_file: Callable[..., Path]) -> None:
    pairs = load_pairs([pair_file(PAIR, PAIR)], tokenizer, max_length=512)
    encoder = ConversationEncoder(tokenizer)
    chats = [[*USER, *PAIR[side]] for side in ("chosen", "rejected")]
    better, worse = encoder.encode(chats, lambda i: str(i))
    assert len(pairs.pairs) == 2
    for pair in pairs.pairs:
        assert pair.prompt.tolist() == better.prompt == worse.prompt
        assert pair.chosen.tolist() == better.response and pair.rejected.tolist() == worse.response
        assert pair.chosen[-1] == pair.rejected[-1] == encoder.end_id
        assert list(pair.chosen).count(encoder.end_id) == 1
    assert pairs.report["num_trained_tokens"] == 2 * (len(better.response) + len(worse.response))
    assert pairs.report["num_tokens"] == pairs.report["num_trained_tokens"] + 4 * len(better.prompt)


def test_sampled_ids_are_used_as_they_are(tokenizer: Any, pair_file: Callable[..., Path]) -> None:
    """The ids may be another tokenisation of the text; an end token follows unless the response was cut off."""
    end = ConversationEncoder(tokenizer).end_id
    row = {**PAIR, "chosen_ids": [11, 12, end], "rejected_ids": [13, 14], "rejected_finish_reason": "length"}
    stopped = {**row, "rejected_finish_reason": "stop"}
    first, second = load_pairs([pair_file(row, stopped)], tokenizer, max_length=512).pairs
    assert first.chosen.tolist() == [11, 12, end] and first.rejected.tolist() == [13, 14]
    assert second.rejected.tolist() == [13, 14, end]
    as_text = load_pairs([pair_file(PAIR)], tokenizer, max_length=512).pairs[0]
    assert first.prompt.tolist() == as_text.prompt.tolist()


def test_a_text_that_was_cut_off_gets_no_end_token(tokenizer: Any, pair_file: Callable[..., Path]) -> None:
    end = ConversationEncoder(tokenizer).end_id
    path = pair_file(*({**PAIR, "rejected_finish_reason": reason} for reason in ("stop", "length")))
    whole, cut = load_pairs([path], tokenizer, max_length=512).pairs
    assert whole.rejected.tolist() == [*cut.rejected.tolist(), end]
    assert cut.chosen.tolist() == whole.chosen.tolist()


def test_prompts_that_differ_at_the_boundary_are_cut_to_what_they_share() -> None:
    first, second = np.array([1, 2, 3, 4]), np.array([1, 2, 3])
    pair = join(first, np.array([7]), second, np.array([4, 9]), "x")
    assert [x.tolist() for x in (pair.prompt, pair.chosen, pair.rejected)] == [[1, 2, 3], [4, 7], [4, 9]]


def test_overlong_pairs(tokenizer: Any, pair_file: Callable[..., Path]) -> None:
    path = pair_file(PAIR, {**PAIR, "rejected": said("It is 1 2 3 4 5 6 7 8 9 10 11 12 13 14 .")})
    short, long = load_pairs([path], tokenizer, max_length=512).pairs
    limit = len(short.prompt) + max(len(short.chosen), len(short.rejected))
    dropped = load_pairs([path], tokenizer, max_length=limit)
    assert len(dropped.pairs) == dropped.report["pairs_kept"] == dropped.report["pairs_dropped_overlong"] == 1
    cut = load_pairs([path], tokenizer, max_length=limit, overlong="truncate")
    assert cut.report["pairs_truncated"] == 1
    assert cut.pairs[1].rejected.tolist() == long.rejected[: limit - len(long.prompt)].tolist()
    assert cut.pairs[1].chosen.tolist() == long.chosen.tolist()
    with pytest.raises(InputError, match=r"pairs\.parquet: row 1: .* tokens .*data.max_length"):
        load_pairs([path], tokenizer, max_length=limit, overlong="error")
    with pytest.raises(InputError, match="all 2 pairs are longer"):
        load_pairs([path], tokenizer, max_length=5)


def test_a_fingerprint_tells_pairs_apart() -> None:
    from verl_dft.data.pairs import Pairs

    def of(*ids: list[int]) -> str:
        return Pairs([EncodedPair(*(np.array(i, dtype=np.int32) for i in ids))], {}).fingerprint()

    assert of([1], [2, 3], [4]) == of([1], [2, 3], [4]) != of([1], [2], [3, 4])


# ---- bad pairs ----

BAD = {
    "no column": ({"prompt": USER, "chosen": said("a")}, r"row 1: no column 'rejected'"),
    "prompt is text": ({**PAIR, "prompt": "How many ?"}, r"row 1: column 'prompt' must be a non-empty list"),
    "prompt is empty": ({**PAIR, "prompt": []}, r"row 1: column 'prompt' must be a non-empty list"),
    "prompt has an answer": ({**PAIR, "prompt": [*USER, *said("3")]}, r"row 1: column 'prompt' ends with an assistant"),
    "no content": ({**PAIR, "chosen": [{"role": "assistant"}]}, r"row 1: column 'chosen', turn 0, must have a 'role'"),
    "strange role": ({**PAIR, "prompt": [{"role": "me", "content": "x"}]}, r"turn 0, has role 'me'; use system, user"),
    "two turns": ({**PAIR, "rejected": [*said("a"), *said("b")]}, r"row 1: column 'rejected' must hold one assistant"),
    "user's turn": ({**PAIR, "rejected": USER}, r"row 1: column 'rejected' must hold one assistant turn, not user"),
    "empty text": ({**PAIR, "chosen": said(" ")}, r"row 1: column 'chosen' is an empty response"),
    "same": ({**PAIR, "rejected": PAIR["chosen"]}, r"row 1: columns 'chosen' and 'rejected' hold the same response"),
    "ids are text": ({**PAIR, "chosen_ids": "1 2"}, r"row 1: column 'chosen_ids' must be a list of token ids"),
    "ids are floats": ({**PAIR, "chosen_ids": [1.5]}, r"row 1: column 'chosen_ids' must be a list of token ids"),
    "no ids": ({**PAIR, "rejected_ids": []}, r"row 1: column 'rejected_ids' is empty"),
    "foreign ids": (
        {**PAIR, "rejected_ids": [5, 900_000]},
        r"row 1: column 'rejected_ids' holds ids that this model's",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pairs_are_refused_with_file_row_and_column(
    case: str, tokenizer: Any, pair_file: Callable[..., Path]
) -> None:
    row, expected = BAD[case]
    path = pair_file(PAIR, row, name="pairs.jsonl")
    with pytest.raises(InputError, match=expected) as caught:
        load_pairs([path], tokenizer, max_length=512)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# ---- configuration ----


def composed(*overrides: str) -> Any:
    return compose_dpo(["objective=dpo", "data=a.parquet", "model=a/model", "output_dir=out", *overrides])


def test_which_command_lines_ask_for_dpo() -> None:
    assert wanted(["objective=dpo", "model=x"])
    assert wanted(["--config-name", "dpo"]) and wanted(["--config-name=dpo"])
    assert not wanted(["objective=dft", "output_dir=dpo"]) and not wanted([])


def test_the_papers_values_are_the_defaults() -> None:
    """DFT, arXiv 2508.05629, Sec. 4.2: learning rate 1e-6, batch 128, warm-up ratio 0.05."""
    config = composed()
    assert (config.optim.lr, config.data.train_batch_size, config.optim.lr_warmup_steps_ratio) == (1e-6, 128, 0.05)
    assert config.objective.beta == 0.1 and config.objective.rpo_alpha is None and not config.objective.label_smoothing
    assert config.data.train_files == ["a.parquet"] and Path(config.output_dir).is_absolute()


def test_auto_values_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    config = composed("data.train_batch_size=36", "trainer.n_gpus_per_node=2")
    assert (config.trainer.device, config.precision, config.export.dtype) == ("cpu", "fp32", "fp32")
    assert config.data.micro_batch_size_per_gpu == 6, "the largest divisor of 18 up to 8"
    assert config.model.override_config.attn_implementation == "sdpa"
    assert not config.model.enable_gradient_checkpointing


def test_the_shorthands_of_other_trainings() -> None:
    config = composed("model=qwen2.5-math-1.5b", "hardware=gpu", "precision=bf16")
    assert config.model.path == "Qwen/Qwen2.5-Math-1.5B" and config.trainer.device == "cuda"
    assert config.model.enable_gradient_checkpointing


def test_our_keys_become_trls(tmp_path: Path) -> None:
    from verl_dft.training.preference_trainer import dpo_arguments

    config = composed(
        "objective.beta=0.3", "objective.label_smoothing=0.1", "objective.rpo_alpha=0.5", "data.train_batch_size=24",
        "data.micro_batch_size_per_gpu=4", "optim.lr=2e-5", "optim.lr_warmup_steps_ratio=0.25", "optim.clip_grad=0.7",
        "optim.betas=[0.8,0.99]", "optim.weight_decay=0.2", "optim.lr_scheduler_type=constant", "trainer.seed=9",
        "trainer.device=cpu", "precision=bf16", f"output_dir={tmp_path}",
    )  # fmt: skip
    found = dpo_arguments(config, num_steps=10)
    assert (found.beta, found.label_smoothing, found.rpo_alpha) == (0.3, 0.1, 0.5)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (4, 6)
    assert (found.learning_rate, found.warmup_steps, found.max_steps) == (2e-5, 2, 10)
    assert (found.adam_beta1, found.adam_beta2, found.weight_decay, found.max_grad_norm) == (0.8, 0.99, 0.2, 0.7)
    assert found.lr_scheduler_type == "constant_with_warmup" and found.seed == 9
    assert found.bf16 and found.use_cpu and found.n_gpu == 0
    assert found.max_length is None and found.max_prompt_length is None and found.max_completion_length is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data=gsm8k", "data=gsm8k: objective=dpo takes a file of preference pairs"),
        ("objective.betta=1", "did you mean objective.beta"),
        ("objective.beta=0", "objective.beta=0 must be a number above 0"),
        ("objective.label_smoothing=0.5", r"must be a number in \[0, 0.5\)"),
        ("trainer.nnodes=2", "one machine"),
        ("trainer.save_freq=0", "trainer.save_freq=0"),
        ("trainer.resume_mode=resume_path", "needs trainer.resume_from_path"),
        ("trainer.logger=[abacus]", "'abacus' is not one of"),
        ("data.micro_batch_size_per_gpu=7", "does not divide a rank's 128 pairs"),
        ("trainer.n_gpus_per_node=3", "128 is not divisible by 3 ranks"),
        ("trainer.total_training_steps=0", "must be a whole number of at least 1"),
        ("precision=fp16", "precision=fp16 is not one of fp32, bf16"),
        ("launcher=ray", "has no key 'launcher'"),
    ],
)
def test_bad_configurations_are_refused_in_one_line(override: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        composed(override)
    assert "\n" not in str(caught.value)


def test_a_second_reference_under_adapters_is_refused() -> None:
    with pytest.raises(InputError, match="reference.path cannot be combined"):
        composed("reference.path=a/b", "model.lora_rank=4")


def test_missing_trl_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(InputError, match=r"not installed: pip install 'verl-dft\[dpo\]'"):
        check_trl()


def test_another_trl_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo_root: Path) -> None:
    (tmp_path / "trl-1.16.0.dist-info").mkdir()
    (tmp_path / "trl-1.16.0.dist-info" / "METADATA").write_text("Name: trl\nVersion: 1.16.0\n")
    check_trl()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=f"needs trl {TRL_VERSION}, 1.16.0 is installed"):
        check_trl()
    assert f'dpo = ["trl=={TRL_VERSION}"]' in (repo_root / "pyproject.toml").read_text()


# ---- batches ----


def test_ranks_share_the_batches_of_one() -> None:
    from verl_dft.training.batches import StepBatchSampler
    from verl_dft.training.preference_trainer import PairBatches

    lengths = np.random.default_rng(0).integers(5, 60, 37)

    def batches(ranks: int, rank: int) -> PairBatches:
        steps = StepBatchSampler(lengths, 8, dp_size=ranks, dp_rank=rank, seed=3, balance=True)
        return PairBatches(steps, num_steps=9, micro_batch_size=2)

    alone, pair = batches(1, 0), [batches(2, 0), batches(2, 1)]
    assert len(list(alone)) == len(alone) == 36 and len(list(pair[0])) == len(pair[0]) == 18
    for step in range(9):  # four steps an epoch
        rows = alone.rows(step)
        assert sorted(rows) == sorted(pair[0].rows(step) + pair[1].rows(step)) and len(set(rows)) == 8
    assert alone.rows(0) != alone.rows(4), "another order in the next epoch"
    assert [row for batch in list(alone)[4:8] for row in batch] == alone.rows(1)
