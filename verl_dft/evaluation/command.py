"""``verl-dft evaluate model=PATH benchmark=NAME n=16``: models and benchmarks, one after the other."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from verl_dft.config import blamed, compose, split_config_name
from verl_dft.errors import InputError

if TYPE_CHECKING:
    from verl_dft.sampling.shared import EngineHost


def main(argv: Sequence[str], host: "EngineHost | None" = None) -> int:
    """Evaluate, print the table and the warnings. Returns the exit code. ``host`` as in :func:`evaluate_all`."""
    results = evaluate_all(compose_benchmarks(argv), host)
    from verl_dft.evaluation.report import format_table, warnings

    print(format_table(results))
    for line in suite_averages(results):
        print(line)
    for result in results:
        for warning in warnings(result):
            print(f"warning: {result['model']}: {result['benchmark']}: {warning}", file=sys.stderr)
        print(f"written: {result['output_dir']}/result.json, report.md, samples.parquet, samples.html")
    return 0


def suite_averages(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line per model that was evaluated on several benchmarks: the unweighted mean of its avg@n."""
    lines = []
    for model in dict.fromkeys(result["model"] for result in results):
        scores = [result["avg"] for result in results if result["model"] == model]
        if len(scores) > 1:
            lines.append(f"mean of the {len(scores)} benchmarks: {100 * fmean(scores):.1f}  {model}")
    return lines


def compose_evaluate(argv: Sequence[str]) -> DictConfig:
    """:func:`compose_benchmarks` for one benchmark. Raises InputError where a suite gives several."""
    configs = compose_benchmarks(argv)
    if len(configs) > 1:
        raise InputError(f"one benchmark is wanted here, not {', '.join(c.benchmark.name for c in configs)}")
    return configs[0]


@blamed
def compose_benchmarks(argv: Sequence[str]) -> list[DictConfig]:
    """``configs/evaluate.yaml`` with overrides, once for each benchmark that ``benchmark=`` names.

    ``model=A`` and ``model=[A,B]`` set ``models``: ``model`` is a key of our own here, because ``configs/model`` is a
    group, of which Hydra would look for a file. For ``benchmark=`` see :func:`expand_benchmarks`.

    Raises:
        InputError: no model, or what :func:`expand_benchmarks` raises.
    """
    models = [override.partition("=")[2] for override in argv if override.startswith("model=")]
    configs = expand_benchmarks([override for override in argv if not override.startswith("model=")])
    for config in configs:
        if models:
            config.models = parse_models(models[-1])
        if OmegaConf.is_missing(config, "models") or not config.models:
            raise InputError("no model was given; add model=FOLDER, model=HUB_NAME or model=[A,B]")
    return configs


@blamed
def expand_benchmarks(argv: Sequence[str], need_files: bool = True) -> list[DictConfig]:
    """A configuration for each benchmark of a command line, with local files of ``data_dir`` as ``benchmark.path``.

    ``benchmark=NAME`` is a file of ``configs/benchmark/`` or of ``benchmark/`` in ``--config-dir DIR``; one
    with a ``suite`` stands for its members, and so does ``benchmark=[A,B]``. Benchmarks whose licence is not among
    ``licences`` are left out. Other overrides hold for every member.

    Args:
        argv: overrides, ``--config-name`` and ``--config-dir``.
        need_files: whether a benchmark without a file in ``data_dir`` is an error; else its ``path`` stays null.

    Raises:
        InputError: unknown benchmark, one path for several, no file in ``data_dir``, or nothing left.
    """
    found, rest = _split_config_dir(argv)
    config_name, rest = split_config_name(rest, "evaluate")
    rest = [*found, *rest]
    named = [override.partition("=")[2] for override in rest if override.startswith("benchmark=")]
    rest = [override for override in rest if not override.startswith("benchmark=")]
    names = parse_list("benchmark", named[-1]) if named else [None]
    configs = [one for name in names for one in _members(config_name, name, rest)]
    for config in configs:  # it names a folder
        if not isinstance(config.benchmark.name, str) or not re.fullmatch(r"\w[\w.+-]*", config.benchmark.name):
            raise InputError(f"benchmark.name={config.benchmark.name!r} must be letters, digits and . + - _ only")
    configs = list({config.benchmark.name: config for config in configs}.values())
    if len(configs) > 1:
        for key in ("benchmark.path=", "benchmark.name=", "benchmark.hub"):
            if any(override.startswith(key) for override in rest):
                raise InputError(f"{key.rstrip('=')} is given for {len(configs)} benchmarks; use data_dir=FOLDER")
    kept = [config for config in configs if _licensed(config)]
    if not kept:
        have = ", ".join(sorted({repr(config.benchmark.licence) for config in configs}))
        raise InputError(f"licences={list(configs[0].licences)} leaves no benchmark (theirs: {have})")
    for config in kept:
        _set_local_file(config, need_files)
    return kept


