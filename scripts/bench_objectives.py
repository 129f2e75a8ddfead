"""Time and peak memory of a training step with each objective, against verl's own SFT loss on the same batches.

    python scripts/bench_objectives.py MODEL_FOLDER ROWS.parquet [key=value …] [--pairs 9] [--objectives dft gft]

Each objective has a process of its own, with one engine in it. There a step with the objective and a step with verl's
``sft_loss`` (through verl's own worker) follow each other in pairs, so both see the same machine at the same time; the
ratio of each pair counts. "loss path" is forward and backward from fixed logits alone. Rows get made-up advantages and
log-probs where an objective asks for them. A goal inside the interval of the median is called undecided.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOALS = {
    "sft": 1.0,
    "dft": 1.02,
    "gft": 1.02,
    "is_sft": 1.02,
    "iw_sft": 1.02,
    "psft": 1.4,
    "asft": 1.7,
    "asft-k3": 1.05,
}
OPTIONS = {
    "is_sft": ["objective.behavior=all"],
    "psft": ["data.mini_batch_size={half}"],
    "asft-k3": ["objective.kl=k3"],
}
NAMES = [*GOALS, "chord", "focal", "eaft", "luffy", "chord_mix"]


def every_column(rows: Path, model: str, folder: Path) -> Path:
    """The rows with stored ids and made-up columns, as builders would write them."""
    from transformers import AutoTokenizer

    from verl_dft.data.records import Row, read_rows, write_rows

    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = np.random.default_rng(0)
    made = []
    for index, record in enumerate(read_rows(rows).to_pylist()):
        *prompt, answer = record["messages"]
        ids = tokenizer(answer["content"], add_special_tokens=False)["input_ids"]
        fields = {"response_ids": ids, "advantage": float(rng.normal())}
        logp = (-rng.exponential(0.5, len(ids))).tolist()
        made.append(Row(prompt, str(index), "self", ref_logp=logp, behavior_logp=logp, **fields))
    path = folder / "rows.parquet"
    write_rows(path, made)
    return path


def peak_memory(run: Callable[[], Any]) -> float:
    """Peak memory in GB while ``run`` runs: allocated on an accelerator, resident on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**30
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
    run()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of a call, the accelerator's work included."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_steps(argv: list[str], pairs: int) -> dict[str, Any]:
    """Ratios of whole steps, one per pair, and both peaks."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import sft_loss

    from verl_dft.training import sft
    from verl_dft.training.reference_scores import forward_settings
    from verl_dft.training.setup import prepare_run

    config = prepare_run(argv)
    sft.init_distributed()
    trainer = sft.ObjectiveSFTTrainer(config)
    worker, ours = trainer.training_client, trainer.training_client.loss_fn
    loader = iter(trainer.train_dataloader)
    settings = {**forward_settings(trainer), "update_lr_scheduler": False}

    def batch() -> Any:
        nonlocal loader
        rows = next(loader, None)
        if rows is None:
            loader = iter(trainer.train_dataloader)
            rows = next(loader)
        return rows

    def step(rows: Any, with_ours: bool) -> None:
        data = tu.get_tensordict(dict(rows), dict(settings))
        if with_ours:
            worker.loss_fn = ours
            worker.train_batch(data)
        else:
            worker.loss_fn = partial(sft_loss, config=None)
            TrainingWorker.train_batch(worker, data)

    first = batch()
    step(first, True), step(first, False)  # warm up
    peaks = {name: peak_memory(lambda name=name: step(first, name == "ours")) for name in ("ours", "verl")}
    ratios, base = [], []
    for pair in range(pairs):
        rows, times = batch(), {}
        for with_ours in (True, False) if pair % 2 else (False, True):
            times[with_ours] = seconds(lambda rows=rows, with_ours=with_ours: step(rows, with_ours))
        ratios.append(times[True] / times[False])
        base.append(times[False])
    return {"ratios": ratios, "step_s": statistics.median(base), "peaks": peaks}


def measure_loss(argv: list[str], pairs: int, tokens: int) -> list[float]:
    """Ratios of forward and backward from fixed logits of ``tokens`` positions, one per pair."""
    from transformers import AutoConfig
    from verl.utils import tensordict_utils as tu
    from verl.utils.torch_functional import logprobs_from_logits
    from verl.workers.utils.losses import sft_loss

    from verl_dft.training.bridge import LossBridge
    from verl_dft.training.configure import compose_training, objective_of

    config = compose_training(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    vocabulary = AutoConfig.from_pretrained(config.model.path).vocab_size
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, vocabulary, generator=generator).to(device, dtype)
    reference = torch.randn(tokens, vocabulary, generator=generator).to(device, dtype)
    lengths = [tokens // 4] * 4

    def nested(values: torch.Tensor) -> torch.Tensor:
        return torch.nested.as_nested_tensor(list(values.to(device).split(lengths)), layout=torch.jagged)

    position = torch.arange(sum(lengths)) % lengths[0]
    columns = {"input_ids": nested(torch.randint(vocabulary, (sum(lengths),), generator=generator)),
               "loss_mask": nested((position > 0.3 * lengths[0]).long())}  # fmt: skip
    for name in ("ref_logp", "behavior_logp", "old_logp", "ema_logp"):
        columns[name] = nested(-torch.rand(sum(lengths), generator=generator))
    for name in ("advantage", "origin"):
        columns[name] = torch.nested.as_nested_tensor([torch.ones(1, device=device)] * 4, layout=torch.jagged)
    trained = int(columns["loss_mask"].values().sum())
    facts = {"dp_size": 1, "batch_num_tokens": trained, "batch_num_seqs": 4, "sp_size": 1}
    data = tu.get_tensordict(columns, facts)
    logits, reference = logits[: sum(lengths)], reference[: sum(lengths)]
    labels = torch.roll(data["input_ids"].values(), -1)
    bridge = LossBridge(objective_of(config), config.trainer.reduction)

    def jagged(values: torch.Tensor) -> torch.Tensor:
        return torch.nested.nested_tensor_from_jagged(values, data["input_ids"].offsets())

    def ours() -> None:
        leaf = logits.detach().requires_grad_()
        if "ref_kl" in bridge.wanted:
            bridge.reference_logits = reference[None]
        output = {name: jagged(value[0]) for name, value in bridge(student_logits=leaf[None], data=data).items()}
        bridge(model_output=output, data=data)[0].backward()

    def verls() -> None:
        leaf = logits.detach().requires_grad_()
        output = {"log_probs": jagged(logprobs_from_logits(leaf * 1.0, labels))}
        sft_loss(None, output, data)[0].backward()

    ours(), verls()
    ratios = []
    for pair in range(pairs):
        times = {run: seconds(run) for run in ((ours, verls) if pair % 2 else (verls, ours))}
        ratios.append(times[ours] / times[verls])
    return ratios


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median and the interval of order statistics that covers it with at least 90%, where there are enough values."""
    ordered, n = sorted(values), len(values)
    outside, k = 0.5**n, 0
    while k + 1 < n / 2 and 2 * (outside + math.comb(n, k + 1) * 0.5**n) <= 0.1:
        k += 1
        outside += math.comb(n, k) * 0.5**n
    return statistics.median(values), ordered[k], ordered[n - 1 - k]


