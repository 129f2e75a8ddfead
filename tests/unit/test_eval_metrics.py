"""Metrics against values worked out by hand."""

import itertools
import math

import pytest

from verl_dft.errors import InputError
from verl_dft.evaluation.metrics import avg_at_n, clustered_ci95, paired_difference, pass_at_k


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
