"""Ids that a sampler can draw and a tokenizer does not know: a model's padded vocabulary."""

import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer

from verl_dft.data.template import ConversationEncoder, vocabulary_size


def test_a_padded_vocabulary_is_the_models(repo_root: Path, tmp_path: Path) -> None:
    base = repo_root / "recipes" / "tiny" / "base"
    size = json.loads((base / "config.json").read_text())["vocab_size"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert len(tokenizer) < size == vocabulary_size(tokenizer) == ConversationEncoder(tokenizer).vocabulary
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, tmp_path)
    alone = AutoTokenizer.from_pretrained(tmp_path)  # no config.json beside it
    assert vocabulary_size(alone) == len(alone) == len(tokenizer)
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 600}}')
    assert vocabulary_size(AutoTokenizer.from_pretrained(tmp_path)) == 600
