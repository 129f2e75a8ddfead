"""The trainers that ``bench_training.py`` compares, one process each, which runs steps when it is told to.

``python bench_training_peers.py NAME SPEC.json`` builds the trainer and starts its own loop over steps. The loop asks
the sampler for its next batch; there it waits for a line on stdin: ``N`` for N further steps, nothing for the end. So
a block's time is all that the trainer does from one batch to the next, logging included. Answers are lines on stdout.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

_ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the trainers print goes to the log


class Finished(BaseException):
    """No more steps are asked for."""


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Token ids [T] of prompt and response with the number of prompt tokens, as the parent encoded them."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.rows = json.loads(Path(spec["rows"]).read_text())
        self.lengths = torch.tensor([len(row["ids"]) for row in self.rows]).numpy()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor(self.rows[index]["ids"])
        trained = torch.arange(len(ids)) >= self.rows[index]["prompt"]
        return {"input_ids": ids, "position_ids": torch.arange(len(ids)), "loss_mask": trained.long()}


class Paced(Sampler[list[int]]):
    """Row indices of each forward pass (or step, where the trainer cuts it itself); waits before each block of steps.

    Args:
        steps: row indices of each step, used in turn, over and over.
        size: rows handed out at a time, which divides a step's; None for all of a step's.
        arrange: a step's rows in the trainer's own order.
    """

    def __init__(
        self, steps: list[list[int]], size: int | None = None, arrange: Callable[[list[int]], list[int]] = list
    ) -> None:
        self.steps, self.size, self.arrange, self.losses, self.left = steps, size, arrange, [], 0
        self.done = 0

    def __len__(self) -> int:
        return 10**6

    def set_epoch(self, epoch: int) -> None:
        """Asked for by verl's loop; the steps are given."""

    start_at = set_epoch

    def __iter__(self) -> Iterator[list[int]]:
        self.wait()
        while True:
            rows = self.arrange(self.steps[self.done % len(self.steps)])
            for start in range(0, len(rows), self.size or len(rows)):
                yield rows[start : start + (self.size or len(rows))]
            self.done += 1
            self.left -= 1
            if self.left == 0:
                self.answer()
                self.wait()

    def wait(self) -> None:
        """Read how many steps to do, and start the clocks."""
        line = sys.stdin.readline().strip()
        if not line:
            raise Finished
        self.left, self.losses = int(line), []
        reset_peak()
        self.begun, self.cpu = time.perf_counter(), cpu_seconds()

    def answer(self) -> None:
        """Send what the block took."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - self.begun, cpu_seconds() - self.cpu
        send(seconds=seconds, cpu=cpu, peak=peak_gb(), losses=self.losses)


def send(**facts: Any) -> None:
    """One line to the parent."""
    print(json.dumps(facts), file=_ANSWERS, flush=True)


def cpu_seconds() -> float:
    """User and system time of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def reset_peak() -> None:
    """Forget the peak so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb() -> float:
    """Peak since then: allocated on CUDA, resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def verl_trainer(spec: dict[str, Any], ours: bool, head: str = "auto") -> None:
    """verl's loop with our objective, loss path and row order, or as it comes, packed."""
    from functools import partial

    import numpy as np
    from verl.trainer import sft_trainer
    from verl.utils import tensordict_utils as tu
    from verl.workers.engine_workers import TrainingWorker

    from verl_dft.training import setup, sft
    from verl_dft.training.configure import compose_training

    config = compose_training(
        [
            *("objective=dft", f"model={spec['model']}", "data=files", f"output_dir={spec['output']}/{os.getpid()}"),
            *(f"precision={spec['precision']}", f"data.train_batch_size={len(spec['steps'][0])}"),
            *(f"data.micro_batch_size_per_gpu={spec['micro']}", f"data.max_length={spec['max_length']}"),
            *("data.use_dynamic_bsz=false", "data.num_workers=0", "optim.lr=0", "trainer.logger=[]"),
            *("trainer.test_freq=-1", "trainer.save_freq=-1", "trainer.total_training_steps=1000000"),
            *(f"trainer.log_prob_head={head}", f"trainer.device={spec['device']}"),
            *(f"model.enable_gradient_checkpointing={spec['checkpointing']}", *spec["overrides"]),
        ]
    )
    Path(config.output_dir).mkdir(parents=True)
    rows = Rows(spec)
    if not ours:
        config.model.use_remove_padding = True
    elif config.model.use_remove_padding == "auto":
        config.model.use_remove_padding = setup._packs(config, rows)

    def paced_loader(trainer: Any, arrange: Callable[[list[int]], list[int]]) -> None:
        trainer.train_sampler = trainer.paced = Paced(spec["steps"], arrange=arrange)
        trainer.train_dataloader = DataLoader(rows, batch_sampler=trainer.paced, collate_fn=trainer.collate_fn)
        trainer.val_dataloader = None

    class OurTrainer(sft.ObjectiveSFTTrainer):
        def _build_dataset(self) -> None:
            self.train_dataset, self.val_dataset = rows, None

        def build_loaders(self, dp_size: int, dp_rank: int | None) -> None:
            super().build_loaders(dp_size, dp_rank)
            sampler = self.train_sampler
            paced_loader(self, lambda step: sampler._shares(np.array(step))[0])

        def set_run_length(self) -> None:
            """Until the parent has enough."""

    class StockTrainer(sft_trainer.SFTTrainer):
        def _build_dataset(self) -> None:
            self.train_dataset, self.val_dataset = rows, None

        def _build_dataloader(self) -> None:
            super()._build_dataloader()
            paced_loader(self, list)

    sft.init_distributed()
    trainer = (OurTrainer if ours else StockTrainer)(config)
    worker = trainer.training_client
    train = type(worker).train_batch if ours else TrainingWorker.train_batch

    def recorded(data: Any) -> Any:
        output = train(worker, data)
        metrics = tu.get(output, "metrics")
        loss = {"dft": metrics["loss"], "nll": metrics["train/nll"]} if ours else {"nll": metrics["loss"]}
        trainer.paced.losses.append(loss)
        return output

    worker.train_batch = partial(recorded)
    send(ready=True, packed=bool(config.model.use_remove_padding))
    trainer.fit()


