"""``verl-dft sample``: graded responses to a set of problems, which the builders make training data of."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_dft.data.records import Problem, write_problems
from verl_dft.sampling.ask import Ask
from verl_dft.sampling.configure import check_count, compose_sampling, plain, sampling_of
from verl_dft.sampling.folder import STORE, check_folder, identity
from verl_dft.sampling.record import write_samples
from verl_dft.sampling.sampler import OpenSource, Sampler
from verl_dft.sampling.source import TextSource


def main(argv: Sequence[str]) -> int:
    """Sample, grade, write, and print the statistics. Returns the exit code."""
    config = plain(compose_sampling("sample", argv))
    if config["dry_run"]:
        print(format_plan(plan(config)))
        return 0
    statistics = run(config)
    print(markdown(statistics))
    print(f"written: {config['output_dir']}/samples.parquet, problems.jsonl, statistics.json, statistics.md")
    return 0


def asks_of(problems: Sequence[Problem], config: Mapping[str, Any], stream: str = "") -> list[Ask]:
    """``n`` asks for each problem, problem by problem.

    Args:
        config: ``n, prompt, temperature, top_p, top_k, max_tokens, answer_type``.
        stream: see :class:`verl_dft.sampling.ask.Ask`.

    Raises:
        InputError: an option out of its range, or an unknown prompt.
    """
    from verl_dft.data.prompts import render_messages

    sampling, n = sampling_of(config), check_count(config)
    asks = []
    for problem in problems:
        messages = render_messages(config["prompt"], problem.problem)
        first = Ask(
            problem.id,
            0,
            messages,
            problem.answer,
            sampling,
            prompt_name=config["prompt"],
            stream=stream,
            problem=problem.problem,
            answer_type=config.get("answer_type", "auto"),
        )
        asks += first.numbered(range(n))
    return asks


def plan(config: Mapping[str, Any]) -> dict[str, int]:
    """What :func:`run` would sample; see :meth:`verl_dft.sampling.sampler.Sampler.plan`."""
    asks = asks_of(_problems(config), config)
    return Sampler(Path(config["output_dir"]) / STORE, config["model"]["path"], config).plan(asks)


def format_plan(found: Mapping[str, int]) -> str:
    """A plan as one line."""
    return (
        f"dry run: {found['samples']:,} samples ({found['stored']:,} stored already), "
        f"{found['prompt_tokens']:,} prompt tokens, at most {found['max_response_tokens']:,} response tokens"
    )


def run(config: Mapping[str, Any], source: TextSource | OpenSource | None = None) -> dict[str, Any]:
    """Sample, or finish doing so; the statistics as written to ``statistics.json``.

    Args:
        config: ``configs/sample.yaml`` composed.
        source: what samples instead of a vLLM engine started here.

    Raises:
        InputError: anything a user can put right.
    """
    from verl_dft.data.problems import inputs_of
    from verl_dft.files import atomic_write, write_json, write_manifest

    folder, model = Path(config["output_dir"]), config["model"]["path"]
    check_folder(folder, config)
    problems = _problems(config)
    asks = asks_of(problems, config)
    with Sampler(folder / STORE, model, config, source) as sampler:
        samples = sampler.sample(asks)
        (folder / "statistics.json").unlink(missing_ok=True)  # a folder that has it is complete
        statistics = statistics_of(samples.counted(), [problem.id for problem in problems])
        write_problems(folder / "problems.jsonl", problems)
        write_samples(folder / "samples.parquet", samples, config["want_logp"])
        facts = {"num_reused": sampler.num_reused, "num_generated": sampler.num_generated, "seconds": sampler.seconds}
        write_manifest(
            folder / "samples.parquet",
            inputs=inputs_of(config["data"]),
            seed=config["seed"],
            model=model,
            engine=sampler.facts,
            statistics=statistics,
            **facts,
        )
        with atomic_write(folder / "statistics.md") as file:
            file.write(markdown(statistics) + "\n")
        write_json(folder / "config.json", identity(config))
        write_json(folder / "statistics.json", statistics)
    return statistics


def _problems(config: Mapping[str, Any]) -> list[Problem]:
    from verl_dft.data.problems import problems_of

    return problems_of(config["data"], config["limit"])


def statistics_of(samples: Iterable[Mapping[str, Any]], problem_ids: Sequence[str]) -> dict[str, Any]:
    """Counts of samples, verdicts, tokens and problems, and how many of each problem's samples were right.

    Args:
        samples: as :meth:`verl_dft.sampling.graded.GradedSamples.counted` gives them.
    """
    right: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    tokens = 0
    for sample in samples:
        right[sample["problem_id"]] += sample["grade"] == "correct"
        verdicts[sample["grade"]] += 1
        reasons[sample["finish_reason"]] += 1
        tokens += sample["num_tokens"]
    per_problem = Counter(right[problem] for problem in problem_ids)
    return {
        "problems": len(problem_ids),
        "problems_solved": sum(right[problem] > 0 for problem in problem_ids),
        "samples": verdicts.total(),
        "verdicts": dict(verdicts.most_common()),
        "finish_reasons": dict(reasons.most_common()),
        "tokens": tokens,
        "tokens_per_sample": round(tokens / max(verdicts.total(), 1), 1),
        "problems_by_num_correct": {str(k): per_problem[k] for k in sorted(per_problem)},
    }


def markdown(statistics: Mapping[str, Any]) -> str:
    """:func:`statistics_of` as a table."""
    samples, problems = statistics["samples"], statistics["problems"]
    rows = [("problems", problems, "")]
    rows.append(
        ("solved at least once", statistics["problems_solved"], _share(statistics["problems_solved"], problems))
    )
    rows.append(("samples", samples, ""))
    rows += [(f"graded {name}", count, _share(count, samples)) for name, count in statistics["verdicts"].items()]
    rows += [(f"ended by {k}", count, _share(count, samples)) for k, count in statistics["finish_reasons"].items()]
    rows += [("tokens", statistics["tokens"], f"{statistics['tokens_per_sample']} a sample")]
    lines = ["| | number | share |", "|---|---:|---:|"]
    return "\n".join([*lines, *(f"| {name} | {count:,} | {note} |" for name, count, note in rows)])


def _share(count: int, total: int) -> str:
    return f"{100 * count / max(total, 1):.1f}%"
