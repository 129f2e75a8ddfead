"""``verl-dft evaluate model=PATH benchmark=NAME n=16``: one model, or several one after the other."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_dft.config import compose, split_config_name
from verl_dft.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Evaluate, print the table and the warnings. Returns the exit code."""
    config = compose_evaluate(argv)
    results = evaluate_all(config)
    from verl_dft.evaluation.report import format_table, warnings

    print(format_table(results))
    for result in results:
        for warning in warnings(result):
            print(f"warning: {result['model']}: {warning}", file=sys.stderr)
        print(f"written: {result['output_dir']}/result.json, samples.parquet")
    return 0


def compose_evaluate(argv: Sequence[str]) -> DictConfig:
    """``configs/evaluate.yaml`` with overrides. ``model=A`` and ``model=[A,B]`` set ``models``.

    ``model`` is a key of our own here because ``configs/model`` is a group, of which Hydra would look for a file.
    """
    name, overrides = split_config_name(argv, "evaluate")
    models = [override.partition("=")[2] for override in overrides if override.startswith("model=")]
    rest = [override for override in overrides if not override.startswith("model=")]
    config = compose(name, rest)
    if models:
        config.models = parse_models(models[-1])
    if OmegaConf.is_missing(config, "models") or not config.models:
        raise InputError("no model was given; add model=FOLDER, model=HUB_NAME or model=[A,B]")
    return config


def parse_models(text: str) -> list[str]:
    """``A`` or ``[A,B]`` as a list. Raises InputError for an empty name or one given twice."""
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    models = [name.strip().strip("'\"") for name in (inner.split(",") if inner != text else [text])]
    if not all(models) or len(set(models)) != len(models):
        raise InputError(f"model={text}: give one model, or different ones as model=[A,B]")
    return models


def evaluate_all(config: DictConfig) -> list[dict[str, Any]]:
    """Evaluate every model of ``config.models`` in turn. With several, ``output_dir`` gets a folder for each.

    Raises:
        InputError: before any work starts where two models would share a folder or one cannot be loaded.
    """
    from verl_dft.evaluation.run import default_output_dir, evaluate
    from verl_dft.sampling.engine import load_config

    models = [config.models] if isinstance(config.models, str) else list(config.models)
    each = []
    for model in models:
        load_config(model, config.engine.trust_remote_code)
        one = config.copy()
        one.models = [model]
        one.output_dir = config.output_dir or default_output_dir(model, config.benchmark.name)
        if config.output_dir and len(models) > 1:
            one.output_dir = str(Path(config.output_dir, Path(default_output_dir(model, "x")).parts[-2]))
        each.append(one)
    folders = [one.output_dir for one in each]
    if len(set(folders)) != len(folders):
        raise InputError(
            f"two of the models would be written to {max(folders, key=folders.count)}; evaluate them apart"
        )
    return [evaluate(one) for one in each]
