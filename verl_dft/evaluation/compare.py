"""``verl-dft compare A B``: is B better than A on the same problems, and could it be chance?

Both answers come from one difference per problem (B's average of n samples minus A's), so samples of one problem
count as one observation and the spread of difficulty between problems cancels.

- The 95% interval is mean +- t * s / sqrt(P).
- ``p_value`` is of the sign-flip permutation test (Fisher 1935): had the two names been exchanged at random within each
  problem, how often would the mean be at least as far from 0? It assumes no distribution, so it holds for 30 problems
  of which three differ. All 2^m assignments are counted for up to 16 problems that differ, else 10,000 are drawn
  with a fixed seed.
- ``p_value_t`` is of the paired t-test, which goes with the interval: below 0.05 exactly where that leaves out 0.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import numpy as np

from verl_dft.errors import InputError
from verl_dft.evaluation.metrics import difference_ci95, macro_average
from verl_dft.evaluation.student import two_sided_p
from verl_dft.report.tables import Table

_EXACT_UP_TO = 16
_NUM_DRAWS = 10_000
_SETTINGS = ("temperature", "top_p", "top_k", "max_tokens", "prompt", "template", "preset", "seed", "limit")
_USAGE = "verl-dft compare FOLDER_A FOLDER_B [benchmark=NAME,NAME] [output_dir=FOLDER] [seed=0] [--json]"
_NOTE = (
    "Differences are B - A in percentage points, problem by problem. Intervals are paired and clustered by problem; "
    "p is of the sign-flip permutation test, p (t) of the paired t-test. Neither covers the spread between trainings."
)


def main(argv: Sequence[str]) -> int:
    """Print the comparison as Markdown (or JSON), and write both where ``output_dir`` is given. Returns the code."""
    folders, options = parse_arguments(argv)
    names = [name.strip() for name in options["benchmark"].split(",")] if options.get("benchmark") else None
    seed = options.get("seed", "0")
    if not seed.isdigit():
        raise InputError(f"seed={seed}; it must be a whole number of at least 0")
    found = compare(folders[0], folders[1], names, int(seed))
    if folder := options.get("output_dir"):
        from verl_dft.files import atomic_write, write_json

        write_json(Path(folder, "compare.json"), found)
        with atomic_write(Path(folder, "compare.md")) as file:
            file.write(markdown(found))
    print(json.dumps(found, indent=2, ensure_ascii=False) if options.get("json") else markdown(found))
    return 0


def compare(
    a: str | Path, b: str | Path, benchmarks: Sequence[str] | None = None, seed: int = 0, num_draws: int = _NUM_DRAWS
) -> dict[str, Any]:
    """Compare two evaluations, benchmark by benchmark, and on average where there are several.

    Args:
        a, b: a result's folder (with ``result.json``), or one with a folder for each benchmark.
        benchmarks: the ones to compare (default: all, which must then be the same in both).
        seed: of the permutations, where they are drawn.

    Returns:
        ``rows``: a mapping for each benchmark with ``a, b, difference, ci95, p_value, p_value_t`` (fractions);
        ``average``: the same for the mean over benchmarks, or None; ``notes``: settings that differ.

    Raises:
        InputError: no or unfinished results, or different benchmarks, problems or n.
    """
    results = [load_results(path) for path in (a, b)]
    if benchmarks:
        for path, found in zip((a, b), results, strict=True):
            if missing := [name for name in benchmarks if name not in found]:
                raise InputError(f"{path} has no result for {', '.join(missing)}; it has {', '.join(found)}")
    elif only := sorted(results[0].keys() ^ results[1].keys()):
        raise InputError(
            f"only one of {a} and {b} has a result for {', '.join(only)}; evaluate the other too, or name what to "
            "compare with benchmark=NAME,NAME"
        )
    names = list(benchmarks or results[0])
    pairs = {name: (results[0][name], results[1][name]) for name in names}
    differences = {name: paired(name, *pair) for name, pair in pairs.items()}
    rows = [_row(name, *pairs[name], differences[name], seed, num_draws) for name in names]
    return {
        "a": {"path": str(a), "models": sorted({pair[0]["model"] for pair in pairs.values()})},
        "b": {"path": str(b), "models": sorted({pair[1]["model"] for pair in pairs.values()})},
        "rows": rows,
        "average": _average(rows, list(differences.values()), seed, num_draws) if len(rows) > 1 else None,
        "tests": {"p_value": "sign-flip permutation", "p_value_t": "paired t", "num_draws": num_draws, "seed": seed},
        "notes": [note for name in names for note in _notes(name, *pairs[name])],
    }


def load_results(path: str | Path) -> dict[str, dict[str, Any]]:
    """Benchmark name -> result of a folder that holds one, or of the folders right below it.

    Raises:
        InputError: no result there, two of one benchmark, or one that is damaged or lacks samples.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give the output folder of verl-dft evaluate")
    files = [path / "result.json"] if (path / "result.json").is_file() else sorted(path.glob("*/result.json"))
    if not files:
        raise InputError(
            f"{path} holds no result.json, nor does a folder below it; give a finished evaluation's folder"
        )
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        result = _load(file)
        if result["benchmark"] in found:
            raise InputError(f"{path} holds two results for {result['benchmark']}; give the folder of one of them")
        found[result["benchmark"]] = result
    return found


