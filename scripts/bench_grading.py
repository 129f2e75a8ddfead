"""How many answers a second the grader decides, beside verl's reward function and math-verify in one process.

The pairs are real: worked solutions of MATH (train and test) and GSM8K, each with its own gold (right) or with that of
another problem of the same set (wrong). Every (response, gold) pair is unique and the grader's deduplication is off.
The three graders alternate, block by block, so that a change in the machine's load hits them alike.

    python scripts/bench_grading.py FOLDER_WITH_BENCHMARKS --pairs 10000 --workers 2
"""

import argparse
import gzip
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

_NUMBER = re.compile(r"-?\$?[\d,]*\.?\d+")
_WRONG_SHARE = 0.3


class Pair(NamedTuple):
    """A response with a gold, whether the gold is its own, and what kind of answer the gold is."""

    response: str
    gold: str
    right: bool
    kind: str


def read_solutions(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """(solution ending in its answer, gold) per set, from the files that have worked solutions."""
    sets: dict[str, list[tuple[str, str]]] = {}
    for name in ("math_train", "math", "gsm8k_train", "gsm8k_test"):
        path = next(path for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz") if path.exists())
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            rows = [json.loads(line) for line in file]
        # GSM8K's own files end each solution with this line.
        ending = "\n#### {}" if name.startswith("gsm8k") else ""
        sets[name] = [(r["solution"] + ending.format(r["answer"]), r["answer"]) for r in rows if r["answer"].strip()]
    return sets


def make_pairs(sets: dict[str, list[tuple[str, str]]], count: int, seed: int = 0) -> list[Pair]:
    """``count`` unique pairs, three in four from MATH."""
    chance = random.Random(seed)
    pairs: dict[tuple[str, str], Pair] = {}
    names = {"math_train": 0.4, "math": 0.35, "gsm8k_train": 0.15, "gsm8k_test": 0.1}
    for name, share in names.items():
        rows, wanted = chance.sample(sets[name], len(sets[name])), len(pairs) + round(share * count)
        for response, gold in rows:
            right = chance.random() >= _WRONG_SHARE
            other = gold if right else chance.choice(rows)[1]
            if len(pairs) < wanted and (right or other.strip() != gold.strip()):
                kind = "number" if _NUMBER.fullmatch(other.strip()) else "latex"
                pairs.setdefault((response, other), Pair(response, other, right, kind))
    out = list(pairs.values())
    chance.shuffle(out)
    return out


def graders(workers: int) -> dict[str, Callable[[list[Pair]], list[bool]]]:
    """The three, by name, each a function from pairs to verdicts; warm after the first call."""
    from math_verify import parse, verify
    from verl.utils.reward_score.math_verify import compute_score

    from verl_dft.grading import GradeItem, GraderPool

    pool = GraderPool(workers, deduplicate=False)

    def ours(pairs: list[Pair]) -> list[bool]:
        return [grade.verdict == "correct" for grade in pool.grade([GradeItem(p.response, p.gold) for p in pairs])]

    def verls(pairs: list[Pair]) -> list[bool]:
        return [compute_score(p.response, p.gold) == 1.0 for p in pairs]

    def plain(pairs: list[Pair]) -> list[bool]:
        return [bool(verify(parse(rf"\boxed{{{p.gold}}}"), parse(p.response))) for p in pairs]

    return {"verl_dft": ours, "verl compute_score": verls, "math-verify, one process": plain}


def blocks(pairs: list[Pair], size: int) -> Iterator[list[Pair]]:
    """``pairs`` in pieces of ``size``."""
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


def main() -> None:
    """Measure and print; ``--json`` writes the numbers as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", type=Path)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--block", type=int, default=500)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    pairs = make_pairs(read_solutions(options.benchmarks), options.pairs)
    assert len({pair[:2] for pair in pairs}) == len(pairs)
    composition = Counter((pair.kind, "right" if pair.right else "wrong") for pair in pairs)
    print(f"{len(pairs)} unique pairs: " + ", ".join(f"{n} {kind} {side}" for (kind, side), n in composition.items()))

    functions = graders(options.workers)
    letters = [Pair(rf"\boxed{{x+{i}}}", f"{i}+x", True, "latex") for i in range(4 * options.workers)]
    for grade in functions.values():
        grade(letters)
    seconds, verdicts = Counter(), {name: [] for name in functions}
    for number, block in enumerate(blocks(pairs, options.block)):
        order = list(functions)
        for name in order[number % 3 :] + order[: number % 3]:
            start = time.perf_counter()
            verdicts[name] += functions[name](block)
            seconds[name] += time.perf_counter() - start
        print(f"block {number + 1}: " + ", ".join(f"{n} {seconds[n]:.1f} s" for n in functions), flush=True)
    report(pairs, seconds, verdicts, options.json)


def report(pairs: list[Pair], seconds: Counter, verdicts: dict[str, list[bool]], path: Path | None) -> None:
    """Speed, accuracy against which gold was used, and agreement with ours."""
    ours, rows = verdicts["verl_dft"], {}
    for name, given in verdicts.items():
        rows[name] = {
            "answers_per_s": len(pairs) / seconds[name],
            "ours_is_faster_by": seconds[name] / seconds["verl_dft"],
            "agrees_with_ours": sum(a == b for a, b in zip(given, ours, strict=True)) / len(pairs),
            "right_accepted": _share(v for v, pair in zip(given, pairs, strict=True) if pair.right),
            "wrong_accepted": _share(v for v, pair in zip(given, pairs, strict=True) if not pair.right),
        }
    print(f"\n{'grader':26}{'answers/s':>10}{'ours x':>8}{'agrees':>9}{'own gold ok':>13}{'other gold ok':>15}")
    for name, row in rows.items():
        speed, ratio, agrees, right, wrong = row.values()
        print(f"{name:26}{speed:>10.0f}{ratio:>8.1f}{agrees:>9.2%}{right:>13.2%}{wrong:>15.2%}")
    print("An accepted other gold is mostly a problem with the same answer, written differently.")
    if path:
        path.write_text(json.dumps({"pairs": len(pairs), "cpus": os.cpu_count(), "graders": rows}, indent=2) + "\n")


def _share(values: Iterator[bool]) -> float:
    kept = list(values)
    return sum(kept) / len(kept)


if __name__ == "__main__":
    main()
