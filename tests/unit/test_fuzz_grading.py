"""Grades of made-up responses: right where they must be, a verdict always; ``scripts/fuzz.py`` tries 100,000."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from verl_dft.grading import VERDICTS, GradeItem, GraderPool
from verl_dft.grading.extract import extract_answer
from verl_dft.grading.quick import quick_judge

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import fuzz  # noqa: E402

quick = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
ANY = st.text(st.characters(exclude_categories=()) | st.sampled_from("\\{}$()[],=^_0123456789 \n#"), max_size=60)
NUMBER = st.integers(-(10**12), 10**12) | st.decimals(-1000, 1000, places=2)
CALM = st.text(st.sampled_from("abc xyz.,\n$🙂"), max_size=30)


@pytest.fixture(scope="module")
def grader() -> Iterator[fuzz.Grader]:
    made = fuzz.Grader(Path())
    yield made
    made.pool.close()


@quick
@given(response=ANY, gold=ANY)
def test_any_response_and_gold_have_an_answer_or_none(response: str, gold: str) -> None:
    answer = extract_answer(response, several=True)
    assert answer is None or (answer == answer.strip() and answer)
    verdict = quick_judge(answer, gold) if answer is not None else None
    assert verdict is None or (isinstance(verdict.equal, bool) and (verdict.qwen or not verdict.equal))


@quick
@given(gold=ANY.filter(str.strip))
def test_a_gold_is_its_own_answer(gold: str) -> None:
    verdict = quick_judge(gold, gold)
    assert verdict is not None and verdict.equal and verdict.qwen


@quick
@given(number=NUMBER, before=CALM, after=CALM)
def test_words_around_a_box_change_nothing(number: object, before: str, after: str) -> None:
    assert extract_answer(f"{before}\\boxed{{{number}}}{after}") == str(number)
    assert extract_answer(f"{before}\\boxed{{7}} or \\boxed{{{number}") is None


@quick
@given(one=NUMBER, other=NUMBER)
def test_numbers_are_equal_both_ways_or_neither(one: object, other: object) -> None:
    there, back = quick_judge(str(one), str(other)), quick_judge(str(other), str(one))
    assert there is not None and back is not None
    if one == other:
        assert there.equal and back.equal
    elif isinstance(one, int) and isinstance(other, int):
        assert not there.equal and not back.equal


@pytest.mark.slow
def test_cases_of_the_script(grader: fuzz.Grader) -> None:
    line = fuzz.batch(grader, "grader", 0, 0, 150)
    assert line["findings"] == [] and sum(line["outcomes"].values()) == 150
    assert {"itself: correct", "another: wrong", "cut off: no_answer"} <= set(line["outcomes"])


def test_the_script_finds_a_grader_that_says_yes_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl_dft.grading import pool
    from verl_dft.grading.judge import Verdict

    monkeypatch.setattr(pool, "quick_judge", lambda *key: Verdict(True, True, "string"))
    with GraderPool(1) as one:
        target = fuzz.Grader.__new__(fuzz.Grader)
        target.pool = one
        line = fuzz.batch(target, "grader", 0, 0, 60)
    assert all(found["found"].startswith("not ") for found in line["findings"])
    assert len(line["findings"]) == sum(n for kind, n in line["outcomes"].items() if kind in
                                        ("another: correct", "superseded: correct")) > 5  # fmt: skip


def test_a_response_of_odd_characters_is_graded_by_what_is_left(grader: fuzz.Grader) -> None:
    (grade,) = grader.pool.grade([GradeItem("\ud800\x00 \\boxed{5}\x1b[31m", "5")])
    assert grade.verdict == "correct" and grade.verdict in VERDICTS
