"""Packed against padded input on this machine, side by side: tokens per second and their ratio.

    python scripts/bench_packing.py MODEL_FOLDER ROWS.parquet [--steps 6] [--repeats 2] [key=value …]

Runs `verl-dft train` in alternation with model.use_remove_padding true and false, takes each run's median step (the
first left out), and prints which of the two `use_remove_padding=auto` would have chosen.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from verl_dft.training.metrics import read_metrics


def speed(model: str, rows: str, packed: bool, steps: int, folder: Path, overrides: list[str]) -> float:
    """Tokens per second of one short training run."""
    command = [
        *(sys.executable, "-m", "verl_dft.cli", "train", "objective=dft"),
        *(f"model={model}", f"data={rows}", f"output_dir={folder}"),
        *(f"model.use_remove_padding={packed}", f"trainer.total_training_steps={steps}", "trainer.logger=[]"),
        *overrides,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=1800)
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "perf/tokens_per_s" in line]
    return statistics.median(line["perf/tokens_per_s"] for line in lines[1:])


def chosen(model: str, rows: str, overrides: list[str], folder: Path) -> bool:
    """What `auto` resolves to for this model and these rows."""
    from verl_dft.training.setup import prepare_run

    config = prepare_run([f"model={model}", f"data={rows}", f"output_dir={folder}", *overrides])
    return bool(config.model.use_remove_padding)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    arguments, overrides = parser.parse_known_args()
    speeds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as temporary:
        for repeat in range(arguments.repeats):
            for packed in (True, False):
                folder = Path(temporary, f"{repeat}-{packed}")
                speeds[packed].append(
                    speed(arguments.model, arguments.rows, packed, arguments.steps, folder, overrides)
                )
        auto = chosen(arguments.model, arguments.rows, overrides, Path(temporary, "auto"))
    for packed, name in ((True, "packed"), (False, "padded")):
        print(f"{name}: {', '.join(f'{value:,.0f}' for value in speeds[packed])} tokens/s")
    ratios = [a / b for a, b in zip(speeds[True], speeds[False], strict=True)]
    print(
        f"packed / padded: {', '.join(f'{ratio:.2f}' for ratio in ratios)}; auto takes {'packed' if auto else 'padded'}"
    )


if __name__ == "__main__":
    main()
