"""Metrics against values worked out by hand, closed forms, brute force and published implementations."""

import itertools
import math
import random
from statistics import fmean

import mpmath
import pytest

from verl_dft.errors import InputError
from verl_dft.evaluation.majority import MAX_EXACT_N, answer_key, maj_at_k
from verl_dft.evaluation.metrics import (
    avg_at_n,
    clustered_ci95,
    macro_average,
    paired_difference,
    pass_at_every_k,
    pass_at_k,
    std_over_problems,
    std_over_runs,
    std_within_problems,
)
from verl_dft.evaluation.student import t975, two_sided_p
from verl_dft.evaluation.summary import length_statistics, summarize


def test_avg_at_n() -> None:
    assert avg_at_n([4, 0, 2], 4) == pytest.approx(0.5)


def test_pass_at_k_by_hand() -> None:
    """n=4, c=1: 1 - C(3,2)/C(4,2) = 1 - 3/6; c=3: every pair holds a correct one; c=0: none does."""
    assert pass_at_k([1], 4, 2) == pytest.approx(0.5)
    assert pass_at_k([3], 4, 2) == 1
    assert pass_at_k([1, 3, 0], 4, 2) == pytest.approx(0.5)
    assert pass_at_k([1, 3], 4, 1) == pytest.approx(avg_at_n([1, 3], 4))


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample() -> None:
    n, c, k = 6, 2, 3
    subsets = list(itertools.combinations(range(n), k))
    assert pass_at_k([c], n, k) == pytest.approx(sum(min(s) < c for s in subsets) / len(subsets))


def test_interval_by_hand() -> None:
    """Two problems at .25 and .75: mean .5, s = .3536, s/sqrt(2) = .25, t(.975; 1) = 12.7062, clipped to [0, 1].

    Five at .4 .5 .6 .5 .5: s = .0707, s/sqrt(5) = .0316, t(.975; 4) = 2.7764: .5 +- .0878.
    """
    assert clustered_ci95([0.25, 0.75]) == (0, 1)
    assert clustered_ci95([0.4, 0.5, 0.6, 0.5, 0.5]) == pytest.approx((0.5 - 0.08780, 0.5 + 0.08780), abs=1e-4)


@pytest.mark.parametrize(("problems", "t"), [(6, 2.5706), (11, 2.2281), (31, 2.0423), (181, 1.9732)])
def test_interval_uses_students_t(problems: int, t: float) -> None:
    values = [0.5 + 0.1 * (-1) ** i for i in range(problems - problems % 2)] + [0.5] * (problems % 2)
    mean = sum(values) / problems
    s = math.sqrt(sum((v - mean) ** 2 for v in values) / (problems - 1))
    low, high = clustered_ci95(values)
    assert (high - low) / 2 == pytest.approx(t * s / math.sqrt(problems), rel=2e-4)


def test_clustering_ignores_how_many_samples_a_problem_has() -> None:
    """16 identical samples per problem say no more than one: the interval depends on the problems alone."""
    per_problem = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    independent = 1.96 * math.sqrt(2 / 3 * 1 / 3 / (6 * 16))
    low, high = clustered_ci95(per_problem)
    assert high - low > 3 * 2 * independent


def test_all_wrong_is_not_certainty() -> None:
    """0 of 10: the exact upper end is 1 - .025^(1/10) = .3085."""
    assert clustered_ci95([0.0] * 10) == (0.0, pytest.approx(0.30850, abs=1e-5))
    assert clustered_ci95([1.0] * 10) == (pytest.approx(0.69150, abs=1e-5), 1.0)
    assert clustered_ci95([0.5]) is None


def test_paired_difference_by_hand() -> None:
    """Differences .25 .25 .75 .75: mean .5, s = .28868, s/2 = .14434, t(.975; 3) = 3.1824: +- .45935."""
    a = {"p": 0.0, "q": 0.5, "r": 0.0, "s": 0.25}
    b = {"s": 1.0, "r": 0.75, "q": 0.75, "p": 0.25}
    mean, interval = paired_difference(a, b)
    assert mean == pytest.approx(0.5)
    assert interval == pytest.approx((0.5 - 0.45935, 0.5 + 0.45935), abs=1e-4)


