"""Tokens per second and peak memory of a training step: verl_dft's ``dft`` beside verl's own SFT and TRL's DFT.

    python scripts/bench_training.py --model SMOLLM2_FOLDER --rows GSM8K_TRAIN.jsonl.gz --threads 1
    python scripts/bench_training.py --shape 0.5b --rows FILE --steps 1 --pairs 3 --threads 2
    python scripts/bench_training.py --shape 1.5b --rows FILE --device cuda --precision bf16 --tokens 32768 \
        --rows-per-forward 8 --checkpointing --trainers dft dft-logits verl trl

Each trainer has a process of its own (``bench_training_peers.py``), all stay alive, and blocks of ``--steps`` steps
alternate between them, in another order each time. All train the same model on the same token ids, the same rows in
each optimizer step, at most ``--rows-per-forward`` rows in a forward pass, in the same precision (float32 weights; bf16
by autocast), with AdamW, clipping and a learning rate of 0, so that losses can be compared: dft's with TRL's and its
nll with verl's SFT loss, step by step; the script fails where they differ. What a trainer does with a step's rows is
its own affair: verl packs them, TRL pads them, both in the order given; verl_dft orders them by length.

Tokens are real ones, prompt and response, no padding; a pair's ratio is of two blocks with the same tokens, one right
after the other. "CPU" is user and system time, which neighbours disturb less than they do wall time. Peak memory is
resident on a CPU, allocated on CUDA. MFU: 6 x parameters x tokens + 6 x layers x heads x head size x sum of squared
lengths, over the time and ``--peak-tflops``.

``--trainers bare bare-logits trl`` needs torch, transformers and TRL only (no verl, Ray or vLLM): our loss, without and
with materialised logits, in a plain loop over padded rows.
"""

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHAPES = {  # Qwen2.5's; the last is for trying this script
    "0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=2048),
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRAINERS = ("dft", "dft-logits", "verl", "trl", "bare", "bare-logits")
TOLERANCE = {"fp32": 2e-4, "bf16": 3e-2}
"""Relative difference of losses that rounding explains."""


def texts(path: Path) -> list[tuple[str, str]]:
    """Prompt and response of each row: of ``messages``, or ``problem`` and ``solution``, or GSM8K's own columns."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        rows = pq.read_table(path).to_pylist()
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    found = []
    for row in rows:
        if row.get("messages"):
            found.append((row["messages"][-2]["content"], row["messages"][-1]["content"]))
        else:
            found.append((row.get("problem") or row["question"], row.get("solution") or row["answer"]))
    return found


def make_model(shape: str, rows: list[tuple[str, str]], folder: Path) -> str:
    """A Qwen2 of that shape with random weights, and a tokenizer made of the rows."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **{"vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True, **SHAPES[shape]}
    )
    bpe = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    lines = (text for row in rows[:4000] for text in row)
    bpe.train_from_iterator(lines, min(8192, config.vocab_size), special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def encode(rows: list[tuple[str, str]], model: str, max_length: int) -> list[dict[str, Any]]:
    """Token ids with the length of the prompt; rows over ``max_length`` are left out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = []
    for prompt, response in rows:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = before + tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(ids) <= max_length:
            encoded.append({"ids": ids, "prompt": len(before)})
    return encoded


def plan(lengths: list[int], tokens: int, micro: int, steps: int) -> list[list[int]]:
    """Row indices of each of ``steps`` steps: so many random rows each that ``tokens`` are about reached."""
    order = random.Random(0).sample(range(len(lengths)), len(lengths))
    rows = max(1, round(tokens / statistics.mean(lengths) / micro)) * micro
    if rows * steps > len(order):
        sys.exit(f"{len(order)} rows of mean length {statistics.mean(lengths):.0f} do not give {steps} steps of {rows}")
    return [order[step * rows : (step + 1) * rows] for step in range(steps)]


class Peer:
    """One trainer's process."""

    def __init__(self, name: str, spec: Path, threads: int | None, log: Path) -> None:
        self.name, self.log = name, log
        environment = dict(os.environ)
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        command = [sys.executable, str(Path(__file__).with_name("bench_training_peers.py")), name, str(spec)]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} failed:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def run(self, steps: int) -> dict[str, Any]:
        """Do so many steps: ``seconds``, ``cpu``, ``peak`` (GB) and ``losses``, a dict for each step."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """Close it, killing it where it does not listen."""
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def same_losses(blocks: dict[str, dict[str, Any]], precision: str, largest: dict[str, float]) -> None:
    """Check that all trainers computed the same losses in a block; ``largest`` collects the differences."""
    for kind in ("dft", "nll"):
        found = {name: [step[kind] for step in block["losses"]] for name, block in blocks.items()
                 if kind in block["losses"][0]}  # fmt: skip
        first = next(iter(found), None)
        for name in list(found)[1:]:
            for a, b in zip(found[first], found[name], strict=True):
                difference = abs(a - b) / abs(a)
                key = f"{kind}: {first} and {name}"
                largest[key] = max(largest.get(key, 0.0), difference)
                if difference > TOLERANCE[precision]:
                    sys.exit(f"{key} compute different losses on the same rows: {a:.6f} and {b:.6f}")


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def report(blocks: list[dict[str, Any]], tokens: list[int], names: list[str], flops: list[float], peak: float) -> None:
    """Print a Markdown table: each trainer, and the first one over it."""
    first = names[0]
    print(f"\n| trainer | tokens/s | {first} over it | … by CPU time | peak memory | {first}'s over it | MFU |")
    print("|---|---:|---|---|---:|---|---:|")
    for name in names:
        seconds = [block[name]["seconds"] for block in blocks]
        wall = [block[name]["seconds"] / block[first]["seconds"] for block in blocks]
        cpu = [block[name]["cpu"] / block[first]["cpu"] for block in blocks]
        memory = [block[first]["peak"] / block[name]["peak"] for block in blocks]
        mfu = statistics.median(f / s for f, s in zip(flops, seconds, strict=True)) / (peak * 1e12) if peak else None
        cells = [
            name,
            f"{statistics.median(t / s for t, s in zip(tokens, seconds, strict=True)):,.0f}",
            *(("", "") if name == first else (spread(wall), spread(cpu))),
            f"{max(block[name]['peak'] for block in blocks):.2f} GB",
            "" if name == first else spread(memory),
            f"{mfu:.1%}" if mfu is not None else "",
        ]
        print(f"| {' | '.join(cells)} |")


def step_flops(lengths: list[int], model: str) -> float:
    """Multiply-adds of a step, times two, forward and backward (recomputation not counted)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if not config.tie_word_embeddings:
        parameters -= config.vocab_size * config.hidden_size  # looking a row up multiplies nothing
    attention = 6 * config.num_hidden_layers * config.hidden_size * sum(length**2 for length in lengths)
    return 6.0 * parameters * sum(lengths) + attention


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line; what is left over are overrides of verl_dft's and verl's configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="a Hugging Face folder")
    which.add_argument("--shape", choices=SHAPES, help="a Qwen2 with random weights")
    parser.add_argument("--rows", type=Path, required=True, help="jsonl, jsonl.gz or parquet")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a block")
    parser.add_argument("--pairs", type=int, default=5, help="blocks of each trainer, after one that warms up")
    parser.add_argument("--tokens", type=int, default=4096, help="of an optimizer step, about")
    parser.add_argument("--rows-per-forward", type=int, default=4, dest="micro")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, in all trainers")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=["dft", "verl", "trl"])
    parser.add_argument("--no-trl", action="store_true")
    parser.add_argument("--trl", nargs="*", default=[], metavar="KEY=JSON", help="further arguments of SFTConfig")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of every trainer")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the device, for the MFU (H200, bf16: 989)")
    return parser.parse_known_args()


