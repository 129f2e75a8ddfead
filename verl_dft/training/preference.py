"""DPO as a baseline, trained by TRL: ``verl-dft train objective=dpo data=pairs.parquet model=FOLDER output_dir=…``.

The configuration has the keys of the other trainings (:mod:`verl_dft.training.preference_config`), and so has the
output directory: it is resumed from ``checkpoints/``, reports to ``metrics.jsonl`` and exports to ``model/``. TRL is
imported by :mod:`verl_dft.training.preference_trainer` only.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from filelock import FileLock
from omegaconf import DictConfig

from verl_dft.config import command_line
from verl_dft.data.pairs import Pairs, load_pairs
from verl_dft.data.sources import load_tokenizer
from verl_dft.data.turns import trained_with
from verl_dft.errors import InputError
from verl_dft.files import atomic_write, write_json, write_manifest
from verl_dft.platform.compat import check_verl_version
from verl_dft.training.launch import run_guarded, run_ranks, torchrun_options
from verl_dft.training.only_one import only_training
from verl_dft.training.preference_config import TRL_VERSION, check_trl, compose_dpo, resume_from
from verl_dft.training.resume import MARKER, checkpoint_path, completed_steps


def main(argv: Sequence[str]) -> int:
    """Train on preference pairs. Returns 0 done, 1 failed ranks.

    Raises:
        InputError: bad input, TRL missing or of another version.
    """
    argv = list(argv)
    config, pairs = prepare(argv)
    with only_training(config.output_dir):
        if config.trainer.n_gpus_per_node > 1 and "RANK" not in os.environ:
            return run_ranks([*torchrun_options(config), "-m", "verl_dft.training.preference", *argv])
        run(config, pairs)
    return 0


def prepare(argv: Sequence[str]) -> tuple[DictConfig, Pairs]:
    """Compose, claim the output directory, read and encode the pairs."""
    check_trl()
    check_verl_version()
    from verl_dft.training.setup import check_output, check_same_rows

    config = compose_dpo(argv)
    data, output = config.data, Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / ".setup.lock"):  # ranks started by hand prepare one after the other
        check_output(config, output)
        resume_from(config)
        pairs = load_pairs(
            data.train_files,
            load_tokenizer(config.model.path),
            max_length=data.max_length,
            overlong=data.overlong,
            num_proc=data.num_proc,
        )
        if len(pairs.pairs) < data.train_batch_size:
            raise InputError(
                f"{len(pairs.pairs)} pairs do not fill one batch of data.train_batch_size={data.train_batch_size}; "
                "use a smaller batch or more pairs"
            )
        keys = {"train": pairs.fingerprint(), "val": None}
        check_same_rows(keys, output)
        if os.environ.get("RANK", "0") == "0":
            _record(config, output, keys, pairs.report)
    return config, pairs


def _record(config: DictConfig, output: Path, keys: dict[str, Any], report: dict[str, int]) -> None:
    """The files of a run that has begun; the empty lock tells ``check_output`` that ``data`` is ours."""
    from verl_dft.training.setup import as_recorded

    with atomic_write(output / "config.yaml") as file:
        file.write(as_recorded(config))
    (output / "data").mkdir(exist_ok=True)
    (output / "data" / ".prepare.lock").touch()
    write_json(output / "data" / "rows.json", keys)
    write_json(output / "data" / "report.json", {"train": report, "val": None})
    print("pairs:", ", ".join(f"{name} {n}" for name, n in report.items() if n), file=sys.stderr, flush=True)


def run(config: DictConfig, pairs: Pairs) -> None:
    """Train on prepared pairs, from the newest whole checkpoint on, and export."""
    import torch

    if config.trainer.device == "cpu":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks of one machine need no other interface
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # with ranks it says cpu:0, which torch.load does not know
    trainer = make_trainer(config, pairs)
    first = trainer.is_world_process_zero()
    total, start = trainer.run.total_training_steps, resume_from(config, thorough=first)
    trainer.run.resume_global_step = start.step if start else 0
    if first:
        _drop_later(Path(config.trainer.default_local_dir), trainer.run.resume_global_step)
        if start:
            print(f"resuming after step {start.step} from {start.path}", flush=True)
    trainer.accelerator.wait_for_everyone()
    if start and start.step >= total:
        trainer._load_from_checkpoint(str(start.path))
        if first:
            print(f"all {total} steps are done already", flush=True)
    else:
        trainer.train(str(start.path) if start else None)
    path = Path(config.output_dir) / "model"
    source = model_source(config)
    trainer.export(path, config.export.dtype, source, trained_with(config.data.train_files, source.tokenizer))
    if first:
        inputs = {f"pairs {i}": file for i, file in enumerate(config.data.train_files)}
        facts = {"objective": "dpo", "model": config.model.path, "steps": total, "trl": TRL_VERSION}
        write_manifest(path, inputs=inputs, command=command_line(), seed=config.trainer.seed, **facts)
        print(f"exported the model to {path}", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _drop_later(folder: Path, step: int) -> None:
    """Whole checkpoints beyond the one resumed from are another history and must not be taken for this run's."""
    for later in completed_steps(folder):
        if later > step:
            (checkpoint_path(folder, later) / MARKER).unlink()


