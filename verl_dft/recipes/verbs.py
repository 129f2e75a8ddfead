"""What the verbs of ``verl-dft`` make, and how each one's configuration is composed and checked without running it."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from verl_dft.analysis.command import WHATS
from verl_dft.config import compose, require, split_config_name
from verl_dft.errors import InputError
from verl_dft.recipes.load import nearest
from verl_dft.recipes.settings import Settings

FOLDER = "/recipe/output"
"""Stands for the folder of a step while its configuration is checked."""
_FREE = ("seed", "trainer.seed", "optim.lr", "actor_rollout_ref.actor.optim.lr")
"""Numbers that no check looks at: arms that differ in them alone are composed once."""
_FILES: dict[str, dict[str, str]] = {
    "data make": {"train": "train.parquet", "val": "val.parquet", "problems": "problems.jsonl"},
    "sample": {"samples": "samples.parquet", "problems": "problems.jsonl"},
    "reject": {"rft": "rft.parquet", "pairs": "pairs.parquet"},
    "rewrite": {"rows": "rows.parquet", "expert": "expert.parquet", "samples": "samples.parquet"},
    "groups": {"rows": "rows.parquet"},
    "score": {"rows": "rows.parquet", "statistics": "statistics.json"},
    "train": {"model": "model", "metrics": "metrics.jsonl"},
    "rl": {"model": "model", "metrics": "metrics.jsonl"},
    "compare": {"comparison": "compare.json"},
    **{f"analyze {what}": {"table": f"{what}.parquet", "page": f"{what}.md"} for what in WHATS},
}
_ALWAYS: dict[str, tuple[str, ...]] = {
    "data make": ("train.parquet",),
    "sample": ("samples.parquet", "statistics.json"),
    "reject": ("statistics.json",),
    "rewrite": ("rows.parquet", "statistics.json"),
    "groups": ("rows.parquet", "statistics.json"),
    "score": ("rows.parquet", "statistics.json"),
    "train": ("model/config.json", "metrics.jsonl"),
    "rl": ("model/config.json", "metrics.jsonl"),
    "compare": ("compare.json",),
    **{f"analyze {what}": (f"{what}.parquet", f"{what}.md") for what in WHATS},
}
"""Files that a finished step has whatever it was asked for."""


@dataclass(frozen=True)
class Composed:
    """A step's configuration: one, or one for each benchmark of an evaluation."""

    configs: tuple[Any, ...]
    plain: Any
    """The same as plain values, unresolved: what the step's key is made of."""

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the first one, ``default`` where it has none."""
        value = OmegaConf.select(self.configs[0], key, throw_on_missing=False) if self.configs else None
        return default if value is None else value


# ---- checks ----


def check_step(verb: str, arguments: Sequence[str], settings: Settings, where: str) -> Composed:
    """Compose a step's configuration as its verb would.

    Args:
        arguments: of the command, without ``output_dir``.
        where: the recipe and the step, for the error.

    Raises:
        InputError: what the verb refuses.
    """
    from verl_dft.cli import _VERBS

    first = verb.split()[0]
    if first not in _VERBS or first == "recipe" or (first in _WITH_ACTION and verb not in _CHECKS):
        raise InputError(f"{where}: unknown verb {verb!r}{nearest(verb, [*_CHECKS, *_VERBS])}")
    canonical = tuple(_canonical(argument, settings) for argument in arguments)
    try:
        with _hardware(settings):
            return _composed(verb, canonical, settings.hardware)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


_CACHE: dict[tuple[Any, ...], Composed] = {}


def _composed(verb: str, arguments: tuple[str, ...], hardware: str | None) -> Composed:
    identity = (verb, arguments, hardware)
    if identity not in _CACHE:
        check = _CHECKS.get(verb, lambda argv: _general(verb, argv))
        configs = tuple(check([*arguments, f"output_dir={FOLDER}"]))
        plain = [OmegaConf.to_container(config, resolve=False) for config in configs]
        _CACHE[identity] = Composed(configs, plain)
    return _CACHE[identity]


def _canonical(argument: str, settings: Settings) -> str:
    """``argument`` with the parts that no check looks at made the same for all arms."""
    key, separator, value = argument.partition("=")
    if separator and key in _FREE:
        return f"{key}=1"
    several = any(sign in value for sign in "[{")
    return argument.replace(f"{settings.root}/", "/recipe/") if several else _same_folder(argument, settings)


def _same_folder(argument: str, settings: Settings) -> str:
    """``KEY=ROOT/VERB/HASH/FILE`` with the same folder for every step of a verb, and for all its checkpoints."""
    argument = re.sub(r"/global_step_\d+/", "/global_step_1/", argument)
    before, root, after = argument.partition(f"{settings.root}/")
    parts = Path(after).parts
    return "/".join([f"{before}/recipe/{parts[0]}/step", *parts[2:]]) if root and len(parts) > 1 else argument


@contextmanager
def _hardware(settings: Settings) -> Iterator[None]:
    """The environment of the machine that the scale is for, while configurations are composed."""
    names = ("VERL_DFT_HARDWARE", "MASTER_ADDR", "NODE_RANK")
    before = {name: os.environ.get(name) for name in names}
    if settings.hardware:
        os.environ["VERL_DFT_HARDWARE"] = settings.hardware
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # of several machines: told by whoever starts the command
    os.environ.setdefault("NODE_RANK", "0")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _general(verb: str, argv: Sequence[str]) -> list[Any]:
    """A verb without a check of its own: its configuration, where it has one."""
    from verl_dft.paths import configs_dir

    name, overrides = split_config_name([item for item in argv if "=" in item or item.startswith("-")], verb.split()[0])
    if not (configs_dir() / f"{name}.yaml").is_file() and name == verb.split()[0]:
        return []
    return [compose(name, overrides)]


def _data(argv: Sequence[str]) -> list[Any]:
    name, overrides = split_config_name(argv, "data")
    config = compose(name, overrides)
    require(config, "output_dir")
    return [config]


def _sample(argv: Sequence[str]) -> list[Any]:
    from verl_dft.sampling.configure import check_count, compose_sampling, plain, sampling_of

    config = compose_sampling("sample", argv)
    check_count(plain(config))
    sampling_of(plain(config))
    return [config]


def _reject(argv: Sequence[str]) -> list[Any]:
    from verl_dft.build.reject_command import reject_options
    from verl_dft.sampling.configure import plain

    name, overrides = split_config_name(argv, "reject")
    config = compose(name, overrides)
    require(config, "samples", "output_dir")
    reject_options(plain(config))
    return [config]


def _rewrite(argv: Sequence[str]) -> list[Any]:
    from verl_dft.build.rewrite_command import rewrite_options
    from verl_dft.sampling.configure import compose_sampling, plain

    config = compose_sampling("rewrite", argv)
    rewrite_options(plain(config))
    return [config]


def _groups(argv: Sequence[str]) -> list[Any]:
    from verl_dft.build.groups_command import composition_of, expand_composition, group_options
    from verl_dft.sampling.configure import compose_sampling, plain

    config = compose_sampling("groups", expand_composition(argv), need_model=False)
    composition_of(plain(config))
    group_options(plain(config))
    return [config]


def _score(argv: Sequence[str]) -> list[Any]:
    from verl_dft.training.score_setup import compose_score

    return [compose_score(argv)]


def _train(argv: Sequence[str]) -> list[Any]:
    from verl_dft.training import preference_config
    from verl_dft.training.configure import compose_training

    return [preference_config.compose_dpo(argv) if preference_config.wanted(argv) else compose_training(argv)]


def _rl(argv: Sequence[str]) -> list[Any]:
    from verl_dft.training.online.configure import compose_rl

    return [compose_rl(argv)]


def _evaluate(argv: Sequence[str]) -> list[Any]:
    from verl_dft.evaluation.command import expand_benchmarks, parse_models
    from verl_dft.sampling.configure import check_count, check_sampler, plain, sampling_of

    models = [item.partition("=")[2] for item in argv if item.startswith("model=")]
    configs = expand_benchmarks([item for item in argv if not item.startswith("model=")], need_files=False)
    if not models:
        raise InputError("no model was given; add model: …")
    for config in configs:
        config.models = parse_models(models[-1])
        options = plain(config)
        check_count(options)
        check_sampler(options)
        sampling_of(options | {"temperature": 1.0 if options["temperature"] is None else options["temperature"]})
    return configs


def _compare(argv: Sequence[str]) -> list[Any]:
    from verl_dft.evaluation.compare import parse_arguments

    parse_arguments(argv)
    return []


def _analyze(what: str, argv: Sequence[str]) -> list[Any]:
    from verl_dft.analysis.command import compose_analysis

    return [compose_analysis([what, *argv])[1]]


_CHECKS: dict[str, Callable[[Sequence[str]], list[Any]]] = {
    "data make": _data,
    "sample": _sample,
    "reject": _reject,
    "rewrite": _rewrite,
    "groups": _groups,
    "score": _score,
    "train": _train,
    "rl": _rl,
    "evaluate": _evaluate,
    "compare": _compare,
    **{f"analyze {what}": partial(_analyze, what) for what in WHATS},
}
_WITH_ACTION = ("analyze", "data")
"""Verbs of which a step names the action, too."""


# ---- outputs ----


def outputs_of(verb: str, folder: Path, composed: Composed, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a step makes, by the names that other steps use; lists where an evaluation has several results."""
    found: dict[str, Any] = {name: folder / file for name, file in _FILES.get(verb, {}).items()}
    if verb == "evaluate":
        folders = evaluation_folders(folder, composed, values)
        if len(folders) == 1:
            found |= {"result": folder / "result.json", "samples": folder / "samples.parquet"}
        found["results"] = [one / "result.json" for one in folders]
    return {**found, "folder": folder}


def evaluation_folders(folder: Path, composed: Composed, values: Mapping[str, Any]) -> list[Path]:
    """The folder of each result of an evaluation, as ``verl-dft evaluate`` names them."""
    from verl_dft.evaluation.run import default_output_dir

    model = values.get("model")
    models = [str(item) for item in (model if isinstance(model, list) else [model])]
    found = []
    for one in models:
        for config in composed.configs:
            parts = [Path(default_output_dir(one, "x")).parts[-2]] if len(models) > 1 else []
            parts += [config.benchmark.name] if len(composed.configs) > 1 else []
            found.append(Path(folder, *parts))
    return found


def files_of(verb: str, folder: Path, outputs: Mapping[str, Any], used: set[str]) -> tuple[Path, ...]:
    """The files that a finished step must have: what it always writes, and what other steps read of it."""
    found = [folder / name for name in _ALWAYS.get(verb, ())]
    found += outputs.get("results", [])
    for name in used | (set(outputs) - set(_FILES.get(verb, {})) - {"folder", "results", "samples", "result"}):
        paths = outputs[name] if isinstance(outputs[name], list) else [outputs[name]]
        found += [path / "config.json" if name == "model" else path for path in paths if name != "folder"]
    return tuple(dict.fromkeys(found))
