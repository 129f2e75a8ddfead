"""Tokens per second of ``verl-dft``'s sampling beside bare vLLM, on the same model and the same prompts.

Both sample every prompt ``--n`` times at temperature 1 in a process of their own, one after the other, ``--pairs``
times, and in the other order every second time. Ours is all of ``Sampler.sample``: prompts through the chat template,
seeds, shards through the store, log-probs, grading. Bare is one call of ``vllm.LLM.generate`` on token ids, in the
same number type, else with vLLM's own settings, without our plug-in, unseeded and without log-probs. Starting an engine
is in neither.

    python scripts/bench_sampling.py MODEL PROBLEMS.jsonl --limit 32 --n 8 --max-tokens 256 --pairs 3
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Any

_RESULT = "RESULT "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("problems")
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--arm", choices=("ours", "bare"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(_RESULT + json.dumps((_ours if options.arm == "ours" else _bare)(options)), flush=True)
        return
    ratios = []
    for pair in range(options.pairs):
        order = ("ours", "bare") if pair % 2 == 0 else ("bare", "ours")
        found = {arm: _run(arm) for arm in order}
        ratios.append(found["ours"]["rate"] / found["bare"]["rate"])
        for arm in ("bare", "ours"):
            tokens, seconds, rate = (found[arm][key] for key in ("tokens", "seconds", "rate"))
            print(f"pair {pair + 1} {arm}: {tokens} tokens in {seconds:.1f} s, {rate:.1f} tokens/s")
        print(f"pair {pair + 1}: ours over bare {ratios[-1]:.2f}", flush=True)
    print(f"ours over bare: median {median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] of {len(ratios)} pairs")


def _run(arm: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode or not lines:
        sys.exit(f"{arm} failed: {done.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix(_RESULT))


def _asks(options: argparse.Namespace) -> list[Any]:
    from verl_dft.data.problems import problems_of
    from verl_dft.sampling.command import asks_of

    problems = problems_of({"train_files": [options.problems]}, options.limit)
    config = {"n": options.n, "prompt": "raw", "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    return asks_of(problems, config | {"max_tokens": options.max_tokens})


def _facts(tokens: int, seconds: float) -> dict[str, Any]:
    return {"tokens": tokens, "seconds": seconds, "rate": tokens / seconds}


def _ours(options: argparse.Namespace) -> dict[str, Any]:
    from verl_dft.sampling.sampler import Sampler

    asks = _asks(options)
    with tempfile.TemporaryDirectory() as folder:
        with Sampler(folder, options.model, {"want_logp": True}) as sampler:
            begun = time.monotonic()
            sampler.sample(asks)
            seconds = time.monotonic() - begun - sampler.seconds["engine_start"]
        return _facts(sampler.num_tokens, seconds)


def _bare(options: argparse.Namespace) -> dict[str, Any]:
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="4")
    os.environ["VLLM_PLUGINS"] = ""  # ours keeps vLLM from packing weights, unless the engine is ours
    from verl_dft.data.sources import load_tokenizer
    from verl_dft.data.template import ConversationEncoder

    asks = _asks(options)
    encoder = ConversationEncoder(load_tokenizer(options.model))
    ids = encoder.encode_prompts([ask.messages for ask in asks], lambda i: f"problem {asks[i].problem_id}")
    import vllm

    from verl_dft.sampling.engine_options import load_config, stored_dtype

    longest = max(map(len, ids)) + options.max_tokens
    dtype = stored_dtype(load_config(options.model))  # what ours takes; vLLM itself would cast float32 down
    llm = vllm.LLM(options.model, dtype=dtype, max_model_len=longest, disable_log_stats=True)
    params = vllm.SamplingParams(temperature=1.0, max_tokens=options.max_tokens, stop_token_ids=sorted(encoder.end_ids))
    begun = time.monotonic()
    outputs = llm.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=False)
    return _facts(sum(len(output.outputs[0].token_ids) for output in outputs), time.monotonic() - begun)


if __name__ == "__main__":
    main()
