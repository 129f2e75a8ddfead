"""``verl-dft rewrite``: the loop between the planner and the sampler, and what is written at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_dft.build.rewrite import (
    ABLATIONS,
    GUIDED,
    SELF,
    VERIFIERS,
    RewriteOptions,
    RewritePlanner,
    Stage,
    asks_of,
    expert_row,
    has_solution,
    make_row,
)
from verl_dft.data.prompts import find_prompt
from verl_dft.data.records import Problem
from verl_dft.errors import InputError
from verl_dft.sampling.configure import check_count, compose_sampling, plain, sampling_of, whole_number
from verl_dft.sampling.folder import STORE

if TYPE_CHECKING:
    from verl_dft.sampling.record import Sample
    from verl_dft.sampling.sampler import OpenSource, Sampler
    from verl_dft.sampling.source import TextSource


def main(argv: Sequence[str]) -> int:
    """Rewrite, and print the statistics. Returns the exit code."""
    from verl_dft.build.rewrite_statistics import markdown

    config = plain(compose_sampling("rewrite", argv))
    if config["dry_run"]:
        print(format_plan(plan(config)))
        return 0
    statistics = run(config)
    print(markdown(statistics, config["model"]["path"]))
    print(
        f"written: {config['output_dir']}/rows.parquet, expert.parquet, samples.parquet, statistics.json, statistics.md"
    )
    return 0


def run(config: Mapping[str, Any], source: TextSource | OpenSource | None = None) -> dict[str, Any]:
    """Rewrite, or finish doing so; the statistics as written to ``statistics.json``.

    Args:
        config: ``configs/rewrite.yaml`` composed.
        source: what samples instead of a vLLM engine started here.

    Raises:
        InputError: anything a user can put right.
    """
    from verl_dft.build.rewrite_gold import unusable_golds
    from verl_dft.build.rewrite_statistics import rewrite_statistics
    from verl_dft.sampling.folder import check_folder
    from verl_dft.sampling.sampler import Sampler

    folder, options = Path(config["output_dir"]), rewrite_options(config)
    check_folder(folder, config)
    problems = _problems(config)
    planner = RewritePlanner(problems, options, unusable_golds(problems, config["grading"]))
    with Sampler(folder / STORE, config["model"]["path"], config, source) as sampler:
        # Guided prompts are longer; without this the engine would be started again for them.
        sampler.reserve(planner.largest_asks())
        told = []
        while (wave := planner.next_wave()) is not None:
            told.append(sampler.sample(wave.asks, f"{wave.stage.name}, wave {wave.number + 1}"))
            planner.tell(told[-1])
        statistics = {"model": config["model"]["path"], "stages": options.stages, "early_stop": options.early_stop}
        statistics |= {"wave_size": options.wave_size} if options.early_stop else {}
        statistics |= rewrite_statistics(planner.outcomes(), planner.history, options)
        # while the store is held: nobody else writes here meanwhile
        _write(folder, config, planner, statistics, sampler, told)
    return statistics


def _write(
    folder: Path,
    config: Mapping[str, Any],
    planner: RewritePlanner,
    statistics: dict[str, Any],
    sampler: Sampler,
    told: Sequence[Sequence[Sample]],
) -> None:
    """The statistics last: a folder that has them is complete."""
    from verl_dft.build.rewrite_statistics import markdown
    from verl_dft.data.problems import inputs_of
    from verl_dft.data.records import write_rows
    from verl_dft.files import atomic_write, write_json
    from verl_dft.sampling.folder import identity
    from verl_dft.sampling.graded import Joined
    from verl_dft.sampling.record import write_samples

    (folder / "statistics.json").unlink(missing_ok=True)
    name, prompt = find_prompt(config["prompt"])
    rows = [make_row(o, planner.options, name, prompt) for o in planner.outcomes() if o.origin is not None]
    if not rows:
        raise InputError(f"no problem is left to write a row of; they were dropped: {statistics['dropped']}")
    if told:
        write_samples(folder / "samples.parquet", Joined(told), config["want_logp"])
    facts = {"inputs": inputs_of(config["data"]), "seed": config["seed"], "config": identity(config)}
    experts = [expert_row(problem, prompt) for problem in planner.problems if has_solution(problem)]
    if experts:
        write_rows(folder / "expert.parquet", experts, **facts)
    facts |= {"model": config["model"]["path"], "engine": sampler.facts, "seconds": sampler.seconds}
    facts |= {"num_reused": sampler.num_reused, "num_generated": sampler.num_generated}
    write_rows(folder / "rows.parquet", rows, **facts)
    with atomic_write(folder / "statistics.md") as file:
        file.write(markdown(statistics, config["model"]["path"]))
    write_json(folder / "config.json", identity(config))
    write_json(folder / "statistics.json", statistics)


# ---- the configuration ----


def rewrite_options(config: Mapping[str, Any]) -> RewriteOptions:
    """The planner's options of a configuration.

    Raises:
        InputError: a value out of its range, or a prompt that cannot be used where it is.
    """
    if config["online"]:
        raise InputError("online=true: this command rewrites before training; leave it out")
    _choice("stages", config["stages"], ABLATIONS)
    _choice("missing_solution", config["missing_solution"], ("refuse", "drop"))
    for key in ("early_stop", "want_logp", "keep_truncated"):
        if not isinstance(config[key], bool):
            raise InputError(f"{key}={config[key]}; it must be true or false")
    if find_prompt(config["prompt"])[1].needs_reference:
        raise InputError(f"prompt={config['prompt']} shows the solution, which training rows must not; use another")
    whole_number("wave_size", config["wave_size"], 1)
    stages = [_stage(name, config[name], config["keep_truncated"]) for name in (SELF, GUIDED)]
    return RewriteOptions(*stages, config["stages"], config["early_stop"], config["wave_size"], config["seed"])


def _stage(name: str, options: Mapping[str, Any], keep_truncated: bool) -> Stage:
    if not isinstance(options, Mapping):
        raise InputError(f"{name}={options}; the stage has keys of its own, e.g. {name}.n=4")
    prompt_name, prompt = find_prompt(options["prompt"])
    if name == GUIDED and not prompt.needs_reference:
        raise InputError(
            f"guided.prompt={options['prompt']} must have {{reference}} in it, where the expert's solution goes; see "
            "verl-dft data list"
        )
    if name == SELF and prompt.needs_reference:
        raise InputError(f"self.prompt={options['prompt']} shows the solution, and the model is to solve by itself")
    _choice(f"{name}.verifier", options["verifier"], VERIFIERS)
    sampling, n = sampling_of(options, f"{name}."), check_count(options, f"{name}.")
    return Stage(name, n, sampling, prompt_name, prompt, options["verifier"], keep_truncated)


def _choice(key: str, value: Any, valid: Sequence[str]) -> None:
    if value not in valid:
        raise InputError(f"{key}={value}; use one of {', '.join(valid)}")


def _problems(config: Mapping[str, Any]) -> list[Problem]:
    """The problems, each with an expert solution unless ``missing_solution=drop``."""
    from verl_dft.data.problems import problems_of

    problems = problems_of(config["data"], config["limit"])
    missing = [problem for problem in problems if not has_solution(problem)]
    if missing and config["missing_solution"] == "refuse":
        raise InputError(
            f"{_where(missing[0], config)} has no expert solution to retell or to fall back on, nor have "
            f"{len(missing) - 1} others of {len(problems)}; give them a solution, or set missing_solution=drop"
        )
    return problems


def _where(problem: Problem, config: Mapping[str, Any]) -> str:
    """File, row and id of a problem; a source that selects its problems has no row numbers, but their ids."""
    from verl_dft.data.problems import files_of, problems_of

    for file in files_of(config["data"]) if config["data"].get("train_files") else []:
        ids = [other.id for other in problems_of({**config["data"], "train_files": str(file)})]
        if problem.id in ids:
            return f"{file}: row {ids.index(problem.id)}: problem {problem.id!r}"
    return (
        f"{', '.join(map(str, files_of(config['data']))) or config['data']['source']['name']}: problem {problem.id!r}"
    )


# ---- the dry run ----


def plan(config: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`run` would sample at most, by stage.

    Which problems reach the later waves is not known before their samples are graded, so ``samples``, ``prompt_tokens``
    and ``max_response_tokens`` are of all n samples of every problem. ``expected_if_uniform`` is the number of samples
    with early stopping if solve rates were spread evenly over 0 to 1.
    """
    from verl_dft.build.rewrite_gold import unusable_golds
    from verl_dft.sampling.sampler import Sampler

    options, problems = rewrite_options(config), _problems(config)
    unusable = unusable_golds(problems, config["grading"])
    usable = [problem for problem in problems if problem.id not in unusable]
    # a wave's shards depend on what the waves before it solved, so stored samples are counted one by one
    one_by_one = {**config, "deterministic": False}
    sampler = Sampler(Path(config["output_dir"]) / STORE, config["model"]["path"], one_by_one)
    found: dict[str, Any] = {"problems": len(problems), "unusable_golds": len(unusable), "stages": {}}
    reach = 1.0
    for stage in options.sampled_stages():
        asked = [problem for problem in usable if stage.name == SELF or has_solution(problem)]
        asks = [ask for problem in asked for ask in asks_of(problem, stage, range(stage.n))]
        each = expected_samples(options.wave_sizes(stage))
        found["stages"][stage.name] = sampler.plan(asks) | {"expected_if_uniform": round(reach * each * len(asked))}
        reach /= stage.n + 1
    return found


def expected_samples(wave_sizes: Sequence[int]) -> float:
    """Samples per problem with early stopping, if solve rates are uniform on (0, 1).

    A wave is drawn if the k samples before it failed, which has probability E[(1 - p)^k] = 1 / (k + 1).
    """
    return sum(size / (sum(wave_sizes[:number]) + 1) for number, size in enumerate(wave_sizes))


def format_plan(found: Mapping[str, Any]) -> str:
    """A plan as lines."""
    lines = [f"dry run: {found['problems']:,} problems, {found['unusable_golds']:,} with a gold that cannot be judged"]
    for name, stage in found["stages"].items():
        lines.append(
            f"{name}: at most {stage['samples']:,} samples ({stage['stored']:,} stored already), "
            f"{stage['prompt_tokens']:,} prompt tokens, {stage['max_response_tokens']:,} response tokens; "
            f"about {stage['expected_if_uniform']:,} samples if solve rates were spread evenly over 0 to 1"
        )
    return "\n".join(lines)
