"""What an evaluation costs beyond vLLM's own generation, and bare vLLM on the same prompts beside it.

    python scripts/bench_evaluate.py MODEL_FOLDER DATA_DIR [--benchmark gsm8k --problems 250 --n 4 --max-tokens 128]

In turn, a process each: ``verl-dft evaluate``, and nothing but ``vllm.LLM.generate`` with the same engine options on
the same prompts: all in one call, vLLM's own sampling without seeds, no plug-in of ours, nothing stored or graded.
Samples differ between the two, so the ratio is of the time per sampled token.

"harness" is the whole process from its start to its end without starting the engine and without ``generate``; "process
start" is what lies outside of ``seconds.total`` in ``result.json``: Python's start and imports, and its end. Grading
runs beside generation on the same cores: what that costs is not in "harness" but in the ratio, and so are shards (the
engine empties at the end of each) and seeded sampling.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any


def evaluate(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """``verl-dft evaluate`` in a process of its own: its seconds by part, tokens sampled and engine options."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-m", "verl_dft.cli", "evaluate", *overrides(args), f"output_dir={folder}"],
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    wall = time.monotonic() - begun
    result = json.loads((folder / "result.json").read_text())
    seconds = result["seconds"]
    parts = {
        "process start": wall - seconds["total"],
        "engine start": seconds["engine_start"],
        "prompts": seconds.get("prompts", 0.0),
        "generate": seconds["generation"],
        "grading after it": seconds["grading"],
    }
    parts["store, report, rest"] = wall - sum(parts.values())
    found = {"parts": parts, "wall": wall, "engine": result["engine"], "samples": result["num_samples"]}
    return found | {"tokens": result["num_samples"] * result["response_tokens"]["mean"]}


def overrides(args: argparse.Namespace) -> list[str]:
    """The command line of the evaluation."""
    return [
        f"model={args.model}", f"benchmark={args.benchmark}", f"data_dir={args.data_dir}", f"limit={args.problems}",
        f"n={args.n}", f"max_tokens={args.max_tokens}", f"temperature={args.temperature}", *args.more,
    ]  # fmt: skip


def write_requests(args: argparse.Namespace, engine: dict[str, Any], path: Path) -> None:
    """The evaluation's prompts as token ids, in its order, with the engine's options, for :func:`bare`."""
    from verl_dft.data.prompts import render_messages
    from verl_dft.data.sources import load_tokenizer
    from verl_dft.data.template import ConversationEncoder
    from verl_dft.evaluation.benchmarks import load_benchmark
    from verl_dft.evaluation.command import compose_evaluate

    config = compose_evaluate(overrides(args))
    problems = load_benchmark(config.benchmark, config.limit).problems
    encoder = ConversationEncoder(load_tokenizer(args.model))
    messages = [render_messages(config.prompt, problem.problem) for problem in problems]
    prompts = [ids for ids in encoder.encode_prompts(messages, str) for _ in range(args.n)]
    kept = ("dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "kv_cache_memory_bytes")
    options = {key: engine[key] for key in kept if engine.get(key) is not None}
    options |= {"model": args.model, "enforce_eager": engine["device"] == "cpu", "enable_prefix_caching": True}
    sampling = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    sampling["stop_token_ids"] = sorted(encoder.end_ids)
    path.write_text(json.dumps({"prompts": prompts, "engine": options, "sampling": sampling}))


def bare(path: Path) -> None:
    """The child process: vLLM alone. Prints its seconds and tokens as JSON."""
    given = json.loads(path.read_text())
    begun = time.monotonic()
    from vllm import LLM, SamplingParams

    llm = LLM(**given["engine"], seed=0, disable_log_stats=True, use_tqdm_on_load=False)
    started = time.monotonic()
    prompts = [{"prompt_token_ids": ids} for ids in given["prompts"]]
    outputs = llm.generate(prompts, SamplingParams(**given["sampling"]), use_tqdm=False)
    seconds = time.monotonic() - started
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(json.dumps({"engine_start": started - begun, "generate": seconds, "tokens": tokens}))


def run_bare(path: Path) -> dict[str, Any]:
    """:func:`bare` in a process of its own, without our plug-in."""
    environment = {**os.environ, "VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                   "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
    command = [sys.executable, __file__, "--bare", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def report(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Medians over the pairs, and each pair's ratio."""
    ours, theirs = zip(*pairs, strict=True)
    print(f"\n| of {ours[0]['samples']} samples | seconds | share without engine start |\n|---|---:|---:|")
    whole = median(one["wall"] - one["parts"]["engine start"] for one in ours)
    for name in ours[0]["parts"]:
        seconds = median(one["parts"][name] for one in ours)
        print(f"| {name} | {seconds:.1f} | {'' if name == 'engine start' else f'{100 * seconds / whole:.1f}%'} |")
    rest = [one["wall"] - one["parts"]["engine start"] for one in ours]
    harness = [1 - one["parts"]["generate"] / all_ for one, all_ in zip(ours, rest, strict=True)]
    inner = [1 - one["parts"]["generate"] / (all_ - one["parts"]["process start"])
             for one, all_ in zip(ours, rest, strict=True)]  # fmt: skip
    for name, shares in (("whole process", harness), ("without process start", inner)):
        print(f"\nharness, {name}: {', '.join(f'{100 * share:.1f}%' for share in shares)}; goal: below 10%")
    rates = [(one["tokens"] / all_, other["tokens"] / other["generate"])
             for one, other, all_ in zip(ours, theirs, rest, strict=True)]  # fmt: skip
    for (a, b), one in zip(rates, ours, strict=True):
        inside = one["tokens"] / one["parts"]["generate"]
        print(f"tokens/s: evaluation {a:.0f} ({inside:.0f} inside generate), bare vLLM {b:.0f}: "
              f"{b / a:.2f} times bare's time ({b / inside:.2f} inside generate)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data_dir")
    parser.add_argument("more", nargs="*", help="further key=value of verl-dft evaluate")
    parser.add_argument("--benchmark", default="gsm8k")
    parser.add_argument("--problems", type=int, default=250)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=2)
    args = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.pairs):
            ours = evaluate(args, Path(folder, str(number)))
            requests = Path(folder, "requests.json")
            write_requests(args, ours["engine"], requests)
            pairs.append((ours, run_bare(requests)))
            print(f"pair {number}: {json.dumps(pairs[-1])}", flush=True)
    report(pairs)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        bare(Path(sys.argv[2]))
    else:
        main()
