"""Accuracy on labelled cases: this grader, and beside it math-verify as verl configures it.

    python scripts/grade_cases.py CASES.jsonl [--golds FOLDER_WITH_BENCHMARKS]

Each line of the cases has ``response``, ``gold``, ``expected`` (whether it is right) and, optionally, ``kind``. Prints
wrong verdicts of both per kind, for each half of the cases (split by a hash of the gold), and lists ours. With
``--golds``, grades every gold of every set against itself in a box as well, and lists those that are not correct.
"""

import argparse
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from verl_dft.grading import Grade, GradeItem, grade_batch


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, gzipped or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return [json.loads(line) for line in file if line.strip()]


def verls_verdict(case: dict[str, Any]) -> bool:
    """What verl's own reward function says. Runs in a main thread, where math-verify's time-outs work."""
    from verl.utils.reward_score.math_verify import _verify_in_subprocess

    try:
        return _verify_in_subprocess(f"\\boxed{{{case['gold']}}}", case["response"]) == 1.0
    except BaseException:  # verl scores every failure 0; math-verify's time-out is a BaseException
        return False


def half(case: dict[str, Any]) -> str:
    """Which half of the cases this one is in, by its gold, so that cases of one gold stay together."""
    return "AB"[zlib.crc32(case["gold"].encode()) % 2]


def report(cases: Sequence[dict[str, Any]], grades: Sequence[Grade], theirs: Sequence[bool]) -> None:
    """Print the counts and list our wrong verdicts."""
    expected = [bool(case["expected"]) for case in cases]
    ours = [grade.verdict == "correct" for grade in grades]
    for name, given in (("verl_dft", ours), ("math-verify, verl's configuration", theirs)):
        wrong = [case for case, value, right in zip(cases, given, expected, strict=True) if value != right]
        accepted = sum(not case["expected"] for case in wrong)
        halves = Counter(half(case) for case in wrong)
        print(
            f"{name}: {len(wrong)} of {len(cases)} wrong ({len(wrong) / len(cases):.2%}): {accepted} wrong accepted, "
            f"{len(wrong) - accepted} right rejected; half A {halves['A']}, half B {halves['B']}"
        )
        print("  by kind:", dict(Counter(case.get("kind", "") for case in wrong).most_common()) or "none")
    print("Verdicts:", dict(Counter(grade.verdict for grade in grades)))
    print("Rules:", dict(Counter(grade.rule for grade in grades).most_common()))
    lenient = sum(grade.qwen == "correct" and grade.verdict != "correct" for grade in grades)
    print(f"Accepted only under the Qwen harness's leniencies: {lenient}")
    for case, grade, value in zip(cases, grades, ours, strict=True):
        if value != case["expected"]:
            print(f"  {case.get('kind', '')}: {grade.answer!r:.100} for {case['gold']!r:.80}: {grade}")


def check_golds(folder: Path) -> None:
    """Grade each gold in a box against itself."""
    total = 0
    for path in sorted(folder.glob("*.jsonl*")):
        rows = read_lines(path)
        items = [
            GradeItem(rf"\boxed{{{row['answer']}}}", row["answer"], row.get("answer_type", "auto")) for row in rows
        ]
        grades = grade_batch(items)
        total += len(rows)
        for number, (row, grade) in enumerate(zip(rows, grades, strict=True)):
            if grade.verdict != "correct":
                print(f"  {path.name} row {number}: gold {row['answer']!r:.60}: {grade.verdict}, {grade.rule}")
    print(f"{total} golds graded against themselves; the ones that are not correct are listed above")


def main() -> None:
    """Read the arguments, grade, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--golds", type=Path)
    options = parser.parse_args()
    cases = read_lines(options.cases)
    grades = grade_batch([GradeItem(case["response"], case["gold"]) for case in cases])
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        theirs = list(pool.map(verls_verdict, cases, chunksize=50))
    report(cases, grades, theirs)
    if options.golds:
        check_golds(options.golds)


if __name__ == "__main__":
    main()
