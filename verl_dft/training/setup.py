"""Everything before the model is loaded: the output directory, the rows, the tokenised cache.

Run by the command before it launches ranks, and again by each rank, which then finds the work done. Whatever is wrong
with the input is an :class:`InputError` here.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from verl_dft.data.dataset import RowDataset, load_dataset
from verl_dft.data.prepare import prepare_rows
from verl_dft.data.selection import has_column, present_columns
from verl_dft.errors import InputError
from verl_dft.files import atomic_write, is_leftover, write_json
from verl_dft.redact import redacted_values
from verl_dft.training.configure import ROW_FIELDS, compose_training, objective_of, remarks, world_size
from verl_dft.training.evaluate_during import add_plan
from verl_dft.training.packing import faster_packed
from verl_dft.training.preflight import check_requirements
from verl_dft.training.resume import resume_point

# may differ between a run and its continuation
_FREE_KEYS = ("trainer.logger", "trainer.save_freq", "trainer.test_freq", "trainer.max_ckpt_to_keep",
              "trainer.resume_mode", "trainer.eval_every", "trainer.eval_before_train", "trainer.eval_failure",
              "trainer.keep_eval_models", "eval", "data.num_workers", "data.num_proc", "data.cache_dir",
              "ray_init")  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Tokenised rows of a run."""

    train: RowDataset
    val: RowDataset | None

    def keys(self) -> dict[str, str | None]:
        """What the tensors were made from: a hash of files, tokenizer and settings each."""
        return {"train": self.train.folder.name, "val": self.val.folder.name if self.val else None}


def prepare_run(argv: Sequence[str]) -> DictConfig:
    """Compose, claim the output directory, make and tokenise rows. Returns the configuration to train with."""
    config = compose_training(argv)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / ".setup.lock"):  # ranks started by hand prepare one after the other
        check_output(config, output)
        checkpoint = _check_resume(config)
        as_given = as_recorded(config)
        add_plan(config)
        prepared = prepare_rows(config.data, output / "data")
        config.data.train_files = [str(path) for path in prepared.train]
        config.data.val_files = [str(path) for path in prepared.val] or None
        _check_validation(config)
        tokenizer = tokenizer_of(config.model)
        check_requirements(config, tokenizer, checkpoint)
        rows = load_rows(config, tokenizer)
        check_same_rows(rows.keys(), output)
        if config.model.use_remove_padding == "auto":
            config.model.use_remove_padding = _packs(config, rows.train)
        if os.environ.get("RANK", "0") == "0":
            with atomic_write(output / "config.yaml") as file:  # the input was good: the directory is this run's now
                file.write(as_given)
            write_json(output / "data" / "rows.json", rows.keys())
            report = {"train": rows.train.report, "val": rows.val.report if rows.val else None}
            write_json(output / "data" / "report.json", report)
            _print_report(report)
            for remark in remarks(config):
                print(f"warning: {remark}", file=sys.stderr, flush=True)
    return config


def as_recorded(config: DictConfig) -> str:
    """The text of ``config.yaml``: every value, without secrets."""
    return OmegaConf.to_yaml(_recorded(config))


def _recorded(config: DictConfig) -> DictConfig:
    return OmegaConf.create(redacted_values(OmegaConf.to_container(config, resolve=True)))


def check_output(config: DictConfig, output: Path, free: Sequence[str] = ()) -> None:
    """Raise :class:`InputError` if ``output`` holds something else than this run or the remains of a failed start.

    Args:
        free: keys that may differ from those of the run, besides those that always may.
    """
    path = output / "config.yaml"
    if path.is_file() and _has_begun(output):
        mine, theirs = (_fingerprint(_recorded(c), free) for c in (config, OmegaConf.load(path)))
        differing = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
        if differing:
            shown = "; ".join(f"{key}: {theirs.get(key)} there, {mine.get(key)} here" for key in differing[:5])
            more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise InputError(
                f"output_dir={output} holds a run with another configuration ({shown}{more}); choose another "
                "output_dir, or delete that one"
            )
        return
    ours = {
        ".setup.lock",
        ".run.lock",  # this and the next of verl-dft rl
        "run.log",
        "config.yaml",
        "tensorboard",
        "wandb",
        *(["data"] if any((output / "data" / name).exists() for name in (".prepare.lock", "prompts.json")) else []),
    }
    strangers = sorted(e.name for e in output.iterdir() if e.name not in ours and not is_leftover(e))
    if strangers:
        raise InputError(f"output_dir={output} is not empty and holds no run ({strangers[0]}, …); choose another")


def _has_begun(output: Path) -> bool:
    """Whether ``output`` holds results that belong to one configuration."""
    results = [output / "metrics.jsonl", output / "checkpoints", *(output / "data").glob("ref_logp-*.npy")]
    return any(path.exists() for path in results)


