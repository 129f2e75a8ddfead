"""Small tokenizers with the special tokens and chat templates of known model families, for the data tests.

The templates state facts about the families (which turns they add, what they trim, how a turn ends) in their own words.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Qwen2: a default system turn, messages as they are, a newline after every turn
QWEN2 = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 3: begin-of-text, messages trimmed, nothing after the end of a turn
LLAMA3 = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# SmolLM2: Qwen2's form with its own system turn
SMOLLM2 = QWEN2.replace(
    "You are a helpful assistant.", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
)
# ours: injects a system line, trims, has no end token at all and writes text after the response
PLAIN = (
    "System: answer briefly.\n\n"
    "{% for m in messages %}{{ ('Q: ' if m['role'] == 'user' else 'A: ') + m['content'] | trim + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
# ours: knows no generation prompt, as early ChatML templates did
NO_GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
# reasoning models: the generation prompt opens the reasoning, the rendering of a finished turn drops it
REASONING = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>assistant\n' + m['content'].split('</think>')[-1] + '<|im_end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)

CORPUS = [
    "user\n\nassistant\n\nsystem\nYou are a helpful assistant.\n\nWhat is 2 + 3? The answer is \\boxed{5}.\n\n",
    "A: Let x be the number of apples.\nThen x = 4 + 7 = 11.\n\nQ: How many?\n\n  Solve for $y$ : \\frac{1}{2} y = 3.",
] * 4
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>"]
_SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"template": QWEN2, "eos": "<|im_end|>", "end": "<|im_end|>"},
    # the base model's tokenizer: turns end with another token than texts do
    "qwen2-base": {"template": QWEN2, "eos": "<|endoftext|>", "end": "<|im_end|>"},
    "llama3": {"template": LLAMA3, "eos": "<|end_of_text|>", "end": "<|eot_id|>"},
    "smollm2": {"template": SMOLLM2, "eos": "<|im_end|>", "end": "<|im_end|>"},
    "plain": {"template": PLAIN, "eos": "<|endoftext|>", "end": "<|endoftext|>"},
    "no-generation": {"template": NO_GENERATION, "eos": "<|im_end|>", "end": "<|im_end|>"},
    "reasoning": {"template": REASONING, "eos": "<|im_end|>", "end": "<|im_end|>"},
}


@lru_cache(maxsize=1)
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    # words, single digits and runs of newlines are split as Qwen2 and Llama 3 do
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def family(name: str) -> PreTrainedTokenizerFast:
    """A fresh byte-level tokenizer with the special tokens and the template of a model family."""
    facts = FAMILIES[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        eos_token=facts["eos"],
        pad_token="<|endoftext|>",
        bos_token="<|begin_of_text|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = facts["template"]
    return tokenizer


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer that marks the start of every text with a space, and Llama 2's template (no generation prompt)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(
        ["[INST] what is it [/INST] it is here now", "abcdefghijklmnopqrstuvwxyz ?.0123456789"] * 4, trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    return fast


def chat(*turns: str) -> list[dict[str, str]]:
    """Messages of alternating user and assistant turns."""
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]
