"""vLLM engines in Ray actors against one in this process; a replica killed at work; what is left afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from verl_dft.end_processes import lives

pytestmark = [pytest.mark.integration, pytest.mark.alone]

# argv: model, store, replicas (0: in process), what happens: nothing, kill (a replica at work) or wait (for a signal)
_SCRIPT = """
import json, os, random, signal, sys, time
from verl_dft.sampling.engine import SampleRequest, VLLMEngine
from verl_dft.sampling.replicas import ReplicaEngines
from verl_dft.sampling.shards import Wanted, sample_all
from verl_dft.sampling.store import SampleStore, sample_key

def wanted(num_shards, size=16):
    draw = random.Random(0)
    wants = []
    for index in range(num_shards * size):
        prompt = [draw.randrange(5, 300) for _ in range(draw.randrange(3, 20))]
        request = SampleRequest(prompt, index, max_tokens=40, want_logp=True)
        wants.append(Wanted(sample_key("m", request, 0), 0, request))
    return wants

def main():
    model, store, replicas, event = sys.argv[1:]
    options = {"dtype": "float32", "max_model_len": 64, "tensor_parallel_size": 2 if event == "parallel" else 1}
    seen = {"killed": 0}
    def open_source():
        if replicas == "0":
            return VLLMEngine(model, **options)
        seen["source"] = ReplicaEngines(model, int(replicas), **options)
        return seen["source"]
    def on_shard(wants, samples):
        pids = [replica.pid for replica in seen["source"]._replicas if replica.shard is not None and replica.pid]
        if event == "kill" and not seen["killed"]:
            os.kill(pids[0], signal.SIGKILL)
            seen["killed"] = 1
        if event == "wait":
            print("READY", flush=True)
            time.sleep(0.5)
    with SampleStore(store) as opened:
        sampled = sample_all(
            opened, wanted(6 if event != "wait" else 400), open_source, shard_size=16,
            on_shard=on_shard if event in ("kill", "wait") else None,
        )
    print(json.dumps({"generated": sampled.num_generated, "killed": seen["killed"], "setups": sampled.facts}))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replicas") / "sample.py"
    path.write_text(_SCRIPT)
    return path


@pytest.fixture(scope="module")
def in_process(
    script: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, run_command: Callable
) -> dict[str, list[bytes]]:
    """The sample lines of each shard as one engine in process writes them."""
    store = tmp_path_factory.mktemp("in_process")
    done = run_command([sys.executable, script, tiny_base, store, "0", "nothing"], timeout=300)
    assert done.rc == 0, done.stderr[-3000:]
    return _sample_lines(store)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = _leftovers()
    yield
    deadline = time.monotonic() + 10
    while _leftovers() - before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _leftovers() - before


def _leftovers() -> set[str]:
    """Files in /dev/shm, and processes of Ray and vLLM that are nobody's children any more.

    Ray's two agents notice by themselves that a killed driver is gone, which may take them a minute.
    """
    found = {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem.", "vllm_", "plasma"))}
    for process in psutil.process_iter(["ppid", "name", "cmdline"]):
        words = " ".join([process.info["name"] or "", *(process.info["cmdline"] or [])])
        if (
            process.info["ppid"] == 1
            and lives(process)
            and "Agent" not in words
            and any(name in words for name in ("raylet", "ray::", "gcs_server", "VLLM::"))
        ):
            found.add(f"{process.pid} {words[:80]}")
    return found


def _sample_lines(store: Path) -> dict[str, list[bytes]]:
    lines = {
        path.name: [line for line in path.read_bytes().splitlines() if b'"sample"' in line]
        for path in store.glob("*.jsonl")
    }
    assert lines, "an empty store"
    return lines


def _run(script: Path, model: Path, store: Path, run_command: Callable, *what: str) -> tuple[dict, str]:
    done = run_command([sys.executable, script, model, store, *what], timeout=300)
    assert done.rc == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
def test_a_replica_killed_at_work_costs_nothing_but_time(
    script: Path, in_process: dict, tiny_base: Path, tmp_path: Path, run_command: Callable
) -> None:
    """And the samples are, byte for byte, those of one engine in process."""
    seen, stderr = _run(script, tiny_base, tmp_path, run_command, "2", "kill")
    assert seen["killed"] == 1 and seen["generated"] == 96
    assert "warning: replica" in stderr and "ActorDied" in stderr
    assert len(in_process) == 6 and sum(map(len, in_process.values())) == 96
    assert _sample_lines(tmp_path) == in_process


@pytest.mark.slow
@pytest.mark.parametrize("num_replicas", [pytest.param("1", marks=pytest.mark.nightly), "3"])
def test_one_and_three_replicas_write_what_one_engine_in_process_writes(
    script: Path, in_process: dict, tiny_base: Path, tmp_path: Path, run_command: Callable, num_replicas: str
) -> None:
    seen, stderr = _run(script, tiny_base, tmp_path, run_command, num_replicas, "nothing")
    assert seen["generated"] == 96 and len(seen["setups"]) == 1 and "warning: replica" not in stderr
    assert seen["setups"][0]["all_sequences_fit"]
    assert _sample_lines(tmp_path) == in_process


@pytest.mark.nightly
@pytest.mark.slow
def test_tensor_parallel_replicas_agree_with_one_process_up_to_rounding(
    script: Path, in_process: dict, tiny_base: Path, tmp_path: Path, run_command: Callable
) -> None:
    """Sums are taken in another order: nearly every text is the same, log-probs to 1e-4."""
    _run(script, tiny_base, tmp_path, run_command, "1", "parallel")
    one, two = (
        {s["key"]: s for lines in found.values() for s in (json.loads(line)["sample"] for line in lines)}
        for found in (in_process, _sample_lines(tmp_path))
    )
    assert one.keys() == two.keys() and len(one) == 96
    same = [key for key in one if one[key]["token_ids"] == two[key]["token_ids"]]
    assert len(same) >= 90
    apart = [abs(a - b) for key in same for a, b in zip(one[key]["logp"], two[key]["logp"], strict=True)]
    assert 0 < max(apart) < 1e-4, "equal to the last bit: was the model split at all?"


@pytest.mark.slow
@pytest.mark.parametrize(
    "sign",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.nightly),
        pytest.param(signal.SIGTERM, marks=pytest.mark.nightly),
        signal.SIGKILL,
    ],
)
def test_a_run_ended_by_a_signal_leaves_nothing_and_keeps_its_shards(
    script: Path, tiny_base: Path, tmp_path: Path, sign: signal.Signals
) -> None:
    """SIGINT goes to the whole group, as Ctrl-C does."""
    command = [sys.executable, str(script), str(tiny_base), str(tmp_path), "2", "wait"]
    with open(tmp_path / "err", "w") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, start_new_session=True)
    try:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("READY"):
                break
        if sign == signal.SIGINT:
            os.killpg(process.pid, sign)
        else:
            process.send_signal(sign)
        assert process.wait(120) != 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert _sample_lines(tmp_path)
