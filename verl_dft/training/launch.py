"""``verl-dft train``: prepare, then train in this process, in ranks started by torch's launcher, or under Ray."""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from verl_dft.errors import InputError
from verl_dft.files import scratch_folder
from verl_dft.platform.compat import check_verl_version
from verl_dft.processes import end_with_parent
from verl_dft.training.evaluate_during import EvaluationFailed
from verl_dft.training.only_one import LAUNCHED, only_training

_BAD_INPUT = 2
_TOLD = "verl_dft"
"""Key of an error file that holds our one line."""


def main(argv: Sequence[str]) -> int:
    """Run a training. Returns 0 done, 1 failed ranks.

    Raises:
        InputError: bad input, found here or by a rank.
    """
    check_verl_version()
    from verl_dft.training import preference_config
    from verl_dft.training.setup import prepare_run

    argv = list(argv)
    if preference_config.wanted(argv):
        from verl_dft.training import preference

        return preference.main(argv)
    config = prepare_run(argv)
    with only_training(config.output_dir):
        return _train(config, argv)


def _train(config: DictConfig, argv: Sequence[str]) -> int:
    try:
        if config.launcher == "ray":
            from verl_dft.training import sft_ray

            sft_ray.run(config)
        elif config.trainer.n_gpus_per_node * config.trainer.nnodes == 1 or "RANK" in os.environ:
            from verl_dft.training import sft

            sft.run(config)
        else:
            return run_ranks([*torchrun_options(config), "-m", "verl_dft.training.launch", *argv])
    except EvaluationFailed as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def torchrun_options(config: DictConfig) -> list[str]:
    """torchrun's options for the ranks of this machine; several machines are told apart by the environment."""
    ranks = f"--nproc-per-node={config.trainer.n_gpus_per_node}"
    if config.trainer.nnodes == 1:
        return ["--standalone", ranks]
    return [
        ranks,
        f"--nnodes={config.trainer.nnodes}",
        f"--node-rank={os.environ['NODE_RANK']}",  # configure checked that both are there
        f"--master-addr={os.environ['MASTER_ADDR']}",
        f"--master-port={os.environ.get('MASTER_PORT', '29500')}",
    ]


def run_ranks(command: Sequence[str]) -> int:
    """What ``torchrun *command`` does, in this process, and told in one line where it fails. Returns 0 or 1.

    Raises:
        InputError: a rank ended in :func:`run_guarded` with one.
        KeyboardInterrupt: SIGINT, after the ranks have been ended. Other signals that end a run end this process.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # it tells of every rank that it ends after a failure; the failure itself is told below
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    os.environ[LAUNCHED] = "1"
    try:
        with scratch_folder("verl_dft_ranks") as folder:  # torchrun would leave its own behind
            run(parse_args([f"--log-dir={folder}", *command]))
        return 0
    except ChildFailedError as error:
        return _failure(error)
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        signal.signal(error.sigval, signal.SIG_DFL)
        os.kill(os.getpid(), error.sigval)
        raise
    finally:
        del os.environ[LAUNCHED]


def _failure(error: Exception) -> int:
    """One line for the rank that failed first."""
    failures = sorted(error.failures.items(), key=lambda f: f[1].timestamp)  # type: ignore[attr-defined]
    for _, failure in failures:  # others may have failed within the same second, for want of this rank
        if _TOLD in failure.error_file_data:
            if failure.exitcode == _BAD_INPUT:
                raise InputError(failure.message) from None
            print(f"error: {failure.message}", file=sys.stderr, flush=True)
            return 1
    rank, failure = failures[0]
    if failure.exitcode < 0:
        how = f"was ended by signal {-failure.exitcode} ({failure.signal_name()})"
        if -failure.exitcode == signal.SIGKILL:
            how += ", which is what the system does when memory runs out"
    else:
        how = f"ended with exit code {failure.exitcode}; its traceback is above"
    print(f"error: rank {rank} {how}", file=sys.stderr, flush=True)
    return 1


def run_guarded(run: Callable[[], None]) -> int:
    """Exit code of a training process: 0 done, 2 bad input, 1 a failed evaluation that was to stop it (one line each).

    Other errors keep their traceback.
    """
    launched = LAUNCHED in os.environ
    if launched:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupted rank ends at once, without a traceback of its own
        end_with_parent(signal.SIGTERM)
    try:
        run()
    except (InputError, EvaluationFailed) as error:
        if launched:  # torch's form of an error file, which run_ranks reads
            report = json.dumps({"message": str(error), "timestamp": int(time.time()), _TOLD: True})
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(report, encoding="utf-8")
        else:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return _BAD_INPUT if isinstance(error, InputError) else 1
    return 0


def _rank() -> int:
    """One rank; verl is imported inside, where an interruption is already silent."""

    def run() -> None:
        from verl_dft.training import sft

        config = sft.prepare_run(sys.argv[1:])
        with only_training(config.output_dir):
            sft.run(config)

    return run_guarded(run)


if __name__ == "__main__":
    sys.exit(_rank())