def _split_config_dir(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """``--config-dir DIR`` as Hydra's search path, and the rest."""
    folders, rest, items = [], [], iter(argv)
    for item in items:
        if item == "--config-dir" or item.startswith("--config-dir="):
            folder = Path(next(items, "") if item == "--config-dir" else item.partition("=")[2]).expanduser()
            if not (folder / "benchmark").is_dir():
                raise InputError(f"--config-dir {folder} has no folder benchmark/ with NAME.yaml files")
            folders.append(folder.resolve())
        else:
            rest.append(item)
    return ([f"hydra.searchpath=[{','.join(f'file://{f}' for f in folders)}]"] if folders else []), rest


def _members(config_name: str, name: str | None, rest: Sequence[str], above: tuple[str, ...] = ()) -> list[DictConfig]:
    config = compose(config_name, [*([] if name is None else [f"benchmark={name}"]), *rest])
    if not config.benchmark.suite:
        return [config]
    if config.benchmark.name in above:
        raise InputError(f"benchmark suite {config.benchmark.name} contains itself")
    rest = [override for override in rest if not override.startswith("benchmark.suite=")]
    above = (*above, config.benchmark.name)
    return [one for member in config.benchmark.suite for one in _members(config_name, member, rest, above)]


def _licensed(config: DictConfig) -> bool:
    if config.licences is None:
        return True
    if isinstance(config.licences, str):
        config.licences = [config.licences]
    kept = str(config.benchmark.licence).lower() in {str(licence).lower() for licence in config.licences}
    if not kept:
        print(f"left out: {config.benchmark.name} (licence: {config.benchmark.licence})", file=sys.stderr)
    return kept


def _set_local_file(config: DictConfig, needed: bool) -> None:
    """``data_dir`` becomes ``benchmark.path``, so that a result names the file and not where others would be."""
    from verl_dft.evaluation.benchmarks import local_file

    folder, config.data_dir = config.data_dir, None
    if not folder or config.benchmark.path or config.benchmark.generator:
        return
    path = local_file(config.benchmark, folder)
    if path is None and needed:
        stem = config.benchmark.file or config.benchmark.name
        raise InputError(f"data_dir={folder} has no {stem}.jsonl, {stem}.jsonl.gz or {stem}.parquet")
    config.benchmark.path = path and str(path)


def parse_models(text: str) -> list[str]:
    """``A`` or ``[A,B]`` as a list. Raises InputError for an empty name or one given twice."""
    return parse_list("model", text)


def parse_list(key: str, text: str) -> list[str]:
    """The value of ``key=A`` or ``key=[A,B]`` as a list. Raises InputError for an empty name or one given twice."""
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    names = [name.strip().strip("'\"") for name in (inner.split(",") if inner != text else [text])]
    if not all(names) or len(set(names)) != len(names):
        raise InputError(f"{key}={text}: give one {key}, or different ones as {key}=[A,B]")
    return names


def evaluate_all(configs: DictConfig | Sequence[DictConfig], host: "EngineHost | None" = None) -> list[dict[str, Any]]:
    """Evaluate every model of ``models`` on every benchmark, a result folder each, on one engine where that can be.

    With several models ``output_dir`` gets a folder for each, with several benchmarks one for each within it.

    Args:
        host: an engine that outlives this call, for a caller that evaluates again.

    Raises:
        InputError: before any work starts where two results would share a folder, or a model or one of several
            benchmarks cannot be loaded.
    """
    from verl_dft.evaluation.benchmarks import load_benchmark
    from verl_dft.evaluation.run import evaluate, longest_sample
    from verl_dft.sampling.shared import EngineHost

    configs = [configs] if isinstance(configs, DictConfig) else list(configs)
    each = single_evaluations(configs)
    if len(configs) > 1:
        for config in configs:  # a file missing from the last one should not be found out hours later
            load_benchmark(OmegaConf.to_container(config.benchmark, resolve=True), config.limit)
    if host is not None:
        return [evaluate(one, _source(host, one)) for one in each]
    if len(each) == 1:
        return [evaluate(each[0])]
    with EngineHost(max(map(longest_sample, each))) as own:
        return [evaluate(one, _source(own, one)) for one in each]


def _source(host: Any, config: DictConfig) -> Any:
    """What opens the engine that an evaluation shares with others."""
    engine: Any = OmegaConf.to_container(config.engine, resolve=True)
    given = engine.pop("max_model_len")
    options = {"seed": config.seed, **engine}
    return lambda needed: host.open(config.models[0], options, given or needed, config.num_replicas)


def single_evaluations(configs: Sequence[DictConfig]) -> list[DictConfig]:
    """A configuration with an ``output_dir`` of its own for every pair of a model and a benchmark, models outermost.

    Raises:
        InputError: two results would share a folder, or a model cannot be loaded.
    """
    from verl_dft.evaluation.run import default_output_dir
    from verl_dft.sampling.engine import load_config

    models = [configs[0].models] if isinstance(configs[0].models, str) else list(configs[0].models)
    each = []
    for model in models:
        load_config(model, configs[0].engine.trust_remote_code)
        for config in configs:
            one = config.copy()
            one.models = [model]
            if config.output_dir is None:
                one.output_dir = default_output_dir(model, config.benchmark.name)
            else:
                parts = [Path(default_output_dir(model, "x")).parts[-2]] if len(models) > 1 else []
                parts += [config.benchmark.name] if len(configs) > 1 else []
                one.output_dir = str(Path(config.output_dir, *parts))
            each.append(one)
    folders = [one.output_dir for one in each]
    if len(set(folders)) != len(folders):
        raise InputError(
            f"two of the models would be written to {max(folders, key=folders.count)}; evaluate them apart"
        )
    return each