def _check_resume(config: DictConfig) -> Path | None:
    """The checkpoint to go on from. Raises :class:`InputError` where it is missing or has other ranks."""
    trainer = config.trainer
    point = resume_point(
        trainer.default_local_dir, mode=trainer.resume_mode, given=trainer.resume_from_path,
        world_size=world_size(config),
    )  # fmt: skip
    return point.path if point else None


def check_same_rows(keys: Mapping[str, str | None], output: Path) -> None:
    """A run that has begun goes on with the rows it began with, or not at all."""
    path = output / "data" / "rows.json"
    if _has_begun(output) and path.is_file() and json.loads(path.read_text()) != keys:
        raise InputError(
            f"the rows or the tokenizer have changed since the run in output_dir={output} began; restore them, or "
            "choose another output_dir"
        )


def _fingerprint(config: Any, also_free: Sequence[str] = ()) -> dict[str, Any]:
    """Flat key -> value of what decides a run's result."""
    flat: dict[str, Any] = {}

    def visit(node: Any, prefix: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                visit(value, f"{prefix}.{key}" if prefix else str(key))
        else:
            flat[prefix] = node

    visit(OmegaConf.to_container(config, resolve=True), "")
    free = (*_FREE_KEYS, *also_free, "output_dir", "trainer.default_local_dir", "trainer.experiment_name")
    return {k: v for k, v in flat.items() if not any(k == key or k.startswith(f"{key}.") for key in free)}


def tokenizer_of(model: DictConfig) -> Any:
    """The tokenizer of verl's model configuration, as verl would load it."""
    from transformers import AutoTokenizer

    source = model.get("tokenizer_path") or model.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"model.path={source}: no tokenizer could be loaded ({reason})") from None
    if model.get("custom_chat_template"):
        tokenizer.chat_template = model.custom_chat_template
    return tokenizer


def load_rows(config: DictConfig, tokenizer: Any) -> Rows:
    """The run's training and validation rows, tokenised (from the cache where it has them)."""
    data = config.data
    objective = objective_of(config)
    required = objective.requires & set(ROW_FIELDS)
    if "ref_logp" in objective.requires and has_column(
        data.train_files, "ref_logp", data.train_max_samples, data.origins
    ):
        if config.reference.path:
            raise InputError(
                f"{data.train_files[0]}: the rows have reference log-probs of their own (column ref_logp), and "
                f"reference.path={config.reference.path} is set; drop the column or the key"
            )
        required |= {"ref_logp"}  # else the trainer scores the rows before its first step
    cache = Path(data.cache_dir or os.environ.get("VERL_DFT_CACHE", "~/.cache/verl_dft")).expanduser()

    def load(files: Sequence[str], max_rows: int, columns: Sequence[str]) -> RowDataset:
        return load_dataset(
            files,
            tokenizer,
            max_length=data.max_length,
            overlong=data.overlong,
            columns=columns,
            max_rows=max_rows if max_rows > 0 else None,
            origins=data.origins,
            cache_dir=cache,
            num_proc=data.num_proc,
        )

    train = load(data.train_files, data.train_max_samples, sorted(required))
    if len(train) < data.train_batch_size:
        raise InputError(
            f"{len(train)} training rows do not fill one batch of data.train_batch_size={data.train_batch_size}; "
            "use a smaller batch or more rows"
        )
    if data.keep_groups:
        _check_groups(train, data)
    if not data.val_files:
        return Rows(train, None)
    needed = required - {"origin"}
    has_columns = not needed or needed <= present_columns(data.val_files)
    return Rows(train, load(data.val_files, data.val_max_samples, sorted(required) if has_columns else ()))


def _check_groups(train: RowDataset, data: DictConfig) -> None:
    from verl_dft.training.batches import group_members  # imports verl

    usable = group_members(train.groups, data.mini_batch_size or data.train_batch_size).size
    if usable < data.train_batch_size:
        raise InputError(
            f"{usable} of {len(train)} rows are of whole groups (rows over data.max_length are dropped), too few "
            f"for a batch of data.train_batch_size={data.train_batch_size}; raise data.max_length, lower the batch "
            "size, or set data.overlong=truncate"
        )


def _check_validation(config: DictConfig) -> None:
    freq = config.trainer.test_freq
    if not config.data.val_files and freq != -1:
        raise InputError(f"trainer.test_freq={freq} needs validation rows: set data.val_files or data.source.num_val")


def _packs(config: DictConfig, rows: RowDataset) -> bool:
    from transformers import AutoConfig

    model = AutoConfig.from_pretrained(config.model.path, trust_remote_code=config.model.trust_remote_code)
    lengths = rows.lengths[: config.data.train_batch_size]
    return faster_packed(lengths, config.data.micro_batch_size_per_gpu, model)


def _print_report(report: dict[str, Any]) -> None:
    for name, counts in report.items():
        if counts:
            text = ", ".join(f"{key} {value}" for key, value in counts.items() if isinstance(value, int) and value)
            print(f"{name} rows: {text}", file=sys.stderr, flush=True)
