"""Group fine-tuning's data: K responses to a problem from expert, teacher and the model itself, with advantages.

Pure: problems and graded responses in, rows and counts out. GFT, arXiv 2604.14258, Sec. 3.1 and Eq. 4.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl_dft.build.group_plan import (
    MEMBERS,
    Candidate,
    Candidates,
    Composition,
    GroupOptions,
    Plan,
    plan_groups,
    usable,
)
from verl_dft.build.reject import row_prompt
from verl_dft.data.records import Problem, Row
from verl_dft.errors import InputError
from verl_dft.grading.pool import VERDICTS


@dataclass(frozen=True)
class _Group:
    problem: Problem
    composition: Composition
    members: list[tuple[str, Candidate]]
    rewards: list[float]
    advantages: list[float]

    @property
    def all_equal(self) -> bool:
        return len(set(self.rewards)) == 1


@dataclass(frozen=True)
class Groups:
    """The groups in the order of the problems, and what was counted."""

    kept: list[_Group]
    options: GroupOptions
    statistics: dict[str, Any]

    @property
    def rows(self) -> Iterator[Row]:
        """Rows, group by group (expert, teacher, self); stored responses are read as their groups are reached."""
        return (row for group in self.kept for row in _rows(group, self.options))


def advantages(rewards: Sequence[float], std: str = "sample", epsilon: float = 1e-6) -> np.ndarray:
    r"""Standardised rewards, :math:`A_k = (R_k - \mu) / (\sigma + \epsilon)` (GFT, Eq. 4), dimensionless.

    Args:
        rewards: [K] of one group.
        std: ``sample`` (divisor K - 1) or ``population`` (divisor K).

    Returns:
        [K] float64; exactly 0 where all rewards are equal, whatever the rounding and ``epsilon``.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if (values == values[0]).all():
        return np.zeros_like(values)
    return (values - values.mean()) / (values.std(ddof=1 if std == "sample" else 0) + epsilon)


def build_groups(
    problems: Sequence[Problem], candidates: Mapping[str, Candidates], composition: Composition, options: GroupOptions
) -> Groups:
    """A group per problem.

    Rewards are 1 for a correct response and 0 for any other verdict. Responses that could not be graded are taken
    last. A problem whose gold is empty or unusable is left out and counted, since nothing can be judged there; under
    ``no_gal`` it stays.

    Raises:
        InputError: what :func:`plan_groups` raises, or no group is left.
    """
    plan = plan_groups(problems, candidates, composition, options)
    groups = [
        _group(problem, candidates[problem.id], plan.compositions[problem.id], options)
        for problem in problems
        if problem.id in plan.compositions
    ]
    kept = [group for group in groups if any(group.advantages) or not options.drop_equal]
    if not kept:
        raise InputError(f"in all {len(groups)} groups the rewards are equal, and drop_equal=true leaves none")
    return Groups(kept, options, _statistics(len(problems), groups, kept, plan, composition, options))


# ---- one group ----


def _group(problem: Problem, found: Candidates, composition: Composition, options: GroupOptions) -> _Group:
    members = [("expert", found.expert)] if composition.expert and found.expert else []
    if composition.alone:
        return _Group(problem, composition, members, [], [1.0])
    members += [("teacher", one) for one in usable(found.teacher)[: composition.teacher]]
    members += [("self", one) for one in usable(found.own)[: composition.own]]
    rewards = [_reward(origin, one, options) for origin, one in members]
    values = advantages(rewards, options.std, options.epsilon)
    if options.keep_expert and composition.expert and len(set(rewards)) == 1:
        values[0] = 1.0
    return _Group(problem, composition, members, rewards, values.tolist())


def _reward(origin: str, response: Candidate, options: GroupOptions) -> float:
    assert response.verdict in VERDICTS, response.verdict
    if origin == "expert" and options.expert_reward == "one":
        return 1.0
    return float(response.verdict == "correct")


def _rows(group: _Group, options: GroupOptions) -> list[Row]:
    turns = row_prompt(options.prompt)[1].messages(group.problem.problem)
    rewards = group.rewards or [None]
    members = [(origin, one.load()) for origin, one in group.members]
    return [
        Row(
            [*turns, {"role": "assistant", "content": one.text}],
            group.problem.id,
            origin,
            response_ids=one.response_ids,
            group_id=group.problem.id,
            reward=reward,
            advantage=advantage,
            behavior_logp=one.behavior_logp,
            finish_reason=one.finish_reason,
        )
        for (origin, one), reward, advantage in zip(members, rewards, group.advantages, strict=True)
    ]


# ---- counts ----


def _statistics(
    num_problems: int,
    groups: Sequence[_Group],
    kept: Sequence[_Group],
    plan: Plan,
    composition: Composition,
    options: GroupOptions,
) -> dict[str, Any]:
    graded = [group for group in groups if group.rewards]
    equal = [group for group in graded if group.all_equal]
    by_kind: dict[str, list[_Group]] = {}
    for group in kept:
        by_kind.setdefault(str(group.composition), []).append(group)
    return {
        "composition": str(composition),
        "group_size": composition.size,
        "std": options.std,
        "epsilon": options.epsilon,
        "problems": num_problems,
        "problems_left_out": {reason: len(ids) for reason, ids in plan.left_out.items()},
        "groups_filled_with_self": sum(group.composition != composition for group in groups),
        "groups_all_correct": sum(group.rewards[0] == 1 for group in equal),
        "groups_none_correct": sum(group.rewards[0] == 0 for group in equal),
        "groups_dropped_equal": len(groups) - len(kept),
        "groups": len(kept),
        "rows": sum(len(group.members) for group in kept),
        "rows_with_gradient": sum(_num_gradient(group) for group in kept),
        "by_composition": {kind: _composition_counts(ones) for kind, ones in by_kind.items()},
        "by_origin": {name: _origin_counts(name, kept) for name in MEMBERS},
    }


def _num_gradient(group: _Group) -> int:
    return sum(value != 0 for value in group.advantages)


def _composition_counts(groups: Sequence[_Group]) -> dict[str, int]:
    return {
        "groups": len(groups),
        "groups_all_equal": sum(bool(group.rewards) and group.all_equal for group in groups),
        "rows": sum(len(group.members) for group in groups),
        "rows_with_gradient": sum(_num_gradient(group) for group in groups),
    }


def _origin_counts(origin: str, groups: Sequence[_Group]) -> dict[str, Any]:
    members = [
        (one, advantage)
        for group in groups
        for (name, one), advantage in zip(group.members, group.advantages, strict=True)
        if name == origin
    ]
    verdicts = Counter(one.verdict for one, _ in members)
    values = [advantage for _, advantage in members]
    return {
        "rows": len(members),
        "verdicts": {verdict: verdicts[verdict] for verdict in VERDICTS if verdicts[verdict]},
        "truncated": sum(one.finish_reason not in (None, "stop") for one, _ in members),
        "rows_with_gradient": sum(value != 0 for value in values),
        "mean_advantage": float(np.mean(values)) if values else 0.0,
    }
