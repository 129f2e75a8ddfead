"""``verl-dft groups``: problems, and who is to answer them, become groups of rows with advantages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_dft.build import group_sources
from verl_dft.build.group_plan import (
    Candidates,
    Composition,
    GroupOptions,
    own_response,
    parse_composition,
    plan_groups,
    teacher_response,
)
from verl_dft.build.groups import Groups, build_groups
from verl_dft.build.rewrite_gold import unusable_golds
from verl_dft.data.records import Problem
from verl_dft.errors import InputError
from verl_dft.sampling.configure import compose_sampling, plain

if TYPE_CHECKING:
    from verl_dft.build.group_plan import Response
    from verl_dft.build.group_sources import Answers
    from verl_dft.sampling.record import Sample
    from verl_dft.sampling.sampler import OpenSource
    from verl_dft.sampling.source import TextSource

_SWITCHES = ("no_gal", "keep_expert", "drop_equal", "want_logp")
_OPTIONS = ("prompt", "std", "epsilon", "expert_reward", "keep_expert", "drop_equal", "verifier", "missing")


@dataclass
class Sources:
    """What samples instead of vLLM engines (and endpoints) opened here."""

    own: TextSource | OpenSource | None = None
    teacher: TextSource | OpenSource | None = None


@dataclass
class Job:
    """A run: what it was asked for, the candidates gathered so far, and what was sampled for them."""

    config: Mapping[str, Any]
    problems: list[Problem]
    composition: Composition
    options: GroupOptions
    candidates: dict[str, Candidates]
    follow: set[str]
    """Members that are sampled here: ``teacher``, ``self``."""
    writers: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    """Models and prompts of the members whose responses are samples."""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.config["output_dir"])


def main(argv: Sequence[str]) -> int:
    """Build the groups and print the statistics. Returns the exit code."""
    from verl_dft.build.groups_page import format_plan, markdown

    config = plain(compose_sampling("groups", expand_composition(argv), need_model=False))
    if config["dry_run"]:
        print(format_plan(plan(config)))
        return 0
    statistics = run(config)
    print(markdown(statistics))
    print(f"written: {config['output_dir']}/rows.parquet, statistics.json, statistics.md")
    return 0


def expand_composition(argv: Sequence[str]) -> list[str]:
    """``composition=1:3:4`` and its like as the overrides that they stand for. Raises InputError."""
    expanded = []
    for argument in argv:
        key, _, value = argument.partition("=")
        if key != "composition":
            expanded.append(argument)
            continue
        found = parse_composition(value.strip("'\""))
        counts = zip(("expert", "teacher", "self"), found.counts, strict=True)
        expanded += [f"composition.{name}={count}" for name, count in counts]
        expanded.append(f"no_gal={str(found.alone).lower()}")
    return expanded


def run(config: Mapping[str, Any], sources: Sources | None = None) -> dict[str, Any]:
    """Build the groups, sampling what is to be sampled here; the statistics as written to ``statistics.json``.

    Args:
        config: ``configs/groups.yaml`` composed.

    Raises:
        InputError: anything a user can put right.
    """
    from verl_dft.sampling.folder import check_folder

    sources = sources or Sources()
    check_folder(Path(config["output_dir"]), config)
    job = start(config)
    for member, source in (("teacher", sources.teacher), ("self", sources.own)):
        if member in job.follow:  # a wrong model or option of the second should not be found after sampling the first
            group_sources.make_sampler(job.folder, config, member, source)
            group_sources.asks_for(job.problems, _counts(job, member), config, member)
    if "teacher" in job.follow:
        _sample(job, "teacher", sources.teacher)
        job.follow.discard("teacher")
        plan_groups(job.problems, job.candidates, job.composition, job.options, job.follow)
    if "self" in job.follow:
        _sample(job, "self", sources.own)
    if not job.composition.alone:
        _grade(job)
    groups = build_groups(job.problems, job.candidates, job.composition, job.options)
    groups.statistics["writers"] = _writers(job)
    _write(job, groups)
    return groups.statistics


def start(config: Mapping[str, Any]) -> Job:
    """Read what is there, and see whether anything is missing before anything is sampled. Raises InputError."""
    from verl_dft.data.problems import problems_of

    composition, options = composition_of(config), group_options(config)
    teacher, own = group_sources.teacher_kind(config, composition), group_sources.own_kind(config, composition)
    problems = problems_of(config["data"], config["limit"])
    job = Job(config, problems, composition, options, group_sources.expert_candidates(problems), set())
    if not composition.alone and config["answer_type"] == "auto":
        for problem_id, reason in unusable_golds(problems, config["grading"]).items():
            _update(job, problem_id, unusable=reason)
    if teacher == "column":
        for problem_id, texts in group_sources.column_texts(problems).items():
            _update(job, problem_id, teacher=texts)
    elif teacher == "samples":
        given, respond = config["teacher"]["samples"], _respond(job, "teacher")
        _add(job, "teacher", group_sources.given_samples("teacher.samples", given, problems, respond))
    elif teacher is not None:
        job.follow.add("teacher")
    if own == "samples":
        found = group_sources.given_samples("samples", config["samples"], problems, _respond(job, "self"))
        group_sources.one_writer(found.writers)
        _add(job, "self", found)
    elif own is not None:
        job.follow.add("self")
    plan_groups(problems, job.candidates, composition, options, job.follow)
    return job


def plan(config: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`run` would sample: ``problems``, ``composition``, and by member what its sampler plans.

    Where teacher texts are sampled too, own responses in their places are not foreseen.
    """
    job = start(config)
    found: dict[str, Any] = {"problems": len(job.problems), "composition": str(job.composition)}
    found["groups"] = len(_compositions(job))
    for member in ("teacher", "self"):
        if member in job.follow:
            sampler = group_sources.make_sampler(job.folder, config, member, None)
            found[member] = sampler.plan(group_sources.asks_for(job.problems, _counts(job, member), config, member))
    return found


