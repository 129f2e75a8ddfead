"""Log-probs with and without the full logits, forward and backward, side by side in one run: time and memory.

    python scripts/bench_logprob.py [--repeats 7] [--dtype float32 bfloat16] [--shares 0.5 1] [--device cpu|cuda]
                                    [--sizes V,D,tokens …] [--threads 1]

Per size it runs four paths in turn, again and again, and prints each one's time and peak memory over those of the first
(median of the pairs, smallest and largest in brackets). On a CPU time is the process's own, summed over threads, so
that other processes disturb it less:

    logits      the output layer, then verl_dft's token_logp: trainer.log_prob_head=logits
    keep        linear_logp that keeps its logits for the backward pass, as small batches do
    recompute   linear_logp that keeps none
    verl fused  verl's FusedLinearForPPO (its torch backend), which computes every token and the entropy

Memory is what tensors allocate beyond the inputs at the worst moment; the gradients, which every path makes, count.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from verl_dft.training.linear_logp import KEEP_ALL, linear_logp
from verl_dft.training.logprob import token_logp

SIZES = ((512, 128, 2048), (49_152, 576, 512), (152_064, 896, 256))
"""Vocabulary, hidden size, tokens: the tiny world's model, SmolLM2-135M, Qwen2.5-0.5B (with fewer tokens)."""


class PeakMemory(TorchDispatchMode):
    """Largest sum of the bytes of storages that operations inside the block made and that were alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        mine = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in mine:
                self.alive[StorageWeakRef(leaf.untyped_storage())] = leaf.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def paths(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Name -> a function from the leaves to the sum of the trained tokens' log-probs."""
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    rows = mask.nonzero().squeeze(-1)
    fused = FusedLinearForPPO()
    return {
        "logits": lambda: token_logp(F.linear(hidden, weight), labels, mask)[0].sum(),
        "keep": lambda: linear_logp(hidden[rows], weight, None, labels[rows], keep_bytes=KEEP_ALL)[0].sum(),
        "recompute": lambda: linear_logp(hidden[rows], weight, None, labels[rows], keep_bytes=0)[0].sum(),
        "verl fused": lambda: fused(hidden, weight, labels)[0][mask].sum(),
    }


def run(path: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> float:
    """Seconds of a forward and backward pass."""
    clock = time.perf_counter if leaves[0].device.type == "cuda" else time.process_time
    for leaf in leaves:
        leaf.grad = None
    synchronize(leaves[0].device)
    start = clock()
    path().backward()
    synchronize(leaves[0].device)
    return clock() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(path: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> int:
    """Peak memory of a pass beyond the leaves."""
    for leaf in leaves:
        leaf.grad = None
    if leaves[0].device.type == "cuda":
        synchronize(leaves[0].device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(path, leaves)
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        run(path, leaves)
    return memory.peak


def compare(vocab: int, size: int, tokens: int, share: float, dtype: torch.dtype, device: str, repeats: int) -> None:
    """Run one size and print its lines."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, size, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocab, size, generator=generator) / size**0.5).to(device, dtype).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=generator).to(device)
    mask = (torch.rand(tokens, generator=generator) < share).to(device)
    leaves = (hidden, weight)
    every = paths(hidden, weight, labels, mask)
    peaks = {name: peak_bytes(path, leaves) for name, path in every.items()}
    times: dict[str, list[float]] = {name: [] for name in every}
    for repeat in range(repeats + 1):
        for name, path in every.items():
            seconds = run(path, leaves)
            if repeat:  # the first round warms up
                times[name].append(seconds)
    first = statistics.median(times["logits"])
    print(f"V={vocab} D={size}, {int(mask.sum())} of {tokens} tokens trained, {str(dtype).removeprefix('torch.')}: "
          f"logits {first * 1e3:.1f} ms, {peaks['logits'] / 2**20:.1f} MB", flush=True)  # fmt: skip
    for name in list(every)[1:]:
        ratios = [a / b for a, b in zip(times[name], times["logits"], strict=True)]
        print(f"  {name:11s} time {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]   "
              f"memory {peaks[name] / peaks['logits']:.2f} ({peaks[name] / 2**20:.1f} MB)", flush=True)  # fmt: skip


def main() -> None:
    """Compare every size, dtype and share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 1.0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", default=[",".join(map(str, size)) for size in SIZES], help="V,D,tokens")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for dtype in arguments.dtype:
        for size in arguments.sizes:
            for share in arguments.shares:
                vocab, hidden, tokens = map(int, size.split(","))
                compare(vocab, hidden, tokens, share, getattr(torch, dtype), arguments.device, arguments.repeats)


if __name__ == "__main__":
    main()
