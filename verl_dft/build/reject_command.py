"""``verl-dft reject``: graded samples become RFT rows and DPO pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_dft.build.page import names, share, table
from verl_dft.build.reject import Pair, RejectOptions, by_problem, preference_pairs, rft_rows, sort_out
from verl_dft.build.reject_statistics import Tally, statistics
from verl_dft.data.records import Row, row_spool
from verl_dft.data.spool import Spool
from verl_dft.errors import InputError
from verl_dft.sampling.configure import plain, whole_number

if TYPE_CHECKING:
    import pyarrow as pa

_OPTIONS = ("prompt", "max_per_problem", "dedup", "keep_truncated", "pairs_per_problem", "rejected", "verifier", "seed")


def main(argv: Sequence[str]) -> int:
    """Make the files and print the statistics. Returns the exit code."""
    from verl_dft.config import compose, require, split_config_name

    argv = ["dry_run=true" if argument == "--dry-run" else argument for argument in argv]
    name, overrides = split_config_name(argv, "reject")
    config = compose(name, overrides)
    require(config, "samples", "output_dir")
    found = run(plain(config))
    print(markdown(found))
    if config.dry_run:
        print(f"dry run: nothing written to {config.output_dir}")
    else:
        made = ["rft.parquet"] * bool(found["rows"]) + ["pairs.parquet"] * bool(found["pairs"])
        print(f"written: {config.output_dir}/{', '.join([*made, 'statistics.json', 'statistics.md'])}")
    return 0


def run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read samples, write rows and pairs; the statistics as written to ``statistics.json``.

    Args:
        config: ``configs/reject.yaml`` composed. With ``dry_run`` nothing is written.

    Raises:
        InputError: anything a user can put right; no usable response among the samples.
    """
    from verl_dft.config import command_line
    from verl_dft.sampling.folder import check_folder
    from verl_dft.sampling.record import read_samples

    folder, paths = Path(config["output_dir"]), sample_files(config["samples"])
    options = reject_options(config)
    if not config["dry_run"]:
        check_folder(folder, config)
    if config["limit"] is not None:
        whole_number("limit", config["limit"], 1)
    problems, tally = by_problem(read_samples(paths), config["limit"]), Tally(options)
    with row_spool(folder / "rft.parquet") as rows, pair_spool(folder / "pairs.parquet") as pairs:
        for problem_id, samples in problems.items():  # once: they are read from the disk
            found = sort_out(samples, options)
            made = rft_rows(problem_id, found, options), preference_pairs(problem_id, found, options)
            tally.add(samples, found, *made)
            if not config["dry_run"]:
                rows.add(made[0])
                pairs.add(made[1])
        counts = statistics(tally)
        if not counts["rows"] and not counts["pairs"]:
            verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts["verdicts"].items() if count)
            raise InputError(
                f"{', '.join(map(str, paths))}: no response can be kept ({verdicts}; {counts['correct_truncated']} "
                "correct ones cut off); sample more, or from another model or prompt"
            )
        if not config["dry_run"]:
            inputs = {f"samples{i}" if i else "samples": path for i, path in enumerate(paths)}
            facts = {"inputs": inputs, "command": command_line(), "seed": options.seed, "statistics": counts}
            _write(folder, config, rows, pairs, counts, facts)
    return counts


def reject_options(config: Mapping[str, Any]) -> RejectOptions:
    """The options of a configuration. Raises InputError for a value that cannot be."""
    for key in ("dedup", "keep_truncated"):
        if not isinstance(config[key], bool):
            raise InputError(f"{key}={config[key]}; it must be true or false")
    rejected = config["rejected"]
    values = {key: config[key] for key in _OPTIONS}
    rejected = [rejected] if isinstance(rejected, str) else rejected
    if not isinstance(rejected, list) or not all(isinstance(verdict, str) for verdict in rejected):
        raise InputError(f"rejected={rejected}; it must be a list of verdicts, e.g. [wrong]")
    return RejectOptions(**values | {"rejected": rejected})