def trl_trainer(spec: dict[str, Any]) -> None:
    """TRL's ``SFTTrainer(loss_type="dft")`` with its defaults, but for what all trainers here have in common."""
    import numpy as np
    import trl.import_utils as trl_checks

    find = trl_checks._is_package_available  # transformers 5 answers a pair, which TRL 0.27 takes for yes
    trl_checks._is_package_available = lambda name, return_version=False: (
        find(name, return_version=True) if return_version else bool(np.atleast_1d(find(name))[0])
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    on_cpu = spec["device"] == "cpu"
    per_step = len(spec["steps"][0])
    paced = Paced(spec["steps"], size=spec["micro"])
    rows = [{"input_ids": row["ids"], "completion_mask": [int(t >= row["prompt"]) for t in range(len(row["ids"]))]}
            for row in Rows(spec).rows]  # fmt: skip
    settings = {
        "loss_type": "dft", "per_device_train_batch_size": spec["micro"], "max_length": spec["max_length"],
        "gradient_accumulation_steps": per_step // spec["micro"], "learning_rate": 0.0, "max_steps": 10**6,
        "adam_beta2": 0.95, "weight_decay": 0.01, "completion_only_loss": True, "bf16": spec["precision"] == "bf16",
        "gradient_checkpointing": spec["checkpointing"], "use_cpu": on_cpu, "dataloader_pin_memory": not on_cpu,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True}, "output_dir": f"{spec['output']}/trl", **spec["trl"],
    }  # fmt: skip

    class Trainer(SFTTrainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(self.train_dataset, batch_sampler=paced, collate_fn=self.data_collator)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs:
                paced.losses.append({"dft": logs["loss"]})
            super().log(logs, start_time)

    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    trainer = Trainer(model, SFTConfig(**settings), train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    send(ready=True, packed=bool(trainer.padding_free))
    trainer.train()


def bare_loop(spec: dict[str, Any], head: str) -> None:
    """Our loss from padded input in a plain torch loop: needs torch and transformers only, neither verl nor Ray."""
    from transformers import AutoModelForCausalLM

    from verl_dft.training.linear_logp import linear_logp
    from verl_dft.training.logprob import token_logp

    device, dtype = spec["device"], torch.bfloat16 if spec["precision"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32, attn_implementation="sdpa")
    model.to(device).train()
    if spec["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    rows, head_layer = Rows(spec), model.get_output_embeddings()
    by_length = Paced(spec["steps"], arrange=lambda step: sorted(step, key=lambda row: -rows.lengths[row]))
    send(ready=True, packed=False)
    for step in by_length:
        sums = torch.zeros(2, device=device)
        trained = sum(len(rows.rows[row]["ids"]) - rows.rows[row]["prompt"] for row in step)
        for start in range(0, len(step), spec["micro"]):
            batch = [rows[row] for row in step[start : start + spec["micro"]]]
            pad = torch.nn.utils.rnn.pad_sequence
            ids = pad([row["input_ids"] for row in batch], batch_first=True).to(device)
            mask = pad([row["loss_mask"][1:] for row in batch], batch_first=True).bool().flatten().to(device)
            real = pad([torch.ones_like(row["input_ids"]) for row in batch], batch_first=True).to(device)
            labels = ids[:, 1:].flatten()
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                hidden = model.model(ids, attention_mask=real, use_cache=False)[0][:, :-1]
                if head == "logits":
                    logp = token_logp(head_layer(hidden).flatten(0, 1), labels, mask)[0][mask]
                else:
                    flat = hidden.flatten(0, 1)[mask]
                    logp = linear_logp(flat, head_layer.weight, head_layer.bias, labels[mask])[0]
            loss = -(logp.detach().exp() * logp).sum() / trained
            loss.backward()
            sums += torch.stack([loss.detach(), -logp.detach().sum() / trained])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        by_length.losses.append(dict(zip(("dft", "nll"), sums.tolist(), strict=True)))


PEERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "dft": lambda spec: verl_trainer(spec, ours=True),
    "dft-logits": lambda spec: verl_trainer(spec, ours=True, head="logits"),
    "verl": lambda spec: verl_trainer(spec, ours=False),
    "trl": trl_trainer,
    "bare": lambda spec: bare_loop(spec, "chunked"),
    "bare-logits": lambda spec: bare_loop(spec, "logits"),
}


if __name__ == "__main__":
    try:
        PEERS[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
    except Finished:
        sys.stdout.flush()
        os._exit(0)  # threads and process groups of the trainers need no farewell
