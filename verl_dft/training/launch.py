"""``verl-dft train``: prepare, then train in this process, under torchrun or under Ray."""

import os
import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from verl_dft.platform.compat import check_verl_version


def main(argv: Sequence[str]) -> int:
    """Run a training. Returns 0 done, 2 bad input; several ranks replace this process by torchrun."""
    check_verl_version()
    from verl_dft.training.setup import prepare_run

    argv = list(argv)
    config = prepare_run(argv)
    if config.launcher == "ray":
        from verl_dft.training import sft_ray

        sft_ray.run(config)
    elif config.trainer.n_gpus_per_node * config.trainer.nnodes == 1 or "RANK" in os.environ:
        from verl_dft.training import sft

        sft.run(config)
    else:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, torchrun(config, argv))
    return 0


def torchrun(config: DictConfig, argv: Sequence[str]) -> list[str]:
    """The command that starts the ranks of this machine. Several machines: run it on each with their own rdzv flags.

    Raises no error itself; ``trainer.nnodes`` > 1 needs ``MASTER_ADDR`` and ``NODE_RANK`` in the environment.
    """
    nodes = config.trainer.nnodes
    if nodes == 1:
        where = ["--standalone"]
    else:
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        port = os.environ.get("MASTER_PORT", "29500")
        where = [f"--nnodes={nodes}", f"--node-rank={os.environ.get('NODE_RANK', '0')}",
                 f"--master-addr={address}", f"--master-port={port}"]  # fmt: skip
    ranks = f"--nproc-per-node={config.trainer.n_gpus_per_node}"
    return [sys.executable, "-m", "torch.distributed.run", *where, ranks, "-m", "verl_dft.training.sft", *argv]
