"""What more workers bring: replicas that sample beside each other, and ranks that train together.

``replicas``: the whole of ``Sampler.sample`` (prompts, hand-out, store, grading) with 1, 2 and 4 replicas in Ray
actors, each with a source that takes ``--shard-seconds`` for a shard and no core: it stands for a GPU. What does not
shrink with the number of replicas is the driver's part. Printed are the speed-up and T(N) = serial + parallel / N.

``ranks``: steps of ``verl-dft train`` on one rank and on two, each with one thread, on the same batches, alternating.
The machine must have a core for each rank.

    python scripts/bench_parallel.py replicas
    python scripts/bench_parallel.py ranks --model SMOLLM2_FOLDER --rows ROWS.parquet
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "recipes" / "tiny" / "base"
TEXTS = [f"{'We add what is there. ' * words}So the answer is \\boxed{{{words % 10}}}." for words in range(4, 14)]


def make_source(seconds: float) -> Any:
    """What an actor of Ray's makes its source with."""
    from verl_dft.sampling.source import ScriptedSource

    class Busy(ScriptedSource):
        def generate(self, requests: Any) -> Any:
            time.sleep(seconds)
            return super().generate(requests)

    return lambda _: Busy(TEXTS)


def sampling(replicas: int, options: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of the driver, from the first prompt to the last verdict."""
    from verl_dft.sampling.actors import ActorPool
    from verl_dft.sampling.ask import Ask, Sampling
    from verl_dft.sampling.sampler import Sampler

    how, asks = Sampling(max_tokens=400), []
    for number in range(options.shards * options.shard_size // 4):
        turns = [{"role": "user", "content": f"Ann has {number} keys . How many ?"}]
        asks += Ask(f"p{number}", 0, turns, str(number % 10), how, "raw").numbered(range(4))
    config = {"shard_size": options.shard_size, "num_replicas": replicas, "grading": {"num_workers": 1}}
    with ActorPool(make_source(options.shard_seconds), replicas, {"CPU": 0.1}) as pool:
        with Sampler(folder / str(replicas), str(BASE), config, pool) as sampler:
            begun, cpu = time.monotonic(), time.process_time()
            assert len(sampler.sample(asks)) == len(asks)
            return time.monotonic() - begun, time.process_time() - cpu


def replicas(options: argparse.Namespace) -> None:
    """Print a table and the fit."""
    import ray

    from verl_dft.sampling.cluster import ray_session

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    found, num = {}, options.shards * options.shard_size
    with tempfile.TemporaryDirectory(prefix="bench_parallel.") as name, ray_session(num_cpus=2):
        sampling(1, argparse.Namespace(shards=1, shard_size=8, shard_seconds=0.0), Path(name, "warm"))
        for count in options.counts:
            found[count] = sampling(count, options, Path(name))
            print(f"{count} replicas: {found[count]}", file=sys.stderr, flush=True)
    base = found[options.counts[0]][0] * options.counts[0]
    print(
        "| replicas | seconds | samples/s | speed-up | driver: CPU ms a sample |\n| ---: | ---: | ---: | ---: | ---: |"
    )
    for count, (wall, cpu) in found.items():
        print(f"| {count} | {wall:.1f} | {num / wall:.0f} | {base / wall:.2f} | {1000 * cpu / num:.2f} |")
    serial, parallel = fit([(count, wall) for count, (wall, _) in found.items()])
    print(f"T(N) = {serial:.2f} s + {parallel:.1f} s / N, for {num} samples: {1000 * serial / num:.2f} ms a sample")


def fit(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Least squares of ``serial + parallel / N``."""
    import numpy as np

    table = np.array([[1.0, 1.0 / count] for count, _ in points])
    (serial, parallel), *_ = np.linalg.lstsq(table, np.array([wall for _, wall in points]), rcond=None)
    return float(serial), float(parallel)


def training(ranks: int, options: argparse.Namespace, folder: Path) -> float:
    """Median seconds of a step after the first."""
    out = folder / f"{ranks}-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "verl_dft.cli", "train", "objective=dft", f"model={options.model}",
               f"data={options.rows}", f"data.train_batch_size={options.batch}", f"data.cache_dir={folder / 'cache'}",
               f"trainer.n_gpus_per_node={ranks}", f"trainer.total_training_steps={options.steps}",
               "trainer.logger=[]", "trainer.save_freq=-1", "precision=fp32", f"output_dir={out}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env={**os.environ, **ONE_THREAD})
    if done.returncode:
        sys.exit(f"{ranks} ranks failed: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return median(line["perf/step_s"] for line in lines[1:])


ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def ranks(options: argparse.Namespace) -> None:
    """Print seconds a step, and how many times faster two ranks are."""
    ratios = []
    with tempfile.TemporaryDirectory(prefix="bench_parallel.") as name:
        for pair in range(options.pairs):
            order = (1, 2) if pair % 2 == 0 else (2, 1)
            found = {count: training(count, options, Path(name)) for count in order}
            ratios.append(found[1] / found[2])
            print(f"pair {pair + 1}: 1 rank {found[1]:.2f} s a step, 2 ranks {found[2]:.2f} s, {ratios[-1]:.2f} times",
                  flush=True)  # fmt: skip
    print(f"two ranks over one: median {median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] of {len(ratios)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("replicas", "ranks"))
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--shard-size", type=int, default=256)
    parser.add_argument("--shard-seconds", type=float, default=1.5)
    parser.add_argument("--model")
    parser.add_argument("--rows")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    (replicas if options.what == "replicas" else ranks)(options)


if __name__ == "__main__":
    main()
