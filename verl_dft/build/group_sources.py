"""Where a group's responses come from: files of samples, models and endpoints sampled here, the problems' own texts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_dft.build.group_plan import Candidates, Composition, Response, StoredResponse, stored
from verl_dft.build.reject_command import sample_files
from verl_dft.data.prompts import find_prompt
from verl_dft.data.records import Problem
from verl_dft.errors import InputError
from verl_dft.sampling.ask import Ask
from verl_dft.sampling.configure import check_count, sampling_of, whole_number
from verl_dft.sampling.folder import STORE
from verl_dft.sampling.record import Sample, read_samples

if TYPE_CHECKING:
    from verl_dft.sampling.sampler import OpenSource, Sampler
    from verl_dft.sampling.source import TextSource


def teacher_kind(config: Mapping[str, Any], composition: Composition) -> str | None:
    """``samples``, ``endpoint``, ``model`` or ``column``; None where the composition has no teacher.

    Raises:
        InputError: two are given, or an endpoint without its model's name.
    """
    teacher = config["teacher"]
    if not composition.teacher:
        return None
    if teacher["samples"] and (teacher["endpoint"] or teacher["model"]):
        raise InputError("teacher.samples is given, and teacher.model or teacher.endpoint too; leave one out")
    if teacher["endpoint"] and not teacher["model"]:
        raise InputError(f"teacher.endpoint={teacher['endpoint']} needs teacher.model=NAME, as the server calls it")
    return next((kind for kind in ("samples", "endpoint", "model") if teacher[kind]), "column")


def own_kind(config: Mapping[str, Any], composition: Composition) -> str | None:
    """``samples`` or ``model``; None where the composition needs no response of the model itself.

    Raises:
        InputError: none is given, or both.
    """
    if composition.alone or not (composition.own or (composition.teacher and config["teacher"]["missing"] == "self")):
        return None
    if config["samples"] and config["model"]["path"]:
        raise InputError("samples= and model= are both given; the model's own responses come from one of them")
    if not config["samples"] and not config["model"]["path"]:
        raise InputError(
            f"groups of {composition} need the model's own responses; give model=FOLDER, which is sampled here, or "
            "samples=FOLDER of verl-dft sample"
        )
    return "samples" if config["samples"] else "model"


def expert_candidates(problems: Sequence[Problem]) -> dict[str, Candidates]:
    """The solution of each problem that has one, ungraded."""
    return {one.id: Candidates(Response(one.solution, "") if one.solution else None) for one in problems}


def column_texts(problems: Sequence[Problem]) -> dict[str, list[Response]]:
    """The problems' teacher solutions, ungraded. Raises InputError where no problem has any."""
    if not any(problem.teacher_solutions for problem in problems):
        raise InputError(
            f"none of {len(problems)} problems has teacher texts (column teacher_solutions, a list of texts); give "
            "teacher.samples, teacher.model or teacher.endpoint, or composition=no_mix"
        )
    return {one.id: [Response(text, "") for text in one.teacher_solutions or ()] for one in problems}


@dataclass(frozen=True)
class Answers:
    """A member's samples: what planning needs of each by problem, in the order of their index, and who wrote them."""

    responses: dict[str, list[StoredResponse]]
    writers: set[tuple[str, str]]
    """Models, each with the name of a prompt."""


def answers_of(samples: Sequence[Sample], respond: Callable[[Sample], Response]) -> Answers:
    """Samples as candidates whose texts and tokens are read again when rows are made of them.

    Args:
        samples: gone through once.
        respond: the candidate that a sample is.
    """

    def read(position: int) -> Response:
        return respond(samples[position])

    found: dict[str, list[tuple[int, StoredResponse]]] = {}
    writers = set()
    for position, sample in enumerate(samples):
        found.setdefault(sample.problem_id, []).append((sample.index, stored(respond(sample), position, read)))
        writers.add((sample.model, sample.prompt_name))
    responses = {key: [one for _, one in sorted(ones, key=lambda one: one[0])] for key, ones in found.items()}
    return Answers(responses, writers)