# ---- the configuration ----


def composition_of(config: Mapping[str, Any]) -> Composition:
    """The composition of a configuration. Raises InputError for one that cannot be."""
    for key in _SWITCHES:
        if not isinstance(config[key], bool):
            raise InputError(f"{key}={config[key]}; it must be true or false")
    if config["no_gal"]:
        return parse_composition("no_gal")
    counts = config["composition"]
    return Composition(counts["expert"], counts["teacher"], counts["self"])


def group_options(config: Mapping[str, Any]) -> GroupOptions:
    """The options of a configuration. Raises InputError for a value that cannot be."""
    return GroupOptions(**{key: config[key] for key in _OPTIONS}, missing_teacher=config["teacher"]["missing"])


# ---- gathering ----


def _update(job: Job, problem_id: str, **found: Any) -> None:
    job.candidates[problem_id] = replace(job.candidates.get(problem_id, Candidates()), **found)


def _respond(job: Job, member: str) -> Callable[[Sample], Response]:
    make = teacher_response if member == "teacher" else own_response
    return lambda sample: make(sample, job.options)


def _add(job: Job, member: str, found: Answers) -> None:
    for problem_id, responses in found.responses.items():
        _update(job, problem_id, **{"teacher" if member == "teacher" else "own": responses})
    job.writers[member] = found.writers


def _compositions(job: Job) -> dict[str, Composition]:
    return plan_groups(job.problems, job.candidates, job.composition, job.options, job.follow).compositions


def _counts(job: Job, member: str) -> dict[str, int]:
    return {key: one.teacher if member == "teacher" else one.own for key, one in _compositions(job).items()}


def _sample(job: Job, member: str, source: TextSource | OpenSource | None) -> None:
    """Sample what the plan has a place for, write it beside its store, and make candidates of it."""
    from verl_dft.sampling.record import read_samples, write_samples

    asks = group_sources.asks_for(job.problems, _counts(job, member), job.config, member)
    if not asks:
        return
    path = job.folder / member / "samples.parquet"
    with group_sources.make_sampler(job.folder, job.config, member, source) as sampler:
        samples = sampler.sample(asks, member)
        # while the store is held: nobody else writes here meanwhile
        write_samples(path, samples, member == "self" and job.config["want_logp"])
    _add(job, member, group_sources.answers_of(read_samples(path), _respond(job, member)))
    job.facts[member] = {
        "model": sampler.model,
        "engine": sampler.facts,
        "num_reused": sampler.num_reused,
        "num_generated": sampler.num_generated,
        "seconds": sampler.seconds,
    }


def _grade(job: Job) -> None:
    """Give the texts that no sampler graded their verdicts: the expert's, and the teacher's column."""
    planned = _compositions(job)
    used = [problem for problem in job.problems if problem.id in planned]
    if job.composition.expert:
        texts = {one.id: [job.candidates[one.id].expert] for one in used}
        for problem_id, (expert,) in group_sources.graded(used, texts, job.config).items():
            _update(job, problem_id, expert=expert)
    if job.composition.teacher and "teacher" not in job.writers:
        texts = {one.id: list(job.candidates[one.id].teacher) for one in used}
        for problem_id, teacher in group_sources.graded(used, texts, job.config).items():
            _update(job, problem_id, teacher=teacher)


# ---- writing ----


def _writers(job: Job) -> dict[str, Any]:
    """Who wrote the sampled responses, with which prompt."""
    return {
        member: {
            "models": sorted({model for model, _ in writers}),
            "prompts": sorted({prompt for _, prompt in writers}),
        }
        for member, writers in job.writers.items()
    }


def _write(job: Job, groups: Groups) -> None:
    """The statistics last: a folder that has them is complete."""
    from verl_dft.build.groups_page import markdown
    from verl_dft.config import command_line
    from verl_dft.data.records import write_rows
    from verl_dft.files import atomic_write, write_json
    from verl_dft.sampling.folder import identity

    folder, config = job.folder, job.config
    (folder / "statistics.json").unlink(missing_ok=True)
    write_rows(
        folder / "rows.parquet",
        groups.rows,
        inputs=_inputs(config),
        command=command_line(),
        seed=config["seed"],
        config=identity(config),
        statistics=groups.statistics,
        sampled=job.facts,
    )
    with atomic_write(folder / "statistics.md") as file:
        file.write(markdown(groups.statistics) + "\n")
    write_json(folder / "config.json", identity(config))
    write_json(folder / "statistics.json", groups.statistics)


def _inputs(config: Mapping[str, Any]) -> dict[str, str]:
    from verl_dft.build.reject_command import sample_files
    from verl_dft.data.problems import files_of

    named = {"problems": files_of(config["data"])}
    for key, given in (("samples", config["samples"]), ("teacher.samples", config["teacher"]["samples"])):
        named[key] = sample_files(given) if given else []
    return {f"{key}{i}" if i else key: str(path) for key, paths in named.items() for i, path in enumerate(paths)}
