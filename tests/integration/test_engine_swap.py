"""One engine for several checkpoints: with other weights it writes what a new engine on them writes."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import sharpened

pytestmark = [pytest.mark.integration, pytest.mark.alone]

_REQUESTS = """
import json, random, sys
from dataclasses import asdict
import numpy as np
from verl_dft.errors import InputError
from verl_dft.sampling.engine import SampleRequest, VLLMEngine
from verl_dft.sampling.shared import EngineHost

def requests(n=40):
    draw = random.Random(0)
    prompts = [[draw.randrange(5, 60) for _ in range(draw.randrange(3, 20))] for _ in range(n)]
    return [SampleRequest(prompt, i, max_tokens=30, want_logp=True) for i, prompt in enumerate(prompts)]

def texts(source):
    return [asdict(text) for text in source.generate(requests())]
"""

_SWAP_SCRIPT = (
    _REQUESTS
    + """
def main():
    first, second, dtype = sys.argv[1:]
    with VLLMEngine(second, dtype=dtype, max_model_len=64) as engine:
        new = texts(engine)
    with VLLMEngine(first, dtype=dtype, max_model_len=64) as engine:
        before = texts(engine)
        engine.load(second)
        swapped = texts(engine)
        engine.load(first)
        back = texts(engine)
        try:
            engine.load(first + "/none")
        except InputError as error:
            refused = str(error)
        still = texts(engine)
    print(json.dumps({
        "swapped_is_new": swapped == new, "back_is_before": back == before == still, "refused": refused,
        "weights_matter": sum(a["token_ids"] != b["token_ids"] for a, b in zip(before, new)),
        "lengths": len({text["finish_reason"] for text in new}),
    }))

if __name__ == "__main__":
    main()
"""
)

_HOST_SCRIPT = (
    _REQUESTS
    + """
def main():
    first, second, wide, dtype = *sys.argv[1:4], "float32"
    def fresh(model):
        with VLLMEngine(model, dtype=dtype, max_model_len=64) as engine:
            return texts(engine)
    options, log, right = {"dtype": dtype, "seed": 3}, [], []
    expected = {model: fresh(model) for model in (first, second, wide)}
    with EngineHost(max_model_len=96) as host:
        def job(model, length=64, **changes):
            with host.open(model, options | changes, length) as source:
                right.append(texts(source) == expected[model])
            log.append([host.num_started, host.num_swapped, source.max_model_len])
        assert host.num_started == 0
        job(first)
        job(first, 96)
        job(second)
        job(first, max_num_seqs=128)  # other options
        job(second, 100, max_num_seqs=128)  # longer than announced
        job(wide)  # another shape
        try:
            with host.open(wide, options, 64) as source:
                source.generate([SampleRequest([5] * 2000, 0)])
        except InputError as error:
            log.append(str(error))
        job(wide)
    print(json.dumps({"log": log, "right": right}))

if __name__ == "__main__":
    main()
"""
)


def _other_weights(folder: Path, target: Path) -> Path:
    """A copy with every weight moved a little."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, target)
    draw = np.random.default_rng(1)
    tensors = load_file(target / "model.safetensors")
    moved = {k: v + (0.3 * v.std() * draw.standard_normal(v.shape)).astype(v.dtype) for k, v in tensors.items()}
    save_file(moved, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models with opinions; vLLM's CPU kernels want heads of 32."""
    from verl_dft.tiny import init_model

    size = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = tmp_path_factory.mktemp("swap")
    return {
        "tied": sharpened(init_model(folder / "tied", seed=0, **size)),
        "untied": sharpened(init_model(folder / "untied", seed=1, tied=False, **size)),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("tied", "float32"),
        pytest.param("untied", "float32", marks=pytest.mark.nightly),
        pytest.param("tied", "bfloat16", marks=pytest.mark.nightly),
    ],
)
def test_an_engine_with_other_weights_writes_what_a_new_engine_writes(
    models: dict[str, Path], tmp_path: Path, run_command: Callable, kind: str, dtype: str
) -> None:
    """To the last bit of every log-prob, with packed weights and an output layer tied to the embedding or not."""
    first = models[kind]
    (tmp_path / "swap.py").write_text(_SWAP_SCRIPT)
    second = _other_weights(first, tmp_path / "second")
    done = run_command([sys.executable, tmp_path / "swap.py", first, second, dtype], timeout=300)
    assert done.rc == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["swapped_is_new"] and seen["back_is_before"]
    assert seen["weights_matter"] > 20, "both models say the same: a weak test"
    assert "is not a folder" in seen["refused"]


@pytest.mark.slow
@pytest.mark.nightly
def test_the_host_starts_an_engine_only_where_the_last_one_cannot_go_on(
    models: dict[str, Path], tmp_path: Path, run_command: Callable
) -> None:
    second = _other_weights(models["tied"], tmp_path / "second")
    (tmp_path / "host.py").write_text(_HOST_SCRIPT)
    done = run_command([sys.executable, tmp_path / "host.py", models["tied"], second, models["untied"]], timeout=300)
    assert done.rc == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert all(seen["right"]) and len(seen["right"]) == 7
    refused = seen["log"].pop(6)
    assert "prompt 0 has 2000 tokens" in refused
    # engines started, weights changed, longest text: after each job
    assert seen["log"] == [[1, 0, 96], [1, 0, 96], [1, 1, 96], [2, 1, 96], [3, 1, 100], [4, 1, 96], [5, 1, 96]]


_REPLICA_SCRIPT = (
    _REQUESTS
    + """
def main():
    models, right = sys.argv[1:], []
    expected = {}
    for model in models:
        with VLLMEngine(model, dtype="float32", max_model_len=64) as engine:
            expected[model] = texts(engine)
    with EngineHost() as host:
        for model in (*models, models[0]):
            with host.open(model, {"dtype": "float32"}, 64, num_replicas=2) as source:
                shards = [requests()] * 6
                for _, shard, _, _ in source.generate_shards(shards):
                    right.append([asdict(text) for text in shard] == expected[model])
        print(json.dumps({"right": right, "counts": [host.num_started, host.num_swapped]}))

if __name__ == "__main__":
    main()
"""
)


@pytest.mark.slow
@pytest.mark.nightly
def test_replicas_take_other_weights_too(models: dict[str, Path], tmp_path: Path, run_command: Callable) -> None:
    (tmp_path / "replicas.py").write_text(_REPLICA_SCRIPT)
    second = _other_weights(models["tied"], tmp_path / "second")
    done = run_command([sys.executable, tmp_path / "replicas.py", models["tied"], second], timeout=300)
    assert done.rc == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen == {"right": [True] * 18, "counts": [1, 2]}