def given_samples(key: str, paths: Any, problems: Sequence[Problem], respond: Callable[[Sample], Response]) -> Answers:
    """Samples of files.

    Args:
        key: the configuration's, for messages.
        respond: the candidate that a sample is.

    Raises:
        InputError: unreadable, none of these problems, or of a problem with the same id and another text or gold.
    """
    files, by_id = sample_files(paths), {problem.id: problem for problem in problems}

    def checked(sample: Sample) -> Response:
        if problem := by_id.get(sample.problem_id):
            _check_same(key, sample, problem)
        return respond(sample)

    found = answers_of(read_samples(files), checked)
    if not any(problem_id in by_id for problem_id in found.responses):
        raise InputError(
            f"{key}: {', '.join(map(str, files))}: no sample is of one of the {len(problems)} problems of data= (first "
            f"ids: {next(iter(found.responses))} there, {problems[0].id} here); give the problems that were sampled"
        )
    return found


def _check_same(key: str, sample: Sample, problem: Problem) -> None:
    for what, there, here in (("problem", sample.problem, problem.problem), ("gold", sample.gold, problem.answer)):
        if there and here and there != here:
            raise InputError(
                f"{key}: problem {problem.id} has another {what} there ({_short(there)!r}) than in data= "
                f"({_short(here)!r}); give the problems that were sampled, e.g. their problems.jsonl"
            )


def one_writer(found: Collection[tuple[str, str]]) -> None:
    """Raise InputError where the model's own responses are of several models or prompts."""
    writers = sorted(found)
    if len(writers) > 1:
        raise InputError(
            f"samples: responses of {len(writers)} models or prompts ({'; '.join(map(' with '.join, writers[:3]))}); "
            "a group's own responses are one model's: give one sampling's folder"
        )


def asks_for(
    problems: Sequence[Problem], counts: Mapping[str, int], config: Mapping[str, Any], section: str
) -> list[Ask]:
    """``counts[id]`` asks for each problem that has one, with the options of ``config[section]``.

    Raises:
        InputError: an option out of its range.
    """
    options = config[section]
    sampling, (name, prompt) = sampling_of(options, f"{section}."), find_prompt(options["prompt"])
    if prompt.needs_reference:
        raise InputError(f"{section}.prompt={options['prompt']} shows a solution; use a prompt that does not")
    check_count({"n": max(counts.values(), default=1), "temperature": options["temperature"]}, f"{section}.")
    stream = "" if section == "self" else section
    asks = []
    for problem in problems:
        messages = prompt.messages(problem.problem) if counts.get(problem.id) else []
        first = Ask(problem.id, 0, messages, problem.answer, sampling, prompt_name=name, stream=stream,
                    problem=problem.problem, answer_type=config["answer_type"])  # fmt: skip
        asks += first.numbered(range(counts.get(problem.id, 0)))
    return asks


def make_sampler(
    folder: Path, config: Mapping[str, Any], section: str, source: TextSource | OpenSource | None
) -> Sampler:
    """The sampler of ``self`` or ``teacher``, with a store of its own in ``folder``. Raises InputError."""
    from verl_dft.sampling.sampler import Sampler

    model, options = config["model"]["path"], dict(config)
    if section == "teacher":
        teacher = config["teacher"]
        model = teacher["model"]
        options |= {"engine": teacher["engine"], "num_replicas": teacher["num_replicas"], "want_logp": False}
        whole_number("teacher.num_replicas", teacher["num_replicas"], 1)
        whole_number("teacher.engine.tensor_parallel_size", teacher["engine"]["tensor_parallel_size"], 1)
        if teacher["endpoint"]:
            # an answer is kept when it arrives, whatever becomes of the next one
            options |= {"num_replicas": 1, "shard_size": 1, "deterministic": True}
            source = source or _endpoint(teacher)
    return Sampler(folder / section / STORE, model, options, source)


def _endpoint(teacher: Mapping[str, Any]) -> TextSource:
    from verl_dft.sampling.endpoint import EndpointSource

    return EndpointSource(teacher["endpoint"], teacher["model"], **teacher["requests"])


def graded(
    problems: Sequence[Problem], texts: Mapping[str, Sequence[Response]], config: Mapping[str, Any]
) -> dict[str, list[Response]]:
    """The same responses with their verdicts."""
    from verl_dft.grading.pool import GradeItem, GraderPool

    pairs = [(problem, one) for problem in problems for one in texts.get(problem.id, ())]
    items = [GradeItem(one.text, problem.answer, config["answer_type"]) for problem, one in pairs]
    with GraderPool(**config["grading"]) as pool:
        grades = pool.grade(items)
    found: dict[str, list[Response]] = {problem_id: [] for problem_id in texts}
    for (problem, one), grade in zip(pairs, grades, strict=True):
        verdict = grade.qwen if config["verifier"] == "qwen" else grade.verdict
        found[problem.id].append(replace(one, verdict=verdict))
    return found


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
