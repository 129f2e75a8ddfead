"""Functions that the fork server runs in ranks, about the replaced output layer."""

import json
from pathlib import Path

import torch
from verl.utils import tensordict_utils as tu
from verl.utils.distributed import destroy_global_process_group
from verl.utils.ulysses import set_ulysses_sequence_parallel_group
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_dft.training import sft
from verl_dft.training.linear_head import Targets


def widths(argv: list[str]) -> int:
    """Train like ``verl-dft train``; ``argv[0]`` gets the last dimension of what verl takes for logits, each time."""
    seen = []
    prepare = FSDPEngineWithLMHead.prepare_model_outputs

    def noting(self: FSDPEngineWithLMHead, output: object, *args: object, **kwargs: object) -> object:
        seen.append(output.logits.shape[-1])
        return prepare(self, output, *args, **kwargs)

    FSDPEngineWithLMHead.prepare_model_outputs = noting
    code = sft.main(argv[1:])
    Path(argv[0]).write_text(json.dumps(seen))
    return code


def sequence_parallel_targets(argv: list[str]) -> int:
    """Each rank writes the rows and labels of its shard of a packed sequence of 13 tokens, and of the whole."""
    sft.init_distributed()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    set_ulysses_sequence_parallel_group(torch.distributed.group.WORLD)
    rows = [torch.arange(length) + 10 * length for length in (4, 7, 2)]
    masks = [(torch.arange(len(row)) > 1).long() for row in rows]
    columns = {"input_ids": rows, "loss_mask": masks}
    nested = {name: torch.nested.as_nested_tensor(value, layout=torch.jagged) for name, value in columns.items()}
    found = {}
    for name, sp_size, tokens in (("whole", 1, 13), ("shard", world, -(-13 // world))):
        targets = Targets.of(tu.get_tensordict(nested, {"sp_size": sp_size}), with_entropy=False)
        at, labels = targets.rows(torch.Size([1, tokens]), torch.device("cpu"))
        found[name] = [(int(row) + (rank * tokens if name == "shard" else 0), int(label)) for row, label in
                       zip(at, labels, strict=True)]  # fmt: skip
    Path(argv[0], f"{rank}.json").write_text(json.dumps(found))
    destroy_global_process_group()
    return 0
