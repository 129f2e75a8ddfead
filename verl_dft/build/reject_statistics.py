"""What rejection sampling read, kept and left out, counted problem by problem."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl_dft.build.reject import SAMPLED, Pair, RejectOptions, Sorted, is_truncated, row_prompt, verdict_of
from verl_dft.data.records import Row
from verl_dft.grading.pool import VERDICTS
from verl_dft.sampling.record import Sample


@dataclass
class Tally:
    """Sums over the problems counted so far; none of their samples is kept."""

    options: RejectOptions
    models: set[str] = field(default_factory=set)
    prompts: set[str] = field(default_factory=set)
    verdicts: Counter[str] = field(default_factory=Counter)
    right: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Problems by (correct samples, samples)."""
    sums: Counter[str] = field(default_factory=Counter)

    def add(self, samples: Sequence[Sample], found: Sorted, rows: Sequence[Row], pairs: Sequence[Pair]) -> None:
        """Count a problem's samples, what :func:`~verl_dft.build.reject.sort_out` found of them, its rows and pairs."""
        verdicts = Counter(verdict_of(sample, self.options.verifier) for sample in samples)
        self.models |= {sample.model for sample in samples}
        self.prompts |= {sample.prompt_name for sample in samples}
        self.verdicts += verdicts
        self.right[verdicts["correct"], len(samples)] += 1
        self.sums.update(
            truncated=sum(map(is_truncated, samples)),
            correct_truncated=found.num_truncated,
            correct_duplicates=found.num_duplicates,
            correct_over_max=len(found.correct) - len(rows),
            rows=len(rows),
            rows_problems=int(bool(rows)),
            rows_with_behavior_logp=sum(row.behavior_logp is not None for row in rows),
            pairs=len(pairs),
            pairs_problems=int(bool(pairs)),
            pairs_possible=len(found.correct) * len(found.rejected),
            rejected_duplicates=found.num_rejected_duplicates,
            rejected_truncated=sum(is_truncated(pair.rejected) for pair in pairs),
        )


def statistics(tally: Tally) -> dict[str, Any]:
    """The counts. ``correct`` = rows + the three ``correct_*`` counts."""
    options, sums, right = tally.options, tally.sums, tally.right
    return {
        "problems": right.total(),
        "samples": tally.verdicts.total(),
        "models": sorted(tally.models),
        "prompts": sorted(tally.prompts),
        "prompt_of_rows": options.prompt if options.prompt == SAMPLED else row_prompt(options.prompt)[0],
        "verifier": options.verifier,
        "verdicts": {verdict: tally.verdicts[verdict] for verdict in VERDICTS},
        "truncated": sums["truncated"],
        "problems_none_correct": sum(count for (correct, _), count in right.items() if correct == 0),
        "problems_all_correct": sum(count for (correct, n), count in right.items() if correct == n),
        "solve_rates": solve_rates(right),
        "correct": tally.verdicts["correct"],
        "correct_truncated": sums["correct_truncated"],
        "correct_duplicates": sums["correct_duplicates"],
        "correct_over_max": sums["correct_over_max"],
        "rows": sums["rows"],
        "rows_problems": sums["rows_problems"],
        "rows_with_behavior_logp": sums["rows_with_behavior_logp"],
        "pairs": sums["pairs"],
        "pairs_problems": sums["pairs_problems"],
        "pairs_possible": sums["pairs_possible"],
        "rejected_duplicates": sums["rejected_duplicates"],
        "rejected_truncated": sums["rejected_truncated"],
    }


def solve_rates(right: Mapping[tuple[int, int], int]) -> dict[str, int]:
    """Problems by how many of their samples are correct (``2/4``); by tenths where problems differ in samples.

    Args:
        right: problems by (correct samples, samples).
    """
    sizes = {n for _, n in right}
    if len(sizes) == 1:
        (n,) = sizes
        return {f"{k}/{n}": right.get((k, n), 0) for k in range(n + 1)}
    labels = ["0%", *(f"{10 * k}-{10 * (k + 1)}%" for k in range(10)), "100%"]
    bins = dict.fromkeys(labels, 0)
    for (correct, n), count in right.items():
        bins["0%" if not correct else "100%" if correct == n else labels[1 + 10 * correct // n]] += count
    return bins