def main() -> None:
    """Run the comparison."""
    options, overrides = arguments()
    names = [name for name in options.trainers if not (options.no_trl and name == "trl")]
    with tempfile.TemporaryDirectory(prefix="bench_training_") as temporary:
        folder = Path(temporary)
        rows = texts(options.rows)
        model = options.model or make_model(options.shape, rows, folder / "model")
        encoded = encode(rows, model, options.max_length)
        steps = plan([len(row["ids"]) for row in encoded], options.tokens, options.micro, options.steps * options.pairs)
        used = {row: place for place, row in enumerate(row for step in steps for row in step)}
        encoded = [encoded[row] for row in used]
        steps = [[used[row] for row in step] for step in steps]
        (folder / "rows.json").write_text(json.dumps(encoded))
        trl = dict(pair.split("=", 1) for pair in options.trl)
        spec = {
            **{key: getattr(options, key) for key in ("micro", "max_length", "device", "precision", "checkpointing")},
            **{"model": model, "rows": str(folder / "rows.json"), "steps": [steps[-1], *steps], "output": temporary},
            **{"overrides": overrides, "trl": {key: json.loads(value) for key, value in trl.items()}},
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        lengths = [[len(encoded[row]["ids"]) for row in step] for step in steps]
        measure(options, names, folder, lengths, model)


def measure(options: argparse.Namespace, names: list[str], folder: Path, lengths: list[list[int]], model: str) -> None:
    """Start the trainers, run the blocks, print what was found."""
    flat = [length for step in lengths for length in step]
    threads = options.threads or os.environ.get("OMP_NUM_THREADS", "all")
    print(f"{len(flat)} rows of {min(flat)} to {max(flat)} tokens (mean {statistics.mean(flat):.0f}), "
          f"{len(lengths[0])} rows a step, {options.micro} a forward pass, {options.precision}, {options.device}, "
          f"{threads} threads, load {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
    peers: dict[str, Peer] = {}
    largest: dict[str, float] = {}
    blocks = []
    try:
        for name in names:
            peers[name] = Peer(name, folder / "spec.json", options.threads, folder / f"{name}.log")
            print(f"{name}: {'packed' if peers[name].facts['packed'] else 'padded'}", flush=True)
        same_losses({name: peers[name].run(1) for name in names}, options.precision, largest)  # warms up
        for pair in range(options.pairs):
            order = names[pair % len(names) :] + names[: pair % len(names)]
            block = {name: peers[name].run(options.steps) for name in order}
            blocks.append({name: block[name] for name in names})
            same_losses(blocks[-1], options.precision, largest)
            seconds = ", ".join(f"{name} {blocks[-1][name]['seconds']:.2f} s" for name in names)
            print(f"block {pair + 1}: {seconds}", flush=True)
    finally:
        for peer in peers.values():
            peer.end()
    each = [lengths[start : start + options.steps] for start in range(0, len(lengths), options.steps)]
    tokens = [sum(map(sum, block)) for block in each]
    flops = [sum(step_flops(step, model) for step in block) for block in each]
    report(blocks, tokens, names, flops, options.peak_tflops)
    for key, value in largest.items():
        print(f"largest relative difference of losses, {key}: {value:.1e}")


if __name__ == "__main__":
    main()
