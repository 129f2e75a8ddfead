"""``verl-dft demo``: problems, base, SFT and DFT from the same base, avg@n of all three, one page.

Each stage is a command that could be typed by hand; the page shows them. Run again, finished stages are reused and a
killed one is continued (see :mod:`verl_dft.steps`).
"""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_dft.config import compose, split_config_name
from verl_dft.errors import InputError
from verl_dft.paths import recipes_dir
from verl_dft.steps import Step, StepError, StepRunner

METHODS = ("sft", "dft")
BENCHMARK = "arithmetic"


def main(argv: Sequence[str]) -> int:
    """Run the demo. Returns 0 when the page is written, 1 when a stage failed."""
    name, overrides = split_config_name(argv, "demo")
    config = compose(name, overrides)
    scale = check(config)
    root = Path(config.output_dir).resolve()
    steps = plan(config, scale, root)
    at_once = config.at_once or _default_at_once()
    print(f"demo at scale {config.scale}, {at_once} command(s) at a time, in {root}", flush=True)
    runner = StepRunner(root, at_once, {**thread_limits(config.threads), "VERL_DFT_CACHE": str(root / "cache")})
    try:
        records = runner.run(steps)
    except StepError as error:
        print(f"error: {error}\n{runner.tail()}", file=sys.stderr)
        return 1
    from verl_dft.demo_report import write_report

    print(write_report(root, OmegaConf.to_container(config, resolve=True), steps, records), flush=True)
    return 0


def check(config: DictConfig) -> dict[str, int]:
    """The chosen scale's sizes. Raises InputError for values that cannot work."""
    if config.scale not in config.scales:
        raise InputError(f"scale={config.scale} is not one of {', '.join(config.scales)}")
    scale = {str(key): value for key, value in config.scales[config.scale].items()}
    counts = {f"scales.{config.scale}.{key}": value for key, value in scale.items()} | {"threads": config.threads}
    counts |= {"at_once": config.at_once} if config.at_once is not None else {}
    for key, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{key}={value} must be a whole number of at least 1")
    if not isinstance(config.seed, int) or config.seed < 0:
        raise InputError(f"seed={config.seed} must be a whole number of at least 0")
    if config.base not in ("shipped", "make") and not (Path(config.base) / "config.json").is_file():
        raise InputError(f"base={config.base} is not a model folder; use shipped, make, or a folder with a config.json")
    return scale


def plan(config: DictConfig, scale: dict[str, int], root: Path) -> list[Step]:
    """The steps of the demo, evaluation of the base first: it needs nothing and fills the second core."""
    steps = _base_steps(config, root)
    base = {"shipped": recipes_dir() / "tiny" / "base", "make": root / "base" / "model"}.get(config.base)
    base = base or Path(config.base).resolve()
    needs = tuple(step.name for step in steps)
    inputs = () if steps else (base / "model.safetensors", base / "tokenizer.json")
    problems = _problems(scale, root)
    trainings = [_training(method, base, config, scale, root, ("problems", *needs), inputs) for method in METHODS]
    evaluations = [_evaluation("base", base, config, scale, root, needs, inputs)]
    evaluations += [
        _evaluation(method, root / method / "model", config, scale, root, (method,), ()) for method in METHODS
    ]
    return [*steps, problems, trainings[0], evaluations[0], trainings[1], *evaluations[1:]]


def _verb(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "verl_dft.cli", *arguments)


def _problems(scale: dict[str, int], root: Path) -> Step:
    folder = root / "problems"
    options = ["data=arithmetic", f"data.source.num_rows={scale['num_rows']}", f"output_dir={folder}"]
    outputs = tuple(folder / name for name in ("train.parquet", "val.parquet", "problems.jsonl"))
    return Step("problems", _verb("data", "make", *options), folder, outputs)


def _base_steps(config: DictConfig, root: Path) -> list[Step]:
    """Making the base, where that is asked for: a random model, and its pretraining by the recipe."""
    if config.base != "make":
        return []
    untrained, folder = root / "untrained", root / "base"
    init = Step(
        "untrained",
        (sys.executable, "-m", "verl_dft.tiny", "init", str(untrained)),
        untrained,
        (untrained / "model.safetensors", untrained / "tokenizer.json"),
    )
    arguments = ["--config-name", "tiny/base", f"model={untrained}", f"output_dir={folder}", "trainer.save_freq=100"]
    outputs = (folder / "model" / "model.safetensors", folder / "model" / "tokenizer.json")
    train = Step(
        "base", _verb("train", *arguments), folder, outputs, needs=("untrained",), progress=partial(_progress, folder)
    )
    return [init, train]


def _training(
    method: str, base: Path, config: DictConfig, scale: dict[str, int], root: Path, needs: tuple[str, ...],
    inputs: tuple[Path, ...],
) -> Step:  # fmt: skip
    folder, problems = root / method, root / "problems"
    arguments = ["--config-name", "tiny/post", f"objective={method}", f"model={base}", f"output_dir={folder}"]
    arguments += [f"data.train_files={problems / 'train.parquet'}", f"data.val_files={problems / 'val.parquet'}"]
    arguments += [f"data.train_batch_size={scale['batch_size']}", f"trainer.total_training_steps={scale['steps']}"]
    arguments += [f"trainer.seed={config.seed}", f"trainer.save_freq={max(1, scale['steps'] // 4)}"]
    arguments += [f"trainer.test_freq={max(1, scale['steps'] // 4)}", "trainer.logger=[tensorboard]"]
    outputs = (folder / "model" / "model.safetensors", folder / "metrics.jsonl")
    progress = partial(_progress, folder, scale["steps"])
    return Step(method, _verb("train", *arguments), folder, outputs, inputs, needs, progress)


def _evaluation(
    name: str, model: Path, config: DictConfig, scale: dict[str, int], root: Path, needs: tuple[str, ...],
    inputs: tuple[Path, ...],
) -> Step:  # fmt: skip
    folder = root / "evaluation" / name
    arguments = [f"model={model}", f"benchmark={BENCHMARK}", f"n={scale['n']}", f"output_dir={folder}"]
    arguments += [f"benchmark.generator.num_problems={scale['num_problems']}", f"seed={config.seed}"]
    # the base is stored in bf16, the others in float32: all are run in float32
    arguments += ["engine.dtype=float32", f"engine.num_threads={config.threads}"]
    outputs = (folder / "result.json", folder / "samples.parquet")
    return Step(f"evaluate-{name}", _verb("evaluate", *arguments), folder, outputs, inputs, needs)


def _progress(folder: Path, total: int | None = None) -> str:
    """How far a training is, from its metrics file."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            steps = sum(b"train/loss" in line for line in file)
    except OSError:
        return "starting"
    return f"step {steps}/{total}" if total else f"step {steps}"


def thread_limits(threads: int) -> dict[str, str]:
    """Environment that holds a command to ``threads`` threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false"}


def _default_at_once() -> int:
    from verl_dft.training.configure import has_accelerator

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if has_accelerator() else min(2, cores)
