"""Sets drawn from the tiny world (:mod:`verl_dft.data.arithmetic_world`): problems, pretraining texts, the tokenizer.

Train, validation and held-out problems can never meet: which split a problem belongs to is a hash of its computation
(start and operations, without names and wording), so no choice of seed or size mixes them, and pretraining texts are
drawn from the train split alone.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from verl_dft.data.arithmetic_world import (
    LEVELS,
    MAX_VALUE,
    STYLES,
    ArithmeticProblem,
    Level,
    Slips,
    Step,
    apply,
    expert,
    generate,
    guided_prompt,
    native,
    teacher,
    work,
)
from verl_dft.data.records import Problem, Row
from verl_dft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "ArithmeticProblem", "CHAT_TEMPLATE", "LEVELS", "LEVEL_WEIGHTS", "Level", "PRETRAINING_LEVELS", "PRETRAINING_MIX",
    "RETELL_LEVELS", "SPLITS", "STYLES", "Slips", "Step", "apply", "expert", "generate", "guided_prompt",
    "heldout_problems", "make_problems", "native", "pretraining_rows", "split_of", "teacher", "train_tokenizer", "work",
]  # fmt: skip

SPLITS = {"train": range(0, 7), "val": range(7, 8), "heldout": range(8, 10)}
"""Buckets (of 10, by hash) of each split."""
LEVEL_WEIGHTS = (0.05, 0.05, 0.05, 0.15, 0.70)
"""Shares of levels 1..5 among training and held-out problems: mostly what the base cannot do yet."""
PRETRAINING_MIX = {"native": 0.56, "expert": 0.12, "teacher": 0.08, "retell": 0.24}
PRETRAINING_LEVELS = (0.30, 0.34, 0.26, 0.07, 0.03)
"""Hard levels are rare in pretraining, so the base has real gaps there."""
RETELL_LEVELS = (0.2, 0.2, 0.2, 0.2, 0.2)
END, PAD, START = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# a style's text is what the model itself would write (native), or somebody else's
_ORIGIN = {"native": "self", "expert": "expert", "teacher": "teacher", "retell": "guided"}
_MAX_DUPLICATES = 1000


def split_of(problem: ArithmeticProblem) -> str:
    """The split a problem belongs to, by its computation alone."""
    bucket = int.from_bytes(hashlib.sha256(problem.core.encode()).digest()[:8], "big") % 10
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def make_problems(
    num: int,
    seed: int,
    level_weights: Sequence[float] = LEVEL_WEIGHTS,
    split: str = "train",
    style: str = "expert",
) -> list[Problem]:
    """``num`` different problems of a split, with the solution in ``style`` and one solution of the teacher.

    Args:
        level_weights: relative shares of levels 1..5.
        split: ``train``, ``val`` or ``heldout``.
        style: ``expert``, ``native`` or ``teacher``.

    Raises:
        InputError: unknown split or style, or more problems asked for than the levels have.
    """
    _check_choice("split", split, SPLITS)
    _check_choice("style", style, STYLES)
    weights = _check_levels(level_weights)
    rng, problems, seen = random.Random(f"arithmetic {split} {seed}"), [], set()
    duplicates = 0
    while len(problems) < num:
        drawn = _draw(rng, weights, split)
        if drawn.question in seen:
            duplicates += 1
            if duplicates > _MAX_DUPLICATES + 20 * num:
                raise InputError(
                    f"data.source.num_rows: the {split} split of these levels ran out at {len(problems)} different "
                    f"problems of {num}; ask for fewer, or raise the weight of higher levels"
                )
            continue
        seen.add(drawn.question)
        problems.append(
            Problem(
                id=f"arithmetic/{split}/{seed}/{len(problems)}",
                problem=drawn.question,
                answer=str(drawn.answer),
                solution=STYLES[style](drawn, rng),
                teacher_solutions=[teacher(drawn, rng)],
                source="arithmetic",
                level=drawn.level,
            )
        )
    return problems


def heldout_problems(num: int, seed: int, level_weights: Sequence[float] = LEVEL_WEIGHTS) -> list[Problem]:
    """Problems for evaluation, disjoint from all training, validation and pretraining problems of any seed."""
    return make_problems(num, seed, level_weights, split="heldout")


def pretraining_rows(
    num_rows: int,
    seed: int,
    mix: Mapping[str, float] | None = None,
    levels: Sequence[float] = PRETRAINING_LEVELS,
    retell_levels: Sequence[float] = RETELL_LEVELS,
    slips: Slips | None = Slips(),  # noqa: B008 (frozen)
    split: str = "train",
) -> list[Row]:
    """Conversations that teach the base model the world.

    Args:
        mix: relative shares of ``native``, ``expert``, ``teacher`` (solve the question in that style, with slips) and
            ``retell`` (the prompt shows an expert solution, the answer is native and without slips).
        levels, retell_levels: relative shares of levels 1..5 of the plain and the retell texts.
        slips: wrong steps in the plain texts; None for none.
        split: the split whose problems are used.

    Raises:
        InputError: unknown kind of text or split, or weights that are no weights.
    """
    mix = dict(PRETRAINING_MIX if mix is None else mix)
    for kind in mix:
        _check_choice("mix", kind, _ORIGIN)
    _check_choice("split", split, SPLITS)
    plain, retell = _check_levels(levels), _check_levels(retell_levels)
    rng, rows = random.Random(f"arithmetic pretraining {split} {seed}"), []
    kinds = rng.choices(list(mix), list(mix.values()), k=num_rows)
    for index, kind in enumerate(kinds):
        problem = _draw(rng, retell if kind == "retell" else plain, split)
        if kind == "retell":
            prompt, answer = guided_prompt(problem.question, expert(problem, rng)), native(problem, rng)
        else:
            prompt, answer = problem.question, STYLES[kind](problem, rng, slips)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        rows.append(Row(messages, f"arithmetic-pretrain/{split}/{seed}/{index}", _ORIGIN[kind]))
    return rows


def train_tokenizer(vocab_size: int = 512, seed: int = 7, num_problems: int = 4000) -> PreTrainedTokenizerFast:
    """The world's tokenizer: byte-level BPE in which every word and every number 0..60 is one token.

    It is a Qwen2 tokenizer: whatever a folder says, transformers 5 reads the tokenizer of a model of type ``qwen2``
    with Qwen2's own pre-tokenizer, which splits numbers into digits. The numbers are therefore added tokens.

    Special tokens: ``<|endoftext|>`` = 0 (pad), ``<|im_start|>`` = 1, ``<|im_end|>`` = 2 (eos). Save it with the base
    model: another generator gives another vocabulary, and old weights turn to noise.
    """
    from tokenizers import AddedToken, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    numbers = [AddedToken(f" {number}", normalized=False) for number in range(MAX_VALUE + 1)]
    backend = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(numbers),
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_tokenizer_corpus(seed, num_problems), trainer)
    backend.add_tokens(numbers)
    tokenizer = Qwen2Tokenizer(tokenizer_object=backend, eos_token=END, pad_token=PAD, model_max_length=512)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _tokenizer_corpus(seed: int, num_problems: int) -> list[str]:
    rng, texts = random.Random(seed), []
    for _ in range(num_problems):
        problem = generate(rng.choice(list(LEVELS)), rng)
        texts.append(f"user\n{guided_prompt(problem.question, expert(problem, rng))}\nassistant\n")
        texts += [native(problem, rng), teacher(problem, rng)]
    return texts


def _draw(rng: random.Random, weights: Sequence[float], split: str) -> ArithmeticProblem:
    level = rng.choices(list(LEVELS), weights)[0]
    while True:
        problem = generate(level, rng)
        if split_of(problem) == split:
            return problem


def _check_levels(weights: Sequence[float]) -> list[float]:
    weights = [float(w) for w in weights]
    if len(weights) != len(LEVELS) or min(weights) < 0 or sum(weights) <= 0:
        raise InputError(f"level weights must be {len(LEVELS)} numbers >= 0, not all 0 (levels 1..5), got {weights}")
    return weights


def _check_choice(what: str, name: str, valid: Mapping[str, object]) -> None:
    if name not in valid:
        raise InputError(f"data.source.{what}: no {name!r}; use one of {', '.join(valid)}")
