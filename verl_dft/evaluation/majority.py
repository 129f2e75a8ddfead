"""maj@k: how often the most frequent answer of k samples is right."""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean

from verl_dft.errors import InputError

MAX_EXACT_N = 128
"""Up to this many samples per problem every k is exact; above it only k = n, which needs no subsets."""


def answer_key(answer: str | None) -> str | None:
    """What makes two answers one vote: their LaTeX spelling, tidied, without spaces. None does not vote.

    The gold plays no part (a vote cannot know it), nor does algebra: 1/2 and 0.5 are two answers.
    """
    from verl_dft.grading.normalize import squeeze, tidy

    return None if answer is None else squeeze(tidy(answer))


def maj_at_k(samples: Sequence[Sequence[tuple[str | None, bool]]]) -> dict[int, float]:
    """Probability that the majority answer of ``k`` samples is correct, for k = 1 to n; mean over problems.

    Unbiased: k samples are drawn from a problem's n without replacement, and all C(n, k) draws count equally (exactly,
    by counting, not by sampling). The rule within a draw: samples without an answer do not vote; the most frequent
    answer wins; of t answers tied at the top each wins with chance 1/t; no vote at all is wrong. An answer whose
    samples have different verdicts (a time-out among them) is right to the share of its correct ones.

    Args:
        samples: problem by problem, n pairs of (what :func:`answer_key` returned, whether it is correct).

    Returns:
        k -> share of problems. All k from 1 to n if n is at most ``MAX_EXACT_N``, else n alone.

    Raises:
        InputError: no problems, or problems with different numbers of samples.
    """
    if not samples or not samples[0]:
        raise InputError("no problem was evaluated, so there is no majority to take")
    n = len(samples[0])
    if any(len(problem) != n for problem in samples):
        raise InputError(f"majority votes need the same number of samples of every problem, {n} as of the first")
    each = [_all_draws(problem) if n <= MAX_EXACT_N else {n: _whole(problem)} for problem in samples]
    return {k: fmean(problem[k] for problem in each) for k in each[0]}


def _votes(problem: Sequence[tuple[str | None, bool]]) -> tuple[Counter[str], dict[str, float]]:
    """Votes of each answer, and to what share it is correct."""
    verdicts = defaultdict(list)
    for key, correct in problem:
        if key is not None:
            verdicts[key].append(correct)
    return Counter({key: len(v) for key, v in verdicts.items()}), {key: fmean(v) for key, v in verdicts.items()}


def _whole(problem: Sequence[tuple[str | None, bool]]) -> float:
    votes, right = _votes(problem)
    top = [key for key, count in votes.items() if count == max(votes.values())]
    return fmean(right[key] for key in top) if top else 0.0


def _all_draws(problem: Sequence[tuple[str | None, bool]]) -> dict[int, float]:
    votes, right = _votes(problem)
    n, silent = len(problem), len(problem) - votes.total()
    total = dict.fromkeys(range(1, n + 1), 0.0)
    for key, share in right.items():
        if share > 0:
            others = tuple(sorted(count for other, count in votes.items() if other != key))
            for k, chance in enumerate(_win_chances(votes[key], others, silent), 1):
                total[k] += share * chance
    return total


@functools.lru_cache(maxsize=100_000)
def _win_chances(size: int, others: tuple[int, ...], silent: int) -> list[float]:
    """Chance that an answer with ``size`` of the samples wins a draw of k, for k = 1 to n.

    For each number j of its votes the draws are counted in which every other answer has at most j: ``ways[t][r]`` is
    the number of ways to draw r other samples so that t other answers tie with it.
    """
    n = size + sum(others) + silent
    wins = [0.0] * (n + 1)
    for j in range(1, size + 1):
        ways = _ways_to_stay_at_or_below(j, others, silent, n)
        for tied, row in enumerate(ways):
            for r, count in enumerate(row):
                if count:
                    wins[j + r] += math.comb(size, j) * count / (tied + 1) / math.comb(n, j + r)
    return wins[1:]


def _ways_to_stay_at_or_below(j: int, others: tuple[int, ...], silent: int, n: int) -> list[list[int]]:
    most = n - j
    ways = [[1] + [0] * most]
    for count in others:
        longer = [[0] * (most + 1) for _ in range(len(ways) + (count >= j))]
        for tied, row in enumerate(ways):
            for r, number in enumerate(row):
                if number:
                    for drawn in range(min(count, j, most - r) + 1):
                        longer[tied + (drawn == j)][r + drawn] += number * math.comb(count, drawn)
        ways = longer
    silenced = [[0] * (most + 1) for _ in ways]
    for tied, row in enumerate(ways):
        for r, number in enumerate(row):
            if number:
                for drawn in range(min(silent, most - r) + 1):
                    silenced[tied][r + drawn] += number * math.comb(silent, drawn)
    return silenced
