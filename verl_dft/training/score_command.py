"""``verl-dft score``: log-probs of rows, their statistics, and the KL between two models.

``verl-dft score model=FOLDER data=rows.parquet output_dir=runs/scored`` starts torch's launcher itself where
``trainer.n_gpus_per_node`` is above 1; ``torchrun … -m verl_dft.training.score_command …`` does the same by hand.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from verl_dft.errors import InputError
from verl_dft.failpoints import failpoint
from verl_dft.files import atomic_write, scratch_folder, write_json, write_manifest, writing
from verl_dft.platform.compat import check_verl_version
from verl_dft.sampling.engine_options import context_length, load_config
from verl_dft.training import score_statistics as statistics
from verl_dft.training.configure import world_size
from verl_dft.training.launch import run_guarded, run_ranks, torchrun_options
from verl_dft.training.score_rows import scored_table, write_scored
from verl_dft.training.score_setup import Job, claim, compose_score, load_job, locked, print_plan
from verl_dft.training.score_shards import ShardStore, score_missing

_CLAIMED = "VERL_DFT_SCORE_CLAIMED"
"""Set in the environment of ranks that this command started: it has checked the output directory already."""


def main(argv: Sequence[str]) -> int:
    """Score. Returns 0 done, 1 failed ranks.

    Raises:
        InputError: bad input, found here or by a rank.
    """
    check_verl_version()
    argv = list(argv)
    dry_run = "--dry-run" in argv
    overrides = [item for item in argv if item != "--dry-run"]
    config = compose_score(overrides)
    if dry_run:
        with scratch_folder("verl_dft_score") as folder:
            print_plan(load_job(config, folder, overrides))
        return 0
    output, launched = Path(config.output_dir), "RANK" in os.environ
    number = "RANK" if launched else "NODE_RANK" if config.trainer.nnodes > 1 else ""
    claims = os.environ.get(number, "0") == "0" and _CLAIMED not in os.environ  # one process does, of all machines
    with locked(output) if claims else nullcontext():
        job = load_job(config, output / "data", overrides)
        if claims:
            claim(job)
        if not launched and world_size(config) > 1:
            return _launch(config, overrides)
        run_rank(job)
    return 0


def _launch(config: DictConfig, overrides: Sequence[str]) -> int:
    """This machine's ranks, by torch's launcher. Returns their exit code."""
    os.environ[_CLAIMED] = "1"
    try:
        return run_ranks([*torchrun_options(config), "-m", "verl_dft.training.score_command", *overrides])
    finally:
        del os.environ[_CLAIMED]


def run_rank(job: Job) -> None:
    """Score what is missing; the first rank writes the files."""
    scoring = _score_vllm if job.config.backend == "vllm" else _score_verl
    if stores := scoring(job):
        write_results(job, stores)


def _stores(job: Job) -> dict[str, ShardStore]:
    shards, num = job.output / "shards", 1 + len(job.kl_names)
    return {name: ShardStore(shards / name, rows, job.config.shard_size, num) for name, rows in job.sets.items()}


def _score_verl(job: Job) -> dict[str, ShardStore] | None:
    """By verl's engine. Returns the values on the first rank."""
    import torch
    from verl.utils.distributed import destroy_global_process_group

    from verl_dft.training.score import EngineScorer
    from verl_dft.training.sft import init_distributed

    stores = _stores(job)
    init_distributed()
    first = torch.distributed.get_rank() == 0
    try:
        # the first rank's view: another machine may see a file late
        box = [{name: store.missing() for name, store in stores.items()} if first else None]
        torch.distributed.broadcast_object_list(box)
        missing: dict[str, list[int]] = box[0] or {}
        if any(missing.values()):
            score_missing(stores, missing, EngineScorer(job.config), first)
    finally:
        destroy_global_process_group()
    return stores if first else None


def _score_vllm(job: Job) -> dict[str, ShardStore]:
    from verl_dft.sampling.engine import VLLMEngine
    from verl_dft.sampling.prompt_logp import prompt_logp

    config, stores = job.config, _stores(job)
    missing = {name: store.missing() for name, store in stores.items()}
    if not any(missing.values()):
        return stores
    longest = max(int(rows.lengths.max()) for rows in job.sets.values())
    context = context_length(load_config(config.model.path, config.model.trust_remote_code))
    if longest >= context:
        raise InputError(
            f"a row has {longest} tokens, and vLLM scores at most {context - 1} in the model's context of {context}; "
            "use backend=verl, or a lower data.max_length"
        )
    options: dict[str, Any] = dict(OmegaConf.to_container(config.vllm, resolve=True))  # type: ignore[arg-type]
    options["dtype"] = options["dtype"] or {"fp32": "float32", "bf16": "bfloat16"}[config.precision]
    options |= {"max_model_len": longest + 1, "trust_remote_code": config.model.trust_remote_code}
    with VLLMEngine(config.model.path, **options) as engine:

        def score(items: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
            values = prompt_logp(engine, [item["input_ids"].tolist() for item in items])
            return [v[None, -int(item["loss_mask"].sum()) :] for v, item in zip(values, items, strict=True)]

        score_missing(stores, missing, score)
    return stores


def write_results(job: Job, stores: Mapping[str, ShardStore]) -> None:
    """``rows.parquet``, ``statistics.json`` and ``statistics.md``, and what they say on the terminal."""
    output, column = job.output, job.config.column
    files = [(f"{name}_{i}", path) for name, rows in job.sets.items() for i, path in enumerate(rows.files)]
    facts: dict[str, Any] = {"inputs": dict(files), "command": job.command}
    facts["score"] = json.loads((output / "score.json").read_text(encoding="utf-8"))
    failpoint("score.before_rows")
    with writing(output):
        rows, values = job.sets["rows"], stores["rows"].values()
        write_scored(
            output / "rows.parquet", scored_table(rows, column, values), column=column, report=rows.report, **facts
        )
        found = _statistics(job, stores)
        write_json(output / "statistics.json", found)
        write_manifest(output / "statistics.json", **facts)
        text = statistics.markdown(found)
        with atomic_write(output / "statistics.md") as file:
            file.write(text)
    print(text)
    for name, rows in job.sets.items():
        for key in ("rows_dropped_overlong", "rows_truncated"):
            if rows.report[key]:
                limit = f"data.max_length={job.config.data.max_length}"
                print(f"warning: {name}: {key} {rows.report[key]} ({limit})", file=sys.stderr)
    print(f"written: {output}/rows.parquet (column {column}), statistics.md, statistics.json", flush=True)


def _statistics(job: Job, stores: Mapping[str, ShardStore]) -> dict[str, Any]:
    scored = {}
    for name, rows in job.sets.items():
        columns = (rows.table["problem_id"].to_pylist(), rows.table["origin"].to_pylist())
        scored[name] = statistics.summarise(*columns, stores[name].values(), rows.responses, job.kl_names)
    found: dict[str, Any] = {
        "model": job.config.model.path,
        "reference": job.config.reference.path,
        "backend": job.config.backend,
        "rows": job.sets["rows"].report,
        "by_origin": statistics.by_origin(scored["rows"]),
    }
    if "expert" in scored:
        found["expert_rows"] = job.sets["expert"].report
        found["by_stage"] = statistics.by_stage(scored["rows"], scored["expert"])
    found["dropped"] = {name: list(rows.dropped) for name, rows in job.sets.items()}
    return found


def _rank() -> int:
    """One rank of torchrun."""

    def run() -> None:
        main(sys.argv[1:])

    return run_guarded(run)


if __name__ == "__main__":
    sys.exit(_rank())
