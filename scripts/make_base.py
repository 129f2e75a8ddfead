"""Make the tiny world's base model anew by its recipe, and ship it in recipes/tiny/base with where it came from.

    python scripts/make_base.py [--work runs/tiny-base] [--out recipes/tiny/base]

About 3 minutes on one core. The commands are those a user would type; they are recorded in PROVENANCE.json together
with seeds, versions, hashes and the measured accuracy. Another processor or torch rounds differently, and this short a
pretraining amplifies that: a base made elsewhere is another base, of like but not equal skill.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from verl_dft.demo import thread_limits  # noqa: E402
from verl_dft.files import atomic_dir, sha256_file, versions, write_json  # noqa: E402

WORK = Path("runs/tiny-base")
SHIPPED = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
MEASURED = ("benchmark", "n", "temperature", "max_tokens", "num_problems", "avg", "avg_ci95", "pass_at_k",
            "avg_by_level", "no_answer_frac", "truncated_frac", "seed")  # fmt: skip


def commands(work: Path) -> list[list[str]]:
    """Untrained model, pretraining, measurement."""
    verb = ["verl-dft", "train", "--config-name", "tiny/base", f"model={work}/untrained", f"output_dir={work}/run"]
    measure = ["verl-dft", "evaluate", f"model={work}/run/model", "benchmark=arithmetic", "n=16"]
    return [
        ["python", "-m", "verl_dft.tiny", "init", f"{work}/untrained"],
        [*verb, "trainer.save_freq=100", "trainer.logger=[tensorboard]"],
        [*measure, "engine.dtype=float32", f"output_dir={work}/evaluation"],
    ]


def run(command: list[str]) -> None:
    """Run one command with this interpreter and one thread; ends the script where it fails."""
    print(f"$ {shlex.join(command)}", flush=True)
    module = ["-m", "verl_dft.cli"] if command[0] == "verl-dft" else []
    environment = {**os.environ, **thread_limits(1)}
    done = subprocess.run([sys.executable, *module, *command[1:]], cwd=ROOT, env=environment)
    if done.returncode:
        sys.exit(f"error: exit code {done.returncode} of {shlex.join(command)}")


def provenance(work: Path) -> dict[str, object]:
    """What the shipped folder came from."""
    from omegaconf import OmegaConf

    config = OmegaConf.load(ROOT / work / "run" / "config.yaml")
    result = json.loads((ROOT / work / "evaluation" / "result.json").read_text())
    last = json.loads((ROOT / work / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    data = json.loads((ROOT / work / "run" / "data" / "train.parquet.manifest.json").read_text())
    return {
        "made_by": "make base",
        "commands": [shlex.join(command) for command in commands(WORK)],
        "steps": config.data.source.num_rows // config.data.train_batch_size,
        "seeds": {"weights": 0, "texts": config.data.source.seed, "order": config.trainer.seed},
        "val_nll": last["val/nll"],
        "measured": {key: result[key] for key in MEASURED},
        "sha256": {name: sha256_file(ROOT / work / "run" / "model" / name) for name in SHIPPED},
        "training_rows_sha256": data["rows_sha256"],
        "versions": versions(),
        "machine": platform.machine(),
        "licence": "Apache-2.0, as the project; trained on generated arithmetic only",
    }


def main() -> int:
    """Run the commands in an empty folder, then replace the shipped folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="where the runs are written")
    parser.add_argument("--out", type=Path, default=ROOT / "recipes" / "tiny" / "base", help="the folder to ship")
    arguments = parser.parse_args()
    work = arguments.work
    if (ROOT / work / "untrained").is_dir():  # an earlier run of this script
        shutil.rmtree(ROOT / work)
    for command in commands(work):
        run(command)
    facts = provenance(work)
    with atomic_dir(arguments.out) as folder:
        for name in SHIPPED:
            shutil.copyfile(ROOT / work / "run" / "model" / name, folder / name)  # not its mode
        write_json(folder / "PROVENANCE.json", facts)
    print(f"avg@16 {100 * facts['measured']['avg']:.1f}%; wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
