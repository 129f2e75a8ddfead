"""``exempt_tokens``: names resolved to ids in real tokenizers' layouts."""

import pytest
from data_helpers import FAMILIES, family

from verl_dft.errors import InputError
from verl_dft.training.exempt import exempt_ids


@pytest.mark.parametrize("name", ["qwen2", "llama3", "smollm2"])
def test_end_of_turn(name: str) -> None:
    tokenizer = family(name)
    assert tokenizer.convert_tokens_to_ids(FAMILIES[name]["end"]) in exempt_ids(["end_of_turn"], tokenizer)


def test_added_literal_and_id() -> None:
    tokenizer = family("qwen2")
    added = exempt_ids(["added"], tokenizer)
    assert set(added) == set(tokenizer.added_tokens_decoder) and added
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert exempt_ids(["<|im_start|>", 3, start], tokenizer) == tuple(sorted({3, start}))


@pytest.mark.parametrize("name", ["<|nowhere|>", -1, 10**9])
def test_unknown(name: str | int) -> None:
    with pytest.raises(InputError, match="exempt_tokens"):
        exempt_ids([name], family("qwen2"))
