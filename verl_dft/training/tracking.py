"""What a run reports: verl's trackers with plain numbers only, metrics.jsonl, and one progress bar."""

import math
import numbers
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from verl.utils.tracking import Tracking

from verl_dft.training.metrics import METRICS_FILE, MetricsFile


class RunTracker:
    """Stands where verl's ``Tracking`` does in ``fit``: same constructor, same ``log``."""

    def __init__(self, trainer: Any, **kwargs: Any) -> None:
        self.trainer, self.run_name = trainer, trainer.run_name
        folder = Path(trainer.config.output_dir)
        os.environ.setdefault("TENSORBOARD_DIR", str(folder / "tensorboard"))
        os.environ.setdefault("WANDB_DIR", str(folder))
        resume_step = trainer.resume_global_step
        self.file = MetricsFile(folder / METRICS_FILE, resume_step)  # first: a backend may fail to start
        self.tracking = Tracking(**kwargs)
        self.bar = tqdm(
            total=trainer.total_training_steps,
            initial=resume_step,
            desc=self.run_name,
            unit="step",
            file=sys.stderr,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )
        self.started = self.last = time.perf_counter()
        self.latest: dict[str, float] = {}

    def log(self, data: dict[str, Any], step: int) -> None:
        """Send the plain numbers of ``data`` to every backend."""
        if "val/loss" in data:  # verl's mean of batch means; ours is exact and covers every row
            metrics = self.trainer.val_dataloader.metrics
            data = {f"val/{name}": value for name, value in metrics.items()}
            self.last = time.perf_counter()  # the next step's time is its own
        else:
            data = {**self._with_speed(data), "train/updates": step * data.get("train/num_updates", 1)}
        plain = self._send(data, step)
        if "train/loss" in plain and not math.isfinite(plain["train/loss"]):
            print(f"warning: loss is {plain['train/loss']} at step {step}", file=sys.stderr, flush=True)

    def log_evaluation(self, data: dict[str, float], step: int) -> None:
        """Send what an evaluation of the weights after ``step`` gave; its time is no part of the step that follows."""
        self._send(data, step)
        self.last = time.perf_counter()

    def _send(self, data: dict[str, Any], step: int) -> dict[str, float]:
        plain = {
            name: float(value)
            for name, value in data.items()
            if isinstance(value, numbers.Number) and (name != "train/mfu" or value > 0)
        }
        self.latest.update(plain)
        self.tracking.log(data=plain, step=step)
        self.file.log(plain, step)
        return plain

    def _with_speed(self, data: dict[str, Any]) -> dict[str, Any]:
        now = time.perf_counter()
        begun = max(self.last, self.trainer.ckpt_handler.saved_at)  # saving is no part of the step that follows
        seconds, self.last = now - begun, now
        speed = data.get("train/global_tokens", 0) / seconds
        self.bar.set_postfix_str(f"loss {data.get('train/loss', math.nan):.4f}, {speed:,.0f} tok/s", refresh=False)
        self.bar.update(1)
        return {**data, "perf/step_s": seconds, "perf/tokens_per_s": speed}

    def summarize(self) -> None:
        """Close the bar, and say how the training ended."""
        self.bar.close()
        shown = [f"{name} {self.latest[name]:.4f}" for name in ("train/loss", "train/nll", "val/nll", "val/objective")
                 if name in self.latest]  # fmt: skip
        print(f"trained {self.run_name} in {time.perf_counter() - self.started:.1f} s: {', '.join(shown)}", flush=True)

    def finish(self, exit_code: int = 0) -> None:
        """Close the file and verl's trackers."""
        self.file.file.close()
        self.tracking.finish(exit_code)
