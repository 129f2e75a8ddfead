"""Accuracy against step: a small benchmark on an export of the weights, in a process of its own, while training waits.

vLLM must not run in a process that belongs to a process group. What is run is ``eval.command``, which
:func:`add_plan` asks the function ``eval.planner`` for: this package knows no benchmarks. The command gets
``model=FOLDER output_dir=FOLDER`` and leaves a ``result.json`` per benchmark.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from verl_dft.errors import InputError
from verl_dft.failpoints import failpoint
from verl_dft.files import is_leftover, missing_files, write_json
from verl_dft.processes import tied
from verl_dft.training.metrics import METRICS_FILE, read_metrics

ON_FAILURE = ("warn", "stop")
"""Values of ``trainer.eval_failure``."""
_POLL_S = 1.0
_PATIENCE_S = 30.0
"""How long a shared file system may take to show the driver what a Ray worker has exported."""
_OF_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "VERL_DFT_LAUNCHED")
RUNNING = "running"


class EvaluationFailed(RuntimeError):
    """An evaluation failed and ``trainer.eval_failure=stop``; the message is one line."""


def add_plan(config: DictConfig) -> None:
    """Set ``eval.command`` and ``eval.benchmarks`` to what ``eval.planner`` answers, where the run evaluates.

    Raises:
        InputError: no such planner, or the planner's own, about a benchmark that cannot be run.
    """
    if not config.trainer.eval_every:
        return
    from hydra.utils import get_method

    try:
        planner = get_method(config.eval.planner)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"eval.planner={config.eval.planner} is no function that can be imported: {reason}") from None
    with open_dict(config.eval):
        config.eval.update(planner(config.eval))


def is_due(trainer: Mapping[str, Any], step: int, last_step: int) -> bool:
    """Whether the weights after ``step`` steps (0: before the first) are evaluated."""
    if not trainer["eval_every"]:
        return False
    return bool(trainer["eval_before_train"]) if step == 0 else step % trainer["eval_every"] == 0 or step == last_step


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what a launcher tells its ranks, which would make a rank of the evaluation too.

    torchrun gives several ranks of a machine one thread each where the user says nothing; the evaluation has the
    machine to itself. A user's own 1 cannot be told from that: ``engine.num_threads`` decides then.
    """
    kept = {name: value for name, value in environment.items() if not name.startswith(_OF_LAUNCHER)}
    if int(environment.get("LOCAL_WORLD_SIZE", "1")) > 1 and kept.get("OMP_NUM_THREADS") == "1":
        del kept["OMP_NUM_THREADS"]
    return kept