def verdict(low: float, high: float, goal: float | None) -> str:
    """Whether the goal is met, missed, or within the interval."""
    if goal is None:
        return "-"
    return "met" if high <= goal else "missed" if low > goal else "undecided"


def child(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Measure one objective and print its figures as JSON."""
    result: dict[str, Any] = {"loss": measure_loss(overrides, 2 * arguments.pairs + 1, arguments.tokens)}
    result |= measure_steps(overrides, arguments.pairs)
    print("RESULT " + json.dumps(result), flush=True)


def main() -> None:
    """Run the comparison and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=1024, help="positions of the loss path")
    parser.add_argument("--objectives", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one objective")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.child:
        return child(arguments, overrides)
    print(f"{arguments.pairs} pairs, {arguments.batch} rows a step, {torch.get_num_threads()} threads")
    print("| objective | loss path | full step | goal | full step is | peak memory | verl's step |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        rows = every_column(arguments.rows, arguments.model, Path(temporary))
        for name in arguments.objectives:
            options = [option.format(half=arguments.batch // 2) for option in OPTIONS.get(name, [])]
            command = [
                *(sys.executable, __file__, arguments.model, str(rows), "--child"),
                *("--pairs", str(arguments.pairs), "--tokens", str(arguments.tokens)),
                *(f"objective={name.partition('-')[0]}", f"model={arguments.model}", f"data={rows}", *options),
                *(f"data.train_batch_size={arguments.batch}", f"output_dir={temporary}/{name}", "trainer.logger=[]"),
                *("optim.lr=0", "trainer.test_freq=-1", *overrides),
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
            print(row(name, json.loads(lines[0].removeprefix("RESULT "))), flush=True)


def row(name: str, result: dict[str, Any]) -> str:
    """One line of the table."""
    loss, step = interval(result["loss"]), interval(result["ratios"])
    goal, peaks = GOALS.get(name), result["peaks"]
    cells = [
        name,
        "{:.2f} [{:.2f}, {:.2f}]".format(*loss),
        "{:.3f} [{:.3f}, {:.3f}]".format(*step),
        f"{goal:.2f}" if goal else "-",
        verdict(*step[1:], goal),
        f"{peaks['ours']:.2f} GB, {peaks['ours'] / peaks['verl']:.2f} x verl's",
        f"{result['step_s']:.2f} s",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