def test_paired_is_narrower_where_difficulty_is_shared() -> None:
    hard_and_easy = {str(i): (i % 2) * 0.8 for i in range(20)}
    better = {key: value + 0.1 + 0.01 * (int(key) % 3) for key, value in hard_and_easy.items()}
    mean, (low, high) = paired_difference(hard_and_easy, better)
    assert low > 0.1 and high < 0.12 + 0.01 and mean == pytest.approx(0.1 + 0.01 * 0.95)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="1 are in one alone"):
        paired_difference({"a": 1.0}, {"a": 1.0, "b": 0.0})
    with pytest.raises(InputError, match="k=5 and n=4"):
        pass_at_k([1], 4, 5)
    with pytest.raises(InputError, match="no problem"):
        avg_at_n([], 4)
    with pytest.raises(InputError, match="more than n=4"):
        avg_at_n([5], 4)


def test_pass_at_k_agrees_with_the_published_product() -> None:
    """Chen et al. (2021) compute 1 - C(n-c, k) / C(n, k) as 1 - prod_{i=n-c+1..n} (1 - k / i), stable for large n."""
    generator = random.Random(0)
    for _ in range(300):
        n = generator.randint(1, 200)
        counts = [generator.randint(0, n) for _ in range(generator.randint(1, 8))]
        k = generator.randint(1, n)
        published = fmean(1 if n - c < k else 1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1)) for c in counts)
        assert pass_at_k(counts, n, k) == pytest.approx(published, abs=1e-12)
        assert pass_at_every_k(counts, n)[k] == pytest.approx(published, abs=1e-12)


# (n, k, pass@k) that estimate_pass_at_k of github.com/openai/human-eval (commit 6d43fb98) gives for these counts
PUBLISHED = [
    (1, 1, 0.0),
    (4, 2, 0.3333333333333333),
    (16, 1, 0.296875),
    (16, 8, 0.46923076923076923),
    (16, 16, 0.875),
    (64, 10, 0.7424830907389594),
    (200, 100, 0.7345141745059771),
    (1000, 25, 0.5689722510605946),
]


def test_pass_at_k_agrees_with_what_the_published_implementation_gives() -> None:
    generator = random.Random(6)
    for n, k, published in PUBLISHED:
        counts = [int(n * generator.random() ** 2.5) for _ in range(8)]
        assert pass_at_k(counts, n, k) == pytest.approx(published, abs=1e-14)
        assert pass_at_every_k(counts, n)[k] == pytest.approx(published, abs=1e-14)


def test_pass_at_k_agrees_with_counting_every_choice() -> None:
    """On random data, without a formula: of all C(n, k) choices of k samples, those with a correct one."""
    generator = random.Random(7)
    for _ in range(40):
        n = generator.randint(1, 9)
        problems = [[generator.random() < 0.4 for _ in range(n)] for _ in range(generator.randint(1, 6))]
        found = pass_at_every_k([sum(problem) for problem in problems], n)
        for k in range(1, n + 1):
            shares = [fmean(any(choice) for choice in itertools.combinations(problem, k)) for problem in problems]
            assert found[k] == pytest.approx(fmean(shares), abs=1e-12)


def test_pass_at_every_k_has_every_k_and_never_falls() -> None:
    found = pass_at_every_k([1, 0, 3, 7], 8)
    assert list(found) == list(range(1, 9))
    assert list(found.values()) == sorted(found.values())
    assert found[1] == pytest.approx(11 / 32) and found[8] == 0.75


def test_pass_at_k_of_the_binomial_is_unbiased() -> None:
    """Over c ~ Binomial(n, p), the expectation of the estimate is 1 - (1-p)^k exactly."""
    n, p = 7, 0.3
    for k in range(1, n + 1):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k([c], n, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k)