def _load(file: Path) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        problems, n = result["per_problem"], result["n"]
        ids = {problem["id"] for problem in problems}
        name, count, samples = result["benchmark"], result["num_problems"], result["num_samples"]
        averages = [float(problem["avg"]) for problem in problems]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not a result of verl-dft evaluate ({error}); evaluate again") from None
    if not problems or len(ids) != len(problems) or len(problems) != count or samples != count * n:
        raise InputError(
            f"{file}: {len(ids)} problems and {samples} samples of {name} where {count} problems and {count * n} "
            "samples belong; samples are missing, so evaluate again"
        )
    if not all(0 <= average <= 1 for average in averages):
        raise InputError(f"{file}: a problem's average is outside 0 to 1; evaluate again")
    return result


def paired(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[float]:
    """``b``'s average minus ``a``'s, problem by problem. Raises InputError for different n or problems."""
    if a["n"] != b["n"]:
        raise InputError(
            f"{name}: A has n={a['n']} samples per problem, B n={b['n']}; evaluate one of them again with the other's n"
        )
    first, second = ({problem["id"]: problem["avg"] for problem in result["per_problem"]} for result in (a, b))
    if only := sorted(first.keys() ^ second.keys()):
        raise InputError(
            f"{name}: {len(only)} problems are in one result alone ({', '.join(map(repr, only[:3]))}"
            f"{', …' if len(only) > 3 else ''}); only results of the same problems can be compared"
        )
    return [second[problem] - first[problem] for problem in first]


def sign_flip_p(differences: Sequence[float], seed: int = 0, num_draws: int = _NUM_DRAWS) -> float:
    """Two-sided p-value of the sign-flip test that the differences are symmetric about 0.

    Exact for up to 16 differences other than 0; else (1 + hits) / (1 + draws), which is never 0.
    """
    values = np.array([d for d in differences if abs(d) > 1e-12])
    if not len(values):
        return 1.0
    least = abs(values.sum()) - 1e-9
    if len(values) <= _EXACT_UP_TO:
        signs = 1 - 2 * ((np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1)
        return float(np.mean(np.abs(signs @ values) >= least))
    generator, hits = np.random.default_rng(seed), 0
    for start in range(0, num_draws, 1000):
        signs = generator.integers(0, 2, (min(1000, num_draws - start), len(values)), dtype=np.int8) * 2 - 1
        hits += int(np.sum(np.abs(signs @ values) >= least))
    return (1 + hits) / (1 + num_draws)


def paired_t_p(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of the paired t-test; None where the differences have no spread."""
    if difference_ci95(differences) is None:
        return None
    error = math.sqrt(variance(differences) / len(differences))
    return two_sided_p(fmean(differences) / error, len(differences) - 1)


def _row(
    name: str, a: Mapping[str, Any], b: Mapping[str, Any], differences: Sequence[float], seed: int, num_draws: int
) -> dict[str, Any]:
    averages = [fmean(problem["avg"] for problem in result["per_problem"]) for result in (a, b)]
    return {
        "benchmark": name,
        "num_problems": len(differences),
        "num_problems_that_differ": sum(abs(d) > 1e-12 for d in differences),
        "n": a["n"],
        "a": averages[0],
        "b": averages[1],
        "difference": fmean(differences),
        "ci95": difference_ci95(differences),
        "p_value": sign_flip_p(differences, seed, num_draws),
        "p_value_t": paired_t_p(differences),
    }


def _average(
    rows: Sequence[Mapping[str, Any]], differences: Sequence[Sequence[float]], seed: int, num_draws: int
) -> dict[str, Any]:
    """The mean over benchmarks, each counting the same whatever its size, as the papers' tables have it.

    Signs are flipped by problem, with weight 1 / benchmark size.
    """
    average = macro_average(differences)
    weighted = [d / len(values) for values in differences for d in values]
    found = {"a": fmean(row["a"] for row in rows), "b": fmean(row["b"] for row in rows), "difference": average.mean}
    p_value_t = two_sided_p(average.mean / average.error, average.degrees) if average.error else None
    return found | {"ci95": average.ci95, "p_value": sign_flip_p(weighted, seed, num_draws), "p_value_t": p_value_t}


def _notes(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    differ = [key for key in _SETTINGS if a.get(key) != b.get(key)]
    return [f"{name}: {key} is {a.get(key)} in A and {b.get(key)} in B" for key in differ]


def markdown(found: Mapping[str, Any]) -> str:
    """The comparison as a page: who is A and B, one row per benchmark, what to know about it."""
    lines = [f"{side.upper()}: {', '.join(found[side]['models'])} ({found[side]['path']})  " for side in ("a", "b")]
    lines += ["", comparison(found).markdown(), "", _NOTE]
    if found["average"]:
        lines += ["", "Several benchmarks are several chances to find something: see the average first."]
    lines += ["", *(f"- {note}" for note in found["notes"])] if found["notes"] else []
    return "\n".join(lines) + "\n"


def comparison(found: Mapping[str, Any]) -> Table:
    """Cells of the table, in percent and percentage points."""
    header = ["benchmark", "problems", "n", "A avg@n %", "B avg@n %", "B - A", "95% interval", "p", "p (t)"]
    rows = [*found["rows"], {"benchmark": "average", **found["average"]}] if found["average"] else found["rows"]
    return Table(header, [_cells(row) for row in rows])


def _cells(row: Mapping[str, Any]) -> list[str]:
    interval = row["ci95"]
    return [
        row["benchmark"],
        str(row.get("num_problems", "")),
        str(row.get("n", "")),
        f"{100 * row['a']:.1f}",
        f"{100 * row['b']:.1f}",
        f"{100 * row['difference']:+.1f}",
        f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}" if interval else "unknown",
        _p(row["p_value"]),
        _p(row["p_value_t"]),
    ]


def _p(value: float | None) -> str:
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def parse_arguments(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The two folders and the options of a command line. Raises InputError for anything else."""
    folders, options = [], {}
    for argument in argv:
        if argument == "--json":
            options["json"] = "yes"
        elif match := re.fullmatch(r"(benchmark|output_dir|seed)=(.+)", argument):
            options[match[1]] = match[2].strip("[]") if match[1] == "benchmark" else match[2]
        elif argument.startswith("-") or (re.match(r"\w+=", argument) and not os.path.exists(argument)):
            raise InputError(f"unknown option {argument!r}; usage: {_USAGE}")
        else:
            folders.append(argument)
    if len(folders) != 2:
        raise InputError(f"compare takes two folders, got {len(folders)}; usage: {_USAGE}")
    return folders, options
