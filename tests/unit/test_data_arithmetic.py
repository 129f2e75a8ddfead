"""The tiny world: its problems, texts, splits and tokenizer."""

from __future__ import annotations

import collections
import random
import re
from typing import Any

import pytest

from verl_dft.data import arithmetic as world
from verl_dft.data.arithmetic_world import MAX_VALUE, ArithmeticProblem
from verl_dft.errors import InputError

# Eve has 15 : 15 - 2 = 13, 13 * 2 = 26, 26 - 7 = 19, 19 - 3 = 16
FOUR_STEPS = ArithmeticProblem("q", 15, (("-", 2), ("*", 2), ("-", 7), ("-", 3)), 16, 3)


def parse_question(text: str) -> tuple[int, list[tuple[str, int]]]:
    """Start and operations of a question, read by rules of this test's own."""
    match = re.fullmatch(r"[A-Z][a-z]{2} has (\d+) [a-z]{4} : (.*) \. How many \?", text)
    assert match, text
    signs = {"gets": "+", "finds": "+", "loses": "-", "eats": "-", "times": "*"}
    ops = []
    for letter, part in zip("abcdef", match[2].split(" , "), strict=False):
        name, verb, number = part.split()
        assert name == letter
        ops.append((signs[verb], int(number)))
    return int(match[1]), ops


def run(start: int, ops: list[tuple[str, int]]) -> list[int]:
    values = [start]
    for sign, number in ops:
        values.append({"+": values[-1] + number, "-": values[-1] - number, "*": values[-1] * number}[sign])
    return values


def boxed(text: str) -> int:
    return int(re.findall(r"\\boxed\{ (\d+) \}", text)[-1])


def equations(text: str) -> list[bool]:
    """Whether each equation of a native or expert text holds."""
    found = re.findall(r"((?:[\d(][\d()+*\- ]*)) = (\d+)", text.replace(r"\cdot", "*"))
    return [eval(left) == int(right) for left, right in found]  # noqa: S307 (digits and signs only)


def test_native_and_teacher_texts_by_hand() -> None:
    rng = random.Random(0)
    assert world.native(FOUR_STEPS, rng) == (
        r"a 15 - 2 = 13 ; b 13 * 2 = 26 ; c 26 - 7 = 19 ; d 19 - 3 = 16 ; Answer \boxed{ 16 }"
    )
    assert world.teacher(FOUR_STEPS, rng) == (
        r"Start at 15 . Step a - 2 gives 13 . Step b x 2 gives 26 . Step c - 7 gives 19 . Step d - 3 gives 16 . "
        r"The answer is \boxed{ 16 }"
    )


def test_expert_text_fuses_some_pairs_and_brackets_before_multiplying() -> None:
    problem = ArithmeticProblem("q", 4, (("-", 3), ("*", 2)), 2, 1)
    texts = [world.expert(problem, random.Random(seed)) for seed in range(400)]
    fused = [r"( 4 - 3 ) \cdot 2 = 2" in text for text in texts]
    stepwise = ["$ 4 - 3 = 1 $" in text and r"$ 1 \cdot 2 = 2 $" in text for text in texts]
    assert all(a != b for a, b in zip(fused, stepwise, strict=True))
    assert 0.62 < sum(fused) / 400 < 0.78  # probability 0.7, sd 0.023
    assert all(re.search(r"\$ \\boxed\{ 2 \} \$ \.$", text) for text in texts)
    assert len({text.split("$")[0] for text in texts}) == 5  # openers


@pytest.mark.parametrize("level", world.LEVELS)
def test_generated_problems_follow_their_level(level: int) -> None:
    spec, rng = world.LEVELS[level], random.Random(level)
    kinds: collections.Counter[str] = collections.Counter()
    for _ in range(300):
        problem = world.generate(level, rng)
        start, ops = parse_question(problem.question)
        values = run(start, ops)
        assert (start, tuple(ops), values[-1]) == (problem.start, problem.ops, problem.answer)
        assert 2 <= start <= 20 and all(1 <= value <= MAX_VALUE for value in values)
        assert len(ops) == spec.num_steps == level + 1
        for sign, number in ops:
            kinds["mul" if sign == "*" else "big" if number > 9 else "small"] += 1
            assert number in spec.multipliers if sign == "*" else 2 <= number <= (19 if spec.big_prob else 9)
        for style in world.STYLES.values():
            text = style(problem, rng)
            assert boxed(text) == problem.answer and all(equations(text))
    assert 0.05 < kinds["mul"] / kinds.total() < 0.35  # below mul_prob where products leave 1..60
    assert (kinds["big"] > 0) == (spec.big_prob > 0)


def test_slips_are_as_frequent_as_asked_and_carried_on() -> None:
    rng, slips = random.Random(1), world.Slips(small=0.0, mul=0.0, big=0.5)
    wrong: collections.Counter[tuple[bool, bool]] = collections.Counter()
    for _ in range(2000):
        problem = world.generate(5, rng)
        steps = world.work(problem, rng, slips)
        assert [s.before for s in steps[1:]] == [s.after for s in steps[:-1]]
        for step in steps:
            right = world.apply(step.before, step.sign, step.operand)
            wrong[step.sign != "*" and step.operand > 9, step.after != right] += 1
            assert 0 <= step.after <= MAX_VALUE
            assert abs(step.after - right) in (0, 1, 2, 10) or step.after in (0, MAX_VALUE)
    # of the two-digit steps half are to slip, less those slips that would lead out of the range; of the others none
    assert 0.35 < wrong[True, True] / (wrong[True, True] + wrong[True, False]) < 0.5
    assert wrong[False, True] == 0 and wrong[False, False] > 1000
    assert boxed(world.native(FOUR_STEPS, random.Random(3), world.Slips(1.0, 1.0, 1.0))) != 16


