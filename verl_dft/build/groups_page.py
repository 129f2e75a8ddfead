"""The statistics of groups as a Markdown page, and the plan of a dry run as lines."""

from collections.abc import Mapping
from typing import Any

from verl_dft.build.page import names, share, table


def markdown(found: Mapping[str, Any]) -> str:
    """What was built: groups by composition, rows by origin, and what carries gradient."""
    parts = [
        "# Groups",
        f"Composition {found['composition']} (expert:teacher:self), K = {found['group_size']}. Advantages: rewards "
        f"less their mean over their {found['std']} deviation + {found['epsilon']:g}.",
        *[
            f"{member.capitalize()} responses: {', '.join(one['models']) or 'an unnamed model'}, asked with "
            f"{names(one['prompts'])}."
            for member, one in found["writers"].items()
        ],
        _groups(found),
        "A row carries gradient if its advantage is not 0, by composition:",
        _by_composition(found["by_composition"]),
        _by_origin(found["by_origin"]),
    ]
    return "\n\n".join(parts)


def _groups(found: Mapping[str, Any]) -> str:
    total = found["problems"]
    rows = [["problems", f"{total:,}", ""]]
    rows += [[f"left out: {reason}", f"{n:,}", share(n, total)] for reason, n in found["problems_left_out"].items()]
    for key, text in (
        ("groups_filled_with_self", "own responses in a teacher's place"),
        ("groups_all_correct", "all responses correct: no advantage"),
        ("groups_none_correct", "no response correct: no advantage"),
        ("groups_dropped_equal", "dropped with equal rewards"),
        ("groups", "groups written"),
    ):
        rows.append([text, f"{found[key]:,}", share(found[key], total)])
    rows.append(["rows written", f"{found['rows']:,}", ""])
    return table(["groups", "number", "of the problems"], rows)


def _by_composition(found: Mapping[str, Any]) -> str:
    rows = [
        [
            kind,
            f"{one['groups']:,}",
            f"{one['groups_all_equal']:,}",
            f"{one['rows']:,}",
            f"{one['rows_with_gradient']:,}",
            share(one["rows_with_gradient"], one["rows"]),
        ]
        for kind, one in found.items()
    ]
    return table(["expert:teacher:self", "groups", "all rewards equal", "rows", "with gradient", "share"], rows)


def _by_origin(found: Mapping[str, Any]) -> str:
    rows = [
        [
            origin,
            f"{one['rows']:,}",
            share(one["verdicts"].get("correct", 0), one["rows"]),
            share(one["verdicts"].get("no_answer", 0), one["rows"]),
            f"{one['verdicts'].get('timeout', 0) + one['verdicts'].get('error', 0):,}",
            f"{one['truncated']:,}",
            f"{one['rows_with_gradient']:,}",
            f"{one['mean_advantage']:+.3f}",
        ]
        for origin, one in found.items()
        if one["rows"]
    ]
    header = ["origin", "rows", "correct", "no answer", "not graded", "cut off", "with gradient", "mean advantage"]
    return table(header, rows)


def format_plan(found: Mapping[str, Any]) -> str:
    """A plan as lines."""
    lines = [f"dry run: {found['groups']:,} groups of {found['composition']} from {found['problems']:,} problems"]
    for member in ("teacher", "self"):
        if member in found:
            one = found[member]
            lines.append(
                f"{member}: {one['samples']:,} samples ({one['stored']:,} stored already), "
                f"{one['prompt_tokens']:,} prompt tokens, at most {one['max_response_tokens']:,} response tokens"
            )
    return "\n".join(lines if len(lines) > 1 else [*lines, "nothing to sample"])
