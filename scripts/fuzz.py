"""Made-up input for the loader of rows, problems and pairs, and for the grader: each is read, graded or refused.

Case number N of a seed is always the same, so a finding is repeated with ``--first N --cases 1``. With
``--report FILE`` a line of JSON is added after every batch, and the same command goes on where the last one ended.
Exit code 1 where anything was found; what must hold is told in ``fuzz_loader.py`` and ``fuzz_grader.py``.

    python scripts/fuzz.py loader --cases 100000 --report runs/fuzz.jsonl
    python scripts/fuzz.py grader --cases 100000 --report runs/fuzz.jsonl
"""

import argparse
import json
import logging
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fuzz_grader  # noqa: E402
import fuzz_loader  # noqa: E402

BATCH = 500
LONGEST_S = 60
"""No case may take longer, on however busy a machine."""


class Target(Protocol):
    """What is fuzzed."""

    def run(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        """For each case, by the name of its seed: its outcome (a word) and what was found (nothing, mostly)."""
        ...


class Loader:
    """Files of rows, problems and pairs, with the tiny world's tokenizer."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        from verl_dft.data.template import ConversationEncoder
        from verl_dft.paths import recipes_dir

        self.folder = folder
        self.encoder = ConversationEncoder(AutoTokenizer.from_pretrained(recipes_dir() / "tiny" / "base"))

    def run(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        for name in names:
            file = fuzz_loader.make(random.Random(name))
            try:
                with at_most(LONGEST_S):
                    yield fuzz_loader.check(file, self.folder, self.encoder), ""
            except Exception as error:  # whatever the loader raises is a finding
                yield "found", f"{file.kind}{file.suffix}: {type(error).__name__}: {error}"[:600]


class Grader:
    """Responses and golds, two workers, five seconds of CPU time for a pair: on a busy machine 16 s of waiting."""

    def __init__(self, folder: Path) -> None:
        from verl_dft.grading import GraderPool

        self.pool = GraderPool(2, timeout_s=5.0, memory_mb=1024)

    def run(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        cases = [fuzz_grader.make(random.Random(name)) for name in names]
        for case, grade, found in fuzz_grader.graded(cases, self.pool):
            yield f"{case.kind}: {'empty gold' if grade.rule == 'empty_gold' else grade.verdict}", found[:600]


TARGETS = {"loader": Loader, "grader": Grader}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise ``TimeoutError`` in the block after so many seconds."""

    def over(*_: object) -> None:
        raise TimeoutError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def batch(target: Target, what: str, seed: int, first: int, cases: int) -> dict[str, Any]:
    """Run cases ``first`` and so on; the line of the report."""
    outcomes: Counter[str] = Counter()
    findings = []
    wall, cpu = time.monotonic(), time.process_time()
    names = [f"{what} {seed} {number}" for number in range(first, first + cases)]
    for number, (outcome, found) in enumerate(target.run(names), first):
        outcomes[outcome] += 1
        if found:
            findings.append({"case": number, "found": found})
    assert sum(outcomes.values()) == cases, "cases were lost"
    return {
        "what": what,
        "seed": seed,
        "first": first,
        "cases": cases,
        "seconds": round(time.monotonic() - wall, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "outcomes": dict(sorted(outcomes.items())),
        "findings": findings,
    }


def reported(report: Path | None, what: str, seed: int) -> list[dict[str, Any]]:
    """The lines of this target and seed that are in the report, whole ones only."""
    lines = []
    for line in report.read_text(encoding="utf-8").splitlines() if report and report.is_file() else ():
        try:
            found = json.loads(line)
        except ValueError:  # killed while writing
            continue
        if (found["what"], found["seed"]) == (what, seed):
            lines.append(found)
    return lines


def summary(lines: Sequence[dict[str, Any]]) -> str:
    """Totals of the lines."""
    outcomes: Counter[str] = Counter()
    for line in lines:
        outcomes.update(line["outcomes"])
    cases, seconds = sum(line["cases"] for line in lines), sum(line["seconds"] for line in lines)
    findings = sum(len(line["findings"]) for line in lines)
    told = ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items()))
    rate = cases / max(seconds, 1e-9)
    return f"{cases} cases, {findings} findings, {seconds:.0f} s ({rate:.0f} cases/s): {told}"


def main() -> int:
    """Run the cases; 0 where nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=TARGETS)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="a JSON-lines file to add to, and to go on from")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    lines = reported(options.report, options.what, options.seed)
    first = max([options.first, *(line["first"] + line["cases"] for line in lines)])
    end = options.first + options.cases
    with tempfile.TemporaryDirectory(prefix="verl_dft_fuzz_") as folder:
        target = TARGETS[options.what](Path(folder))
        while first < end:
            line = batch(target, options.what, options.seed, first, min(BATCH, end - first))
            if options.report:
                options.report.parent.mkdir(parents=True, exist_ok=True)
                with options.report.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=True) + "\n")
            for finding in line["findings"]:
                print(f"case {finding['case']}: {finding['found']!a}", flush=True)
            lines.append(line)
            first += line["cases"]
    print(f"{options.what}, seed {options.seed}: {summary(lines)}")
    return 1 if any(line["findings"] for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