def make_trainer(config: DictConfig, pairs: Pairs) -> Any:
    """The trainer for a configuration; it knows the length of the run."""
    from transformers import set_seed

    from verl_dft.training.batches import StepBatchSampler
    from verl_dft.training.preference_trainer import (
        PairBatches,
        PreferenceTrainer,
        StepEnd,
        TrackedRun,
        dpo_arguments,
    )

    data, trainer = config.data, config.trainer
    sampler = StepBatchSampler(
        np.array([pair.num_tokens for pair in pairs.pairs]),
        data.train_batch_size,
        dp_size=trainer.n_gpus_per_node,
        dp_rank=int(os.environ.get("RANK", "0")),
        seed=trainer.seed,
        balance=True,
    )
    total = trainer.total_training_steps or trainer.total_epochs * len(sampler)
    set_seed(trainer.seed)  # adapters are drawn before TRL would set it
    return PreferenceTrainer(
        load_model(config, config.model.path),
        load_model(config, config.reference.path) if config.reference.path else None,
        pairs.pairs,
        PairBatches(sampler, total, data.micro_batch_size_per_gpu),
        TrackedRun(config, total),
        args=dpo_arguments(config, total),
        processing_class=load_tokenizer(config.model.path),
        callbacks=[StepEnd(trainer.save_freq)],
        peft_config=_lora(config) if config.model.lora_rank else None,
    )


def load_model(config: DictConfig, path: str) -> Any:
    """A model in float32, as the master weights of training are."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            trust_remote_code=config.model.trust_remote_code,
            attn_implementation=config.model.override_config.attn_implementation,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"no model can be loaded from {path!r}: {' '.join(str(error).split())[:200]}") from None


def model_source(config: DictConfig) -> SimpleNamespace:
    """What the export takes from the model that training started from."""
    from transformers import AutoConfig

    path, trust = config.model.path, config.model.trust_remote_code
    tokenizer = load_tokenizer(path)
    return SimpleNamespace(
        hf_config=AutoConfig.from_pretrained(path, trust_remote_code=trust),
        local_path=path,
        trust_remote_code=trust,
        tokenizer=tokenizer,
        get_processor=lambda: tokenizer,
    )


def _lora(config: DictConfig) -> Any:
    from peft import LoraConfig

    model = config.model
    targets = model.target_modules if isinstance(model.target_modules, str) else list(model.target_modules)
    return LoraConfig(r=model.lora_rank, lora_alpha=model.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")


def _rank() -> int:
    """One rank, started by the command or by torchrun."""

    def train() -> None:
        config, pairs = prepare(sys.argv[1:])
        with only_training(config.output_dir):
            run(config, pairs)

    return run_guarded(train)


if __name__ == "__main__":
    sys.exit(_rank())
