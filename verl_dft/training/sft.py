"""Training under torchrun: ``torchrun --nproc-per-node 8 -m verl_dft.training.sft objective=dft data=… model=…``."""

import os
import socket
import sys
from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from verl.trainer import sft_trainer
from verl.utils.device import get_device_name
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

from verl_dft.training.launch import run_guarded
from verl_dft.training.only_one import only_training
from verl_dft.training.setup import prepare_run
from verl_dft.training.trainer import ObjectiveTrainerMixin, replaced
from verl_dft.training.worker import ObjectiveWorker


class ObjectiveSFTTrainer(ObjectiveTrainerMixin, sft_trainer.SFTTrainer):
    """verl's ``SFTTrainer`` with an objective; one process per rank."""

    verl_module = sft_trainer

    def _build_engine(self) -> None:
        with replaced(sft_trainer, TrainingWorker=ObjectiveWorker):
            super()._build_engine()
        self.training_client.set_loss_fn(self.loss_bridge())

    def _build_dataloader(self) -> None:
        self.build_loaders(self.engine.get_data_parallel_size(), self.engine.get_data_parallel_rank())
        self.set_run_length()

    def _build_ckpt_handler(self) -> None:
        self.ckpt_handler = self.checkpoints(self.engine, lora_train_meta=self._get_lora_train_meta())
        self.ckpt_handler.engine = self.training_client  # the worker saves more than its engine


def init_distributed() -> None:
    """The process group: gloo on a CPU, gloo and NCCL beside it on GPUs; one process needs no launcher."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if get_device_name() == "cpu":
        if int(os.environ["WORLD_SIZE"]) == int(os.environ.get("LOCAL_WORLD_SIZE", "0")):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks of one machine need no other interface
        torch.distributed.init_process_group("cpu:gloo")
    else:
        initialize_global_process_group()


def run(config: DictConfig) -> None:
    """Train with a prepared configuration (see :func:`verl_dft.training.setup.prepare_run`)."""
    init_distributed()
    try:
        ObjectiveSFTTrainer(config).fit()
    finally:
        destroy_global_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """One rank: compose, prepare (or find prepared) rows, train."""

    def train() -> None:
        config = prepare_run(list(sys.argv[1:] if argv is None else argv))
        with only_training(config.output_dir):
            run(config)

    return run_guarded(train)


if __name__ == "__main__":
    sys.exit(main())