def test_splits_never_share_a_computation() -> None:
    cores: dict[str, set] = {name: set() for name in world.SPLITS}
    for seed in (0, 1):
        cores["train"] |= {str(parse_question(p.problem)) for p in world.make_problems(400, seed, (1, 1, 1, 1, 1))}
        rows = world.pretraining_rows(1500, seed)
        cores["train"] |= {str(parse_question(r.messages[0]["content"].split("\n")[-1])) for r in rows}
        cores["heldout"] |= {str(parse_question(p.problem)) for p in world.heldout_problems(300, seed, (1, 1, 1, 1, 1))}
        val = world.make_problems(100, seed, (1, 1, 1, 1, 1), split="val")
        cores["val"] |= {str(parse_question(p.problem)) for p in val}
    assert not cores["train"] & cores["heldout"]
    assert not cores["train"] & cores["val"] and not cores["val"] & cores["heldout"]
    assert all(len(found) > 100 for found in cores.values())


def test_problem_sets_are_seeded_distinct_and_of_the_level_mix() -> None:
    problems = world.make_problems(768, 0)
    assert problems == world.make_problems(768, 0) and problems != world.make_problems(768, 1)
    assert problems[:100] == world.make_problems(100, 0)
    assert len({p.problem for p in problems}) == len({p.id for p in problems}) == 768
    levels = collections.Counter(p.level for p in problems)
    assert 0.65 < levels[5] / 768 < 0.75 and 0.11 < levels[4] / 768 < 0.19  # .70 and .15, sd .017 and .013
    assert all(boxed(p.solution or "") == int(p.answer) for p in problems)
    assert all("$" in (p.solution or "") and "Step a" in (p.teacher_solutions or [""])[0] for p in problems)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "data.source.split: no 'test'; use one of train, val, heldout"),
        ({"style": "novel"}, "data.source.style: no 'novel'; use one of native, teacher, expert"),
        ({"level_weights": (1, 2)}, "level weights must be 5 numbers"),
        ({"level_weights": (0, 0, 0, 0, 0)}, "level weights must be 5 numbers"),
    ],
)
def test_bad_options(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        world.make_problems(3, 0, **arguments)
    with pytest.raises(InputError, match="data.source.mix: no 'poem'"):
        world.pretraining_rows(3, 0, mix={"poem": 1.0})


def test_a_split_that_runs_out_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(world.LEVELS, 1, world.Level(1, 1.0, (2,), 0.0))  # 19 computations in all, few in val
    with pytest.raises(InputError, match=r"the val split of these levels ran out at \d+ different problems of 2000"):
        world.make_problems(2000, 0, (1, 0, 0, 0, 0), split="val")


def test_pretraining_mix() -> None:
    rows = world.pretraining_rows(4000, 0)
    assert rows == world.pretraining_rows(4000, 0)
    kinds = collections.Counter(row.origin for row in rows)
    want = {"self": 0.56, "expert": 0.12, "teacher": 0.08, "guided": 0.24}
    assert all(abs(kinds[k] / 4000 - share) < 0.025 for k, share in want.items())  # sd at most .008
    wrong = 0
    for row in rows:
        question, answer = (m["content"] for m in row.messages)
        start, ops = parse_question(question.split("\n")[-1])
        right = run(start, ops)[-1]
        if row.origin == "guided":
            reference, verb, _ = question.split("\n")
            assert reference.startswith("Reference : ") and verb == "Retell ."
            assert boxed(reference) == boxed(answer) == right and answer.startswith("a ")
        assert all(0 <= int(number) <= MAX_VALUE for number in re.findall(r"(?<!\w)-?\d+(?!\w)", answer))
        wrong += row.origin == "self" and boxed(answer) != right
    assert 0.08 < wrong / kinds["self"] < 0.25  # slips of 3 to 12 % a step over 2 to 6 steps
    clean = world.pretraining_rows(500, 0, mix={"native": 1.0}, slips=None)
    assert all(all(equations(row.messages[1]["content"])) for row in clean)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return world.train_tokenizer()


def test_tokenizer_gives_every_number_one_token(tokenizer: Any) -> None:
    ids = [tokenizer(f" {number}", add_special_tokens=False)["input_ids"] for number in range(1, MAX_VALUE + 1)]
    assert all(len(found) == 1 for found in ids) and len({found[0] for found in ids}) == MAX_VALUE
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2) and len(tokenizer) <= 512


def test_tokenizer_is_lossless_and_prompt_and_answer_can_be_encoded_apart(tokenizer: Any) -> None:
    lengths = []
    for row in world.pretraining_rows(300, 5):
        text = tokenizer.apply_chat_template(row.messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(row.messages[:1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        parts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, text[len(prompt) :])]
        assert ids == parts[0] + parts[1]
        assert tokenizer.decode(ids) == text
        lengths.append(len(ids))
    assert max(lengths) < 200 and 50 < sum(lengths) / 300 < 110


def test_tokenizer_is_the_same_every_time(tokenizer: Any) -> None:
    assert world.train_tokenizer().get_vocab() == tokenizer.get_vocab()
