"""Time and memory per row of sampling, grading, building, evaluation and loading, at growing numbers of rows.

Each stage runs in a process of its own at each size, on what the stage before it wrote: problems, graded samples (four
for each problem, of a scripted source in the model's place: what is measured is everything but the model), training
rows, groups, an evaluation's result, a data set ready to train on. Seconds are of the stage without imports; memory is
what its peak is above that before it, of the command's process; the grader's workers are bounded apart.

    python scripts/bench_growth.py --rows 1000 10000 100000
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "recipes" / "tiny" / "base"
PER_PROBLEM = 4
TEXTS = [
    "First we add the apples of the morning to those of the evening. " * words
    + f"So the answer is \\boxed{{{number}}}."
    for number, words in enumerate([1, 2, 3, 4, 2, 3, 1, 5, 3, 2])
]
"""65 to 350 characters, each a token; a tenth of the samples is right."""
_RESULT = "RESULT "


def source() -> Any:
    """Scripted texts with ids that are objects of their own to Python, as a model's are, and log-probs."""
    from verl_dft.sampling.engine import GeneratedText
    from verl_dft.sampling.source import ScriptedSource

    class Source(ScriptedSource):
        def generate(self, requests: Any) -> list[GeneratedText]:
            found = super().generate(requests)
            return [
                replace(one, token_ids=[256 + i for i in one.token_ids], logp=_logp(one) if request.want_logp else None)
                for one, request in zip(found, requests, strict=True)
            ]

    return Source(TEXTS)


def _logp(text: Any) -> list[float]:
    return [-0.01 * i for i in text.token_ids]


def problems(folder: Path, rows: int) -> None:
    """Problems with one-digit answers as ``problems.jsonl``."""
    with open(folder / "problems.jsonl", "w", encoding="utf-8") as file:
        for i in range(rows // PER_PROBLEM):
            answer = i % 10
            text = f"In field {i} there are {answer} apples in the morning and none in the evening. How many are there?"
            row = {"id": f"p{i}", "problem": text, "answer": str(answer), "solution": TEXTS[answer]}
            file.write(json.dumps(row) + "\n")


def sample(folder: Path) -> None:
    """``verl-dft sample`` with a scripted source: prompts, seeds, store, grading, samples.parquet."""
    from verl_dft.sampling.command import run
    from verl_dft.sampling.configure import compose_sampling, plain

    given = [
        f"model={BASE}",
        f"data={folder / 'problems.jsonl'}",
        f"n={PER_PROBLEM}",
        "max_tokens=380",
        "want_logp=true",
    ]
    run(plain(compose_sampling("sample", [*given, f"output_dir={folder / 'sample'}"])), source())


def grade(folder: Path) -> None:
    """The grader alone, on the samples' texts as they come."""
    import pyarrow.parquet as pq

    from verl_dft.grading import GradeItem, grade_batch

    table = pq.read_table(folder / "sample" / "samples.parquet", columns=["response", "gold"]).to_pylist()
    grade_batch([GradeItem(response=row["response"], gold=row["gold"]) for row in table])


def reject(folder: Path) -> None:
    """``verl-dft reject``."""
    from verl_dft.build.reject_command import main

    main([f"samples={folder / 'sample'}", f"output_dir={folder / 'reject'}", "dedup=false"])


def groups(folder: Path) -> None:
    """``verl-dft groups`` of the samples."""
    from verl_dft.build.groups_command import main

    given = [f"samples={folder / 'sample'}", f"data={folder / 'problems.jsonl'}", f"composition=1:0:{PER_PROBLEM - 1}"]
    main([*given, f"output_dir={folder / 'groups'}"])


def evaluate(folder: Path) -> None:
    """``verl-dft evaluate`` with a scripted source: sampling, grading, metrics and the page of samples."""
    from verl_dft.evaluation.command import compose_evaluate
    from verl_dft.evaluation.run import evaluate

    given = [f"model={BASE}", "benchmark=file", f"benchmark.path={folder / 'problems.jsonl'}", f"n={PER_PROBLEM}"]
    given += ["prompt=raw", "max_tokens=380", f"output_dir={folder / 'evaluate'}"]
    evaluate(compose_evaluate(given), source())


def load(folder: Path) -> None:
    """Rows of ``groups`` read, checked and tokenised into memory-mapped arrays, as before training's first step."""
    from verl_dft.data.dataset import load_dataset
    from verl_dft.data.sources import load_tokenizer

    rows, tokenizer = folder / "groups" / "rows.parquet", load_tokenizer(str(BASE))
    load_dataset(rows, tokenizer, max_length=512, columns=["advantage"], cache_dir=folder / "cache", num_proc=1)


STAGES: Mapping[str, Callable[[Path], None]] = {
    stage.__name__: stage for stage in (sample, grade, reject, groups, evaluate, load)
}


def measure(stage: str, folder: Path) -> dict[str, float]:
    """Run a stage here. Returns seconds, CPU seconds and MB above what the process had before."""
    import torch  # noqa: F401  the larger imports are no part of it
    import transformers  # noqa: F401

    import verl_dft.sampling.sampler  # noqa: F401

    before, begun, cpu = _peak_mb(), time.monotonic(), time.process_time()
    STAGES[stage](folder)
    return {"seconds": time.monotonic() - begun, "cpu": time.process_time() - cpu, "mb": _peak_mb() - before}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(stage: str, folder: Path) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=7200)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode or not lines:
        sys.exit(f"{stage} failed: {done.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix(_RESULT))


def main() -> None:
    """Run every stage at every size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        print(_RESULT + json.dumps(measure(options.stage, options.folder)), flush=True)
        return
    found: dict[str, dict[int, dict[str, Any]]] = {stage: {} for stage in STAGES}
    for rows in options.rows:
        with tempfile.TemporaryDirectory(prefix="bench_growth.") as name:
            problems(Path(name), rows)
            for stage in STAGES:
                found[stage][rows] = child(stage, Path(name))
                print(f"{rows:,} {stage}: {found[stage][rows]}", file=sys.stderr, flush=True)
    print(table(found, options.rows))


def table(found: Mapping[str, Mapping[int, Mapping[str, float]]], sizes: list[int]) -> str:
    """Milliseconds a row and MB at each size; the last column is what a further row costs between the last two."""
    head = [f"{rows:,}: ms a row, MB" for rows in sizes]
    lines = [["stage", *head, "KB a further row"], ["---", *["---:"] * (len(sizes) + 1)]]
    for stage, by_size in found.items():
        cells = [f"{1000 * by_size[rows]['seconds'] / rows:.2f}, {by_size[rows]['mb']:.0f}" for rows in sizes]
        more = [(by_size[b]["mb"] - by_size[a]["mb"]) * 1024 / (b - a) for a, b in pairwise(sizes)]
        lines.append([stage, *cells, f"{more[-1]:.1f}" if more else ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
