"""What ``verl-dft score`` does before a model is loaded: configuration, rows, output directory."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from verl_dft.config import blamed, compose, require, split_config_name
from verl_dft.data.prepare import prepare_rows
from verl_dft.data.records import PER_TOKEN
from verl_dft.data.sources import load_tokenizer
from verl_dft.errors import InputError
from verl_dft.files import is_leftover, write_json
from verl_dft.sampling.engine_options import load_config
from verl_dft.sampling.fingerprint import model_fingerprint
from verl_dft.training.configure import compose_training, has_accelerator, world_size
from verl_dft.training.packing import faster_packed
from verl_dft.training.preflight import check_requirements
from verl_dft.training.score_rows import KL_COLUMNS, ScoreRows, load_score_rows

_RESULTS = ("rows.parquet", "rows.parquet.manifest.json", "statistics.json", "statistics.json.manifest.json",
            "statistics.md")  # fmt: skip
_OWN = {"score.json", "shards", "data", ".lock", *_RESULTS}
_OF_JOB = ("backend", "kl", "shard_size", "data.max_length", "data.overlong")
_OF_FORWARD = ("precision", "engine.model_dtype", "model.override_config.attn_implementation", "trainer.log_prob_head")
_OF_VLLM = ("precision", "vllm.dtype", "vllm.tensor_parallel_size", "vllm.extra")


@dataclass(frozen=True)
class Job:
    """What is to be scored: the configuration, and the sets of rows by name (``rows``, ``expert``)."""

    config: DictConfig
    sets: dict[str, ScoreRows]
    command: str

    @property
    def output(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def kl_names(self) -> tuple[str, ...]:
        return KL_COLUMNS if self.config.kl else ()


@blamed
def compose_score(argv: Sequence[str]) -> DictConfig:
    """The checked configuration for a command line."""
    os.environ.setdefault("VERL_DFT_HARDWARE", "gpu" if has_accelerator() else "cpu")
    name, overrides = split_config_name(argv, "score")
    # what the trainer must provide decides what is checked; the one objective that needs two models' logits is asft
    first = compose(name, overrides)
    objective = "asft" if first.kl else "sft"
    _check(first)
    config = compose_training([f"--config-name={name}", f"objective={objective}", *overrides])
    if config.backend == "vllm" and world_size(config) > 1:
        raise InputError(
            "backend=vllm runs in one process (without torchrun, trainer.n_gpus_per_node=1); to spread a model over "
            "devices set vllm.tensor_parallel_size"
        )
    return config


def _check(config: DictConfig) -> None:
    require(config, "model.path", "output_dir")
    if config.column not in PER_TOKEN:
        raise InputError(f"column={config.column} is not one of {', '.join(PER_TOKEN)}")
    if config.backend not in ("verl", "vllm"):
        raise InputError(f"backend={config.backend} is not one of verl, vllm")
    if config.kl and config.backend == "vllm":
        raise InputError("kl=true needs both models' logits, which vLLM does not return; use backend=verl")
    if config.kl and not config.reference.path:
        raise InputError("kl=true compares two models; give the second as reference.path=FOLDER")
    if config.reference.path and not config.kl:
        raise InputError("reference.path is the second model of kl=true; to score rows under it, give it as model=")
    if config.launcher != "torchrun":
        raise InputError(f"launcher={config.launcher}: score runs under torchrun; set launcher=torchrun")
    if config.data.origins or config.data.train_max_samples > 0:
        raise InputError("data.origins and data.train_max_samples choose what is trained on; score takes limit=N")
    for key in ("limit", "shard_size"):
        value = config[key]
        if not (value is None and key == "limit") and (not isinstance(value, int) or value < 1):
            raise InputError(f"{key}={value} must be a whole number of at least 1")


def load_job(config: DictConfig, folder: Path, overrides: Sequence[str]) -> Job:
    """Rows made, read, tokenised and selected. ``folder``: for rows that are made from a source."""
    tokenizer = load_tokenizer(config.model.get("tokenizer_path") or config.model.path)
    if config.model.get("custom_chat_template"):
        tokenizer.chat_template = config.model.custom_chat_template
    check_requirements(config, tokenizer, None)
    data = config.data
    cache = Path(data.cache_dir or os.environ.get("VERL_DFT_CACHE", "~/.cache/verl_dft")).expanduser()
    options: dict[str, Any] = {
        "max_length": data.max_length, "overlong": data.overlong, "cache_dir": cache, "num_proc": data.num_proc,
    }  # fmt: skip
    prepared = prepare_rows(data, folder)
    if prepared.val and "RANK" not in os.environ:
        print("the validation rows are not scored; score their file like any other", file=sys.stderr)
    sets = {"rows": load_score_rows(prepared.train, tokenizer, max_rows=config.limit, **options)}
    if config.expert:
        given = [config.expert] if isinstance(config.expert, str) else list(config.expert)
        problems = frozenset(sets["rows"].table["problem_id"].to_pylist())
        sets["expert"] = load_score_rows(given, tokenizer, problems=problems, **options)
    if config.model.use_remove_padding == "auto":
        model = load_config(config.model.path, config.model.trust_remote_code)
        lengths = np.sort(sets["rows"].lengths)[::-1]
        config.model.use_remove_padding = faster_packed(lengths, data.micro_batch_size_per_gpu, model)
    return Job(config, sets, shlex.join(["verl-dft", "score", *overrides]))


@contextmanager
def locked(output: Path) -> Iterator[None]:
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=0):
            yield
    except Timeout:
        raise InputError(
            f"{output} is being written by another process; wait for it, or give another output_dir"
        ) from None


def identity(job: Job) -> dict[str, Any]:
    """What the stored values depend on. Ranks, micro-batches and packing move their last bits, no more: a job may go on
    with others.
    """
    config = job.config

    def model(path: str | None) -> str | None:
        return model_fingerprint(path, load_config(path, config.model.trust_remote_code)) if path else None

    rows = {name: [rows.dataset.folder.name, len(rows), int(rows.lengths.sum())] for name, rows in job.sets.items()}
    found = {"model": model(config.model.path), "reference.path": model(config.reference.path), "rows": rows}
    keys = (*_OF_JOB, *(_OF_VLLM if config.backend == "vllm" else _OF_FORWARD))
    values = OmegaConf.to_container(config, resolve=True)
    found |= {key: reduce(dict.__getitem__, key.split("."), values) for key in keys}
    return json.loads(json.dumps(found, default=str))


def claim(job: Job) -> None:
    """Make the output directory this job's. Raises InputError where it holds something else."""
    output, mine = job.output, identity(job)
    path = output / "score.json"
    strangers = sorted(e.name for e in output.iterdir() if e.name not in _OWN and not is_leftover(e))
    if strangers:
        raise InputError(f"output_dir={output} holds something else ({strangers[0]}, …); choose another")
    own = {(output / name).resolve() for name in _RESULTS}
    for file in (file for rows in job.sets.values() for file in rows.files if file.resolve() in own):
        raise InputError(f"{file} would be replaced by its own scores; choose another output_dir")
    theirs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if theirs is not None and theirs != mine and not job.config.overwrite:
        differing = ", ".join(sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key)))
        raise InputError(
            f"output_dir={output} holds scores of another job (different: {differing}); choose another output_dir, or "
            "set overwrite=true"
        )
    if theirs != mine:
        for name in _RESULTS:
            (output / name).unlink(missing_ok=True)
        shutil.rmtree(output / "shards", ignore_errors=True)
        write_json(path, mine)


def print_plan(job: Job) -> None:
    """What would be scored."""
    for name, rows in job.sets.items():
        print(f"{name}: {', '.join(map(str, rows.files))}")
        for key, count in rows.report.items():
            print(f"  {key:<26}{count:>12}")
        shards = -(-len(rows) // job.config.shard_size)
        print(f"  {'shards':<26}{shards:>12}")
    ranks, devices = world_size(job.config), job.config.vllm.tensor_parallel_size
    how = f"{ranks} rank(s)" if job.config.backend == "verl" else f"{devices} device(s)"
    models = f"{job.config.model.path}" + (f" and {job.config.reference.path}" if job.config.kl else "")
    print(f"model: {models}, backend {job.config.backend}, {how}; nothing was scored (--dry-run)")
