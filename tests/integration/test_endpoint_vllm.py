"""The endpoint source against vLLM's own server of the tiny base: the texts of the engine in this process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from verl_dft.end_processes import still_running
from verl_dft.errors import InputError
from verl_dft.sampling.endpoint import EndpointSource
from verl_dft.sampling.engine import SampleRequest

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]

_START_S = 240
_MAX_TOKENS = 40

# What the engine in one process answers, greedily and in float32; a process of its own, as vLLM changes its process.
_ENGINE_SCRIPT = """
import json, sys
from verl_dft.data.sources import load_tokenizer
from verl_dft.data.template import ConversationEncoder
from verl_dft.sampling.engine import SampleRequest, VLLMEngine

def main():
    model, asked, max_tokens, path = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    encoder = ConversationEncoder(load_tokenizer(model))
    prompts = encoder.encode_prompts(asked, str)
    stop = sorted(encoder.end_ids)
    requests = [SampleRequest(p, 0, 0.0, max_tokens=max_tokens, stop_token_ids=stop) for p in prompts]
    with VLLMEngine(model, dtype="float32", max_model_len=256, kv_cache_gib=0.06) as engine:
        texts = engine.generate(requests)
    json.dump([[text.text, text.finish_reason, text.num_tokens] for text in texts], open(path, "w"))

if __name__ == "__main__":
    main()
"""


def _conversations() -> list[list[dict[str, str]]]:
    from verl_dft.data.arithmetic import heldout_problems

    return [[{"role": "user", "content": problem.problem}] for problem in heldout_problems(24, seed=3)]


@pytest.fixture(scope="module")
def short_folder() -> Iterator[str]:
    """For vLLM's sockets, which it leaves behind and whose paths have a largest length."""
    with tempfile.TemporaryDirectory(prefix="v") as folder:
        yield folder


@pytest.fixture(scope="module")
def expected(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, run_command: Callable, short_folder: str
) -> list[list[Any]]:
    """Text, reason and number of tokens of each conversation, from the engine in one process."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "engine.py").write_text(_ENGINE_SCRIPT)
    command = [sys.executable, folder / "engine.py", tiny_base, json.dumps(_conversations()), str(_MAX_TOKENS)]
    done = run_command([*command, folder / "texts.json"], timeout=180, env={"TMPDIR": short_folder})
    assert done.rc == 0, done.stderr[-3000:]
    return json.loads((folder / "texts.json").read_text())


@pytest.fixture(scope="module")
def served(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, short_folder: str
) -> Iterator[tuple[str, Callable[[], None]]]:
    """The URL of a server of the tiny base, and what ends it."""
    log = tmp_path_factory.mktemp("server") / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_base)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    # as the engine in one process has it; without --generation-config the model's own defaults would fill the gaps
    command += ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "32", "--generation-config", "vllm"]
    command += ["--enforce-eager", "--block-size", "32", "--kv-cache-memory-bytes", str(64 * 2**20)]
    # the kernels of an engine whose weights are never replaced (verl_dft.platform.vllm_cpu)
    environment = {"VERL_DFT_VLLM_PREPACK": "1", "VLLM_HOST_IP": "127.0.0.1", "TMPDIR": short_folder}
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=os.environ | environment,
            start_new_session=True,
        )
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1", lambda: _end(process)
    finally:
        _end(process)


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(2 * _START_S):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            opener.open(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"not up after {_START_S} s:\n{log.read_text()[-3000:]}", pytrace=False)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server as its user would, and see that nothing of it stays: no process, no shared memory."""
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    shared = {Path(part.path) for member in family for part in member.memory_maps() if "/dev/shm/" in part.path}
    process.send_signal(signal.SIGINT)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    alive = still_running(lambda: family[1:], 30)
    for child in alive:
        child.kill()
    assert not alive and not [path for path in shared if path.exists()]


def test_a_served_model_answers_as_the_engine_does(
    expected: list[list[Any]], served: tuple[str, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    url, end = served
    source = EndpointSource(url, "tiny", concurrency=8, timeout_s=60, retries=1, backoff_s=0.1)

    def ask(
        turns: list[dict[str, str]], seed: int = 0, temperature: float = 0.0, max_tokens: int = 40
    ) -> SampleRequest:
        return SampleRequest((), seed, temperature, max_tokens=max_tokens, messages=turns)

    conversations = _conversations()
    texts = source.generate([ask(turns, max_tokens=_MAX_TOKENS) for turns in conversations])
    assert [[text.text, text.finish_reason, text.num_tokens] for text in texts] == expected
    assert {text.finish_reason for text in texts} == {"stop", "length"}, "only one way to end: a weak test"
    assert len({text.text for text in texts}) > 12, "the model says the same to everything: a weak test"
    assert source.notes() == []

    drawn = source.generate([ask(conversations[0], seed << 32, 1.0) for seed in range(16)])
    assert len({text.text for text in drawn}) > 4
    cut = source.generate([ask(conversations[0], max_tokens=3)])[0]
    assert (cut.finish_reason, cut.num_tokens) == ("length", 3)

    with pytest.raises(InputError, match=r"status 400: .*4000.* \[prompt: .*\]; change the setting"):
        source.generate([ask(conversations[0], max_tokens=4000)])
    with pytest.raises(InputError, match=r"status 404: The model `other` does not exist\.; .*a name that it serves"):
        EndpointSource(url, "other").generate([ask(conversations[0])])
    end()
    with pytest.raises(InputError, match=r"no connection \(Connection refused\) \(tried 2 times\)"):
        source.generate([ask(conversations[0])])