def test_student_t_agrees_with_mpmath_and_closed_forms() -> None:
    """One degree: p = 1 - 2 atan(t) / pi. Two: p = 1 - t / sqrt(2 + t^2). Others: mpmath's incomplete beta function."""
    for t in (1e-3, 0.5, 1.0, 2.5, 40.0):
        assert two_sided_p(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, rel=1e-9)
        assert two_sided_p(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    generator = random.Random(1)
    for _ in range(200):
        v, t = generator.choice([3, 4.5, 29, 179.7, 499, 5000]), 10 ** generator.uniform(-2, 1)
        exact = mpmath.betainc(mpmath.mpf(v) / 2, 0.5, 0, v / (v + mpmath.mpf(t) ** 2), regularized=True)
        assert two_sided_p(t, v) == pytest.approx(float(exact), rel=1e-7)
    assert [round(t975(v), 4) for v in (1, 2, 3, 4, 10, 180)] == [12.7062, 4.3027, 3.1824, 2.7764, 2.2281, 1.9732]


def test_intervals_agree_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = random.Random(2)
    for _ in range(50):
        values = [0.3 + 0.4 * generator.random() for _ in range(generator.randint(3, 60))]
        expected = stats.t.interval(0.95, len(values) - 1, fmean(values), stats.sem(values))
        assert clustered_ci95(values) == pytest.approx(expected, rel=1e-9)


def test_an_interval_holds_the_truth_in_95_of_100() -> None:
    generator, hits = random.Random(3), 0
    for _ in range(1000):
        low, high = clustered_ci95([fmean(generator.random() < p for _ in range(8))
                                    for p in (generator.random() for _ in range(40))])  # fmt: skip
        hits += low <= 0.5 <= high
    assert 930 <= hits <= 968  # 950 +- 2.6 standard deviations


def test_the_three_standard_deviations_by_hand() -> None:
    """Samples 1100, 0001: averages .5 and .25, sd .17678. Runs .5 .5 0 .5: mean .375, sd .25.

    Within: c (n - c) / (n (n - 1)) is 4/12 and 3/12, mean .29167, root .54006.
    """
    correct = [[True, True, False, False], [False, False, False, True]]
    assert std_over_problems([2, 1], 4) == pytest.approx(0.17678, abs=1e-5)
    assert std_over_runs(correct) == pytest.approx(0.25)
    assert std_within_problems([2, 1], 4) == pytest.approx(0.54006, abs=1e-5)
    assert std_over_problems([2], 4) is None and std_over_runs([[True], [False]]) is None
    assert std_within_problems([1, 0], 1) is None


def brute_majority(problem: list[tuple[str | None, bool]], k: int) -> float:
    """Every subset, every rule written out: only votes count, ties share, no vote is wrong."""
    scores = []
    for subset in itertools.combinations(problem, k):
        votes = [key for key, _ in subset if key is not None]
        top = [key for key in set(votes) if votes.count(key) == max(votes.count(other) for other in votes)]
        right = {key: fmean(correct for other, correct in problem if other == key) for key in top}
        scores.append(fmean(right.values()) if top else 0.0)
    return fmean(scores)


def test_majority_agrees_with_every_subset() -> None:
    generator = random.Random(4)
    for _ in range(60):
        n = generator.randint(1, 9)
        keys = [generator.choice(["a", "a", "b", "c", "d", None]) for _ in range(n)]
        problem = [(key, key == "a" or (key == "d" and generator.random() < 0.5)) for key in keys]
        found = maj_at_k([problem])
        assert list(found) == list(range(1, n + 1))
        for k in found:
            assert found[k] == pytest.approx(brute_majority(problem, k), abs=1e-12)


def test_majority_by_hand() -> None:
    """a a b: draws of two are aa, ab, ab: a wins 1 + 1/2 + 1/2 of 3. The whole is a's. maj@1 is avg@n."""
    problem = [("a", True), ("a", True), ("b", False)]
    assert maj_at_k([problem]) == pytest.approx({1: 2 / 3, 2: 2 / 3, 3: 1.0})
    assert maj_at_k([[(None, False)] * 3]) == {1: 0, 2: 0, 3: 0}
    assert maj_at_k([[("a", True), ("b", False)]])[2] == 0.5
    with pytest.raises(InputError, match="same number"):
        maj_at_k([problem, problem[:2]])


def test_majority_of_very_many_samples_is_of_all_alone() -> None:
    n = MAX_EXACT_N + 2
    assert maj_at_k([[("a", True)] * (n // 2) + [("b", False)] * (n // 2)]) == {n: 0.5}


def test_votes_are_spellings() -> None:
    assert answer_key(r"\dfrac{1}{2}") == answer_key(r"\frac12") == answer_key(r" \frac{1}{2} ")
    assert answer_key("1,2") != answer_key("12") and answer_key("0.5") != answer_key(r"\frac12")
    assert answer_key(None) is None


def row(problem: str, index: int, grade: str, **other: object) -> dict:
    known = {"answer": None if grade == "no_answer" else grade, "num_tokens": 10 * index, "finish_reason": "stop"}
    return {"problem_id": problem, "index": index, "grade": grade, **known, **other}


ROWS = [
    row("p", 0, "correct", qwen="correct"),
    row("p", 1, "wrong", qwen="correct", finish_reason="length"),
    row("q", 0, "no_answer", qwen="no_answer"),
    row("q", 1, "correct", qwen="correct"),
]


def test_summary_by_hand() -> None:
    found = summarize(list(reversed(ROWS)), ["p", "q"], 2, {"p": 3})
    assert (found["num_problems"], found["num_samples"], found["avg"], found["avg_qwen"]) == (2, 4, 0.5, 0.75)
    assert found["pass_at_k"] == {"1": 0.5, "2": 1.0}
    assert found["maj_at_k"] == {"1": 0.5, "2": 0.75}  # p ties, q has one vote and that is right
    assert found["avg_by_level"] == {"3": 0.5} and found["std_over_runs"] == 0 and found["num_disagree"] == 1
    assert found["verdicts"] == {"correct": 2, "wrong": 1, "no_answer": 1, "timeout": 0, "error": 0}
    assert (found["no_answer_frac"], found["truncated_frac"]) == (0.25, 0.25)
    assert [problem["num_correct"] for problem in found["per_problem"]] == [1, 1]
    assert found["std_over_problems"] == 0 and found["std_within_problems"] == pytest.approx(math.sqrt(0.5))
    without = summarize([{k: v for k, v in r.items() if k != "qwen"} for r in ROWS], ["p", "q"], 2)
    assert not [key for key in without if "qwen" in key or "disagree" in key]


def test_length_statistics_by_hand() -> None:
    rows = [row("p", i, "correct" if i < 5 else "wrong", num_tokens=i + 1) for i in range(20)]
    found = length_statistics(rows)
    assert (found["mean"], found["median"], found["p95"], found["max"]) == (10.5, 10.5, 19, 20)
    assert (found["mean_correct"], found["mean_not_correct"], found["mean_truncated"]) == (3, 13, None)


def test_a_score_needs_every_sample() -> None:
    cases = [
        (ROWS[:2], "2 of 4 samples are missing .'q' sample 0, 'q' sample 1."),
        ([*ROWS, ROWS[0]], "1 samples are there more than once .'p' sample 0."),
        ([*ROWS, row("r", 0, "wrong")], "1 samples are of no problem or index of this evaluation .'r' sample 0."),
        ([*ROWS[:3], {**ROWS[3], "grade": None}], "no verdict in column 'grade' .'q' sample 1."),
        ([*ROWS[:3], {**ROWS[3], "qwen": ""}], "no verdict in column 'qwen' .'q' sample 1."),
        ([], "4 of 4 samples are missing"),
    ]
    for rows, message in cases:
        with pytest.raises(InputError, match=message):
            summarize(rows, ["p", "q"], 2)
    with pytest.raises(InputError, match="not unique"):
        summarize(ROWS, ["p", "p"], 2)


def test_a_difference_without_spread_has_no_interval() -> None:
    """The same model twice, or +1 on both problems: certainty is not what that shows."""
    assert paired_difference({"a": 0.5, "b": 0.1}, {"a": 0.5, "b": 0.1}) == (0, None)
    assert paired_difference({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0}) == (1, None)


def test_a_mean_over_benchmarks_by_hand() -> None:
    """Means 0.5 and 0.25; squared errors 1/12 (sd .5, 3 values) and 0: width t(2) sqrt(1/12) / 2."""
    average = macro_average([[0, 0.5, 1], [0.25, 0.25, 0.25]])
    assert average.mean == 0.375 and average.degrees == pytest.approx(2)
    assert average.ci95[1] - average.mean == pytest.approx(4.302653 * math.sqrt(1 / 12) / 2)
    assert macro_average([[1], [1, 0]]).ci95 is None and macro_average([[1, 1], [0, 0]]).ci95 is None