def sample_files(samples: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files of ``samples=A`` or ``samples=[A,B]``; a folder stands for its ``samples.parquet``."""
    given = [samples] if isinstance(samples, str | Path) else list(samples)
    if not given:
        raise InputError("samples is empty; give a samples.parquet, or the folder of verl-dft sample or evaluate")
    paths = [Path(path).expanduser() for path in given]
    return [path / "samples.parquet" if path.is_dir() else path for path in paths]


def _write(
    folder: Path,
    config: Mapping[str, Any],
    rows: Spool[Row],
    pairs: Spool[Pair],
    found: dict[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """The statistics last: a folder that has them is complete."""
    from verl_dft.files import atomic_write, write_json
    from verl_dft.sampling.folder import identity

    # files of another configuration must not stay beside these
    for name in ("statistics.json", "rft.parquet", "pairs.parquet"):
        for stale in (folder / name, folder / f"{name}.manifest.json"):
            stale.unlink(missing_ok=True)
    for spool in (rows, pairs):
        if len(spool):
            spool.write(config=identity(config), **facts)
    with atomic_write(folder / "statistics.md") as file:
        file.write(markdown(found) + "\n")
    write_json(folder / "config.json", identity(config))
    write_json(folder / "statistics.json", found)


def pair_schema() -> pa.Schema:
    """Parquet schema of preference pairs; the first three columns are TRL's conversational format."""
    import pyarrow as pa

    turns, ids = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])), pa.list_(pa.int32())
    columns = [("prompt", turns), ("chosen", turns), ("rejected", turns), ("problem_id", pa.string())]
    columns += [("chosen_ids", ids), ("rejected_ids", ids)]
    columns += [("chosen_finish_reason", pa.string()), ("rejected_finish_reason", pa.string())]
    return pa.schema(columns)


def pair_spool(path: str | Path) -> Spool[Pair]:
    """Takes pairs, writes them with a manifest. A response that was cut off says so (``length``): it has no end."""
    import pyarrow as pa

    def to_table(pairs: list[Pair], first: int) -> pa.Table:
        return pa.Table.from_pylist([_pair_record(pair) for pair in pairs], schema=pair_schema())

    return Spool(path, pair_schema(), to_table)


def _pair_record(pair: Pair) -> dict[str, Any]:
    return {
        "prompt": pair.prompt,
        "chosen": _answer(pair.chosen.response),
        "rejected": _answer(pair.rejected.response),
        "problem_id": pair.chosen.problem_id,
        "chosen_ids": pair.chosen.token_ids or None,
        "rejected_ids": pair.rejected.token_ids or None,
        "chosen_finish_reason": pair.chosen.finish_reason,
        "rejected_finish_reason": pair.rejected.finish_reason,
    }


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


# ---- the page ----

_ROWS = (
    ("samples", "samples"),
    ("correct", "correct"),
    ("correct_truncated", "of them cut off (left out)"),
    ("correct_duplicates", "of them the same text again (left out)"),
    ("correct_over_max", "of them over max_per_problem (left out)"),
    ("rows", "rows in rft.parquet"),
    ("rows_with_behavior_logp", "of them with behavior_logp"),
)
_PAIRS = (
    ("pairs_possible", "pairs of a correct and a rejected response"),
    ("pairs", "pairs in pairs.parquet"),
    ("rejected_truncated", "of them with a rejected response that was cut off"),
    ("rejected_duplicates", "rejected responses with the same text again (left out)"),
)


def markdown(found: Mapping[str, Any]) -> str:
    """The statistics as a page."""
    n, total = found["samples"], found["problems"]
    samples = [[text, f"{found[key]:,}", share(found[key], n)] for key, text in _ROWS]
    problems = [
        ["problems", f"{total:,}", ""],
        ["none correct", f"{found['problems_none_correct']:,}", share(found["problems_none_correct"], total)],
        ["all correct", f"{found['problems_all_correct']:,}", share(found["problems_all_correct"], total)],
        ["with a row", f"{found['rows_problems']:,}", share(found["rows_problems"], total)],
        ["with a pair", f"{found['pairs_problems']:,}", share(found["pairs_problems"], total)],
    ]
    rates = [[label, f"{count:,}", share(count, total)] for label, count in found["solve_rates"].items()]
    verdicts = [[verdict, f"{count:,}", share(count, n)] for verdict, count in found["verdicts"].items()]
    verdicts.append(["cut off (any verdict)", f"{found['truncated']:,}", share(found["truncated"], n)])
    parts = [
        "# Rejection sampling",
        f"Samples of {', '.join(found['models']) or 'an unnamed model'}, asked with {names(found['prompts'])}; rows "
        f"have the prompt `{found['prompt_of_rows']}`. Verdicts are of the verifier `{found['verifier']}`.",
        table(["responses", "number", "of the samples"], samples),
        table(["pairs", "number"], [[text, f"{found[key]:,}"] for key, text in _PAIRS]),
        table(["problems", "number", "share"], problems),
        table(["correct samples of a problem", "problems", "share"], rates),
        table(["verdict", "samples", "share"], verdicts),
    ]
    return "\n\n".join(parts)