class StepEvaluation:
    """One step's evaluation in ``<output_dir>/eval/step_N``; all but the paths is for the first rank alone.

    ``request.json`` says of which weights and by which command the results are that lie beside it.
    """

    def __init__(self, config: DictConfig, step: int) -> None:
        self.folder = Path(config.output_dir) / "eval" / f"step_{step}"
        self.model, self.log = self.folder / "model", self.folder / "evaluate.log"
        self.command, names = list(config.eval.command), list(config.eval.benchmarks)
        # the command makes a folder for each of several benchmarks
        self.results = {name: self.folder / (name if len(names) > 1 else ".") / "result.json" for name in names}
        self.process: subprocess.Popen[bytes] | None = None
        self.metrics: dict[str, float] = {}

    def answered(self, weights: str) -> bool:
        """Whether there are results of this command and these weights, as a killed run leaves them; reads them."""
        try:
            request = json.loads((self.folder / "request.json").read_text(encoding="utf-8"))
            if request != {"weights": weights, "command": self.command}:
                return False
            self._read()
        except (OSError, ValueError, KeyError):
            return False
        return True

    def export(self, trainer: Any) -> None:
        """Write the model; every rank calls it."""
        if trainer.is_first_rank and self.folder.is_dir():
            for path in filter(is_leftover, self.folder.iterdir()):
                shutil.rmtree(path, ignore_errors=True)
        trainer.export_to(self.model)

    def advance(self) -> str | None:
        """Start the command or wait for it a little. Returns ``running``, None once it is done, or how it failed."""
        try:
            if self.process is None:
                weights = self._weights()
                if self.answered(weights):
                    return None
                self._start(weights)
            with suppress(subprocess.TimeoutExpired):
                return self._outcome(self.process.wait(_POLL_S))  # type: ignore[union-attr]
            return RUNNING
        except OSError as error:
            return str(error)

    def end(self) -> None:
        """End the command where it still runs: this process is being interrupted."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _weights(self) -> str:
        from verl_dft.sampling.fingerprint import model_fingerprint

        if missing_files([self.model / "config.json"], _PATIENCE_S):
            raise OSError(f"{self.model} is not here; output_dir must lie on a file system that all nodes share")
        return model_fingerprint(str(self.model), None)

    def _start(self, weights: str) -> None:
        for path in self.results.values():  # of other weights
            path.unlink(missing_ok=True)
        write_json(self.folder / "request.json", {"weights": weights, "command": self.command})
        places = [f"model={self.model}", f"output_dir={json.dumps(str(self.folder))}", "overwrite=true"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                tied([*self.command, *places]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=clean_environment(os.environ),
            )
        failpoint("evaluation.started")

    def _outcome(self, code: int) -> str | None:
        if code == 0:
            try:
                return self._read()
            except (OSError, ValueError, KeyError) as error:
                how = f"its results cannot be read: {error!r}"
        else:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
        said = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        last = next((line[-300:] for line in reversed(said) if line), "nothing")
        return f"{how}; the last it said: {last}; its log: {self.log}"

    def _read(self) -> None:
        for name, path in self.results.items():
            numbers = shown_numbers(json.loads(path.read_text(encoding="utf-8")))
            self.metrics |= {f"eval/{name}/{key}": value for key, value in numbers.items()}


def shown_numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """What is logged of a ``result.json``; shares are fractions.

    The interval is cut at 0 and 1, so its ends say more than half its width.
    """
    found = {name: result[name] for name in ("avg", "truncated_frac", "no_answer_frac", "mean_response_tokens")}
    if result["avg_ci95"]:  # one problem has none
        low, high = result["avg_ci95"]
        found |= {"ci95_half_width": (high - low) / 2, "ci95_low": low, "ci95_high": high}
    return found


class Evaluations:
    """A run's evaluations. Every rank has one and calls :meth:`after` between steps; a Ray driver is alone."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.config = trainer, trainer.config

    def after(self, step: int) -> None:
        """Evaluate the weights after ``step`` steps if that is due and has not been done.

        Raises:
            EvaluationFailed: it failed and ``trainer.eval_failure=stop``; there is a checkpoint of this step then.
        """
        trainer, options = self.trainer, self.config.trainer
        if not is_due(options, step, trainer.total_training_steps):
            return
        begun, one, failure = time.monotonic(), StepEvaluation(self.config, step), None
        logged = _told(self._is_logged(one, step) if trainer.is_first_rank else None)
        if not logged:
            one.export(trainer)
            failure = self._wait(one)
        if trainer.is_first_rank:
            if not logged:
                self._report(one, step, failure, time.monotonic() - begun)
            if not options.keep_eval_models:
                shutil.rmtree(one.model, ignore_errors=True)  # also what a run left that was killed before this
        if failure and options.eval_failure == "stop":
            if step:
                trainer.ckpt_handler.save_checkpoint(step)
            if trainer.is_first_rank:
                trainer.open_tracker().finish(exit_code=1)
            raise EvaluationFailed(
                f"the evaluation after step {step} failed ({failure}); put that right and run the same command again: "
                "it goes on from this step"
            )

    def _is_logged(self, one: StepEvaluation, step: int) -> bool:
        """Only of the step that a run starts from metrics are kept already."""
        path = Path(self.config.output_dir) / METRICS_FILE
        if step != self.trainer.resume_global_step or not path.is_file():
            return False
        lines = [line for line in read_metrics(path) if line["step"] == step]
        return all(any(f"eval/{name}/avg" in line for line in lines) for name in one.results)

    def _wait(self, one: StepEvaluation) -> str | None:
        """Until the command has ended. Returns how it failed, on every rank."""
        try:
            # The ranks meet once a second: no collective waits long enough to time out, however long it takes.
            while (state := _told(one.advance() if self.trainer.is_first_rank else None)) == RUNNING:
                pass
            return state
        finally:
            one.end()

    def _report(self, one: StepEvaluation, step: int, failure: str | None, seconds: float) -> None:
        """Log and print what came out."""
        tracker = self.trainer.open_tracker()
        if failure:
            tracker.log_evaluation({"eval/failed": 1}, step)
            what = "" if self.config.trainer.eval_failure == "stop" else "; training goes on"
            print(f"warning: the evaluation after step {step} failed ({failure}){what}", file=sys.stderr, flush=True)
            return
        failpoint("evaluation.before_log")
        tracker.log_evaluation({**one.metrics, "eval/failed": 0, "eval/seconds": seconds}, step)
        failpoint("evaluation.after_log")
        for name in one.results:
            print(f"step {step}: {summary(name, one.metrics)}, in {seconds:.0f} s", flush=True)


def summary(name: str, metrics: Mapping[str, float]) -> str:
    """One line about a benchmark's metrics."""
    percent = {key.rpartition("/")[2]: 100 * value for key, value in metrics.items() if key.startswith(f"eval/{name}/")}
    text = f"{name} {percent['avg']:.1f}%"
    if "ci95_low" in percent:
        text += f" (95% interval {percent['ci95_low']:.1f} to {percent['ci95_high']:.1f})"
    return f"{text}, truncated {percent['truncated_frac']:.1f}%, no answer {percent['no_answer_frac']:.1f}%"


def _told(value: Any) -> Any:
    """What the first rank says, on every rank."""
    import torch

    if not torch.distributed.is_initialized():
        return value
    message = [value]
    torch.distributed.broadcast_object_list(message, src=0, device=torch.device("cpu"))  # over gloo
    return message[0]
