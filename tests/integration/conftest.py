"""Fixtures of the integration tests: the fork server, tiny models and rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
"""A model of 0.03M parameters: enough to tell right from wrong, and a step takes milliseconds."""

STEADY = "optim.override_optimizer_config={eps:1e-3}"
"""Adam's step for a gradient that is rounding noise (the key biases': attention ignores them) becomes small, so that
equal runs end with equal weights."""


TrainArgv = Callable[..., list[str]]
"""Type of the fixture ``train_argv``."""


@dataclass
class Finished:
    """Exit codes of the ranks and what they printed."""

    codes: list[int]
    log: str


class ForkServer:
    """Runs a function in forked ranks; see ``fork_server.py``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE,
            start_new_session=True,
        )

    def run(
        self,
        argv: Sequence[str],
        *,
        world: int = 1,
        call: str = "verl_dft.training.sft:main",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 120,
    ) -> Finished:
        """Call ``call(argv)`` in ``world`` ranks."""
        self.count += 1
        log = self.folder / f"{self.count}.log"
        request = {"call": call, "argv": list(argv), "world": world, "env": dict(env or {}), "log": str(log)}
        request["cwd"] = str(cwd) if cwd else None
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({**request, "timeout": timeout}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the fork server died"
        return Finished(json.loads(answer)["codes"], log.read_text(errors="replace") if log.exists() else "")

    def ok(self, argv: Sequence[str], **kwargs: object) -> str:
        """Like :meth:`run`; every rank must exit with 0."""
        finished = self.run(argv, **kwargs)  # type: ignore[arg-type]
        assert set(finished.codes) == {0}, f"{finished.codes}\n{finished.log[-4000:]}"
        return finished.log


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """The session's fork server."""
    server = ForkServer(tmp_path_factory.mktemp("fork_server"))
    yield server
    assert server.process.stdin
    server.process.stdin.close()
    try:
        server.process.wait(20)
    except subprocess.TimeoutExpired:
        server.process.kill()


def sharpened(folder: Path) -> Path:
    """Scale the output layer of a random model up, so that it has opinions: DFT's weights then range over (0, 1)."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name] * 20
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with tied embeddings."""
    from verl_dft.tiny import init_model

    return sharpened(init_model(tmp_path_factory.mktemp("models") / "tied", seed=0, **SMALL))


@pytest.fixture(scope="session")
def tiny_base() -> Path:
    """The tiny world's base model, which the project ships."""
    from verl_dft.paths import recipes_dir

    return recipes_dir() / "tiny" / "base"


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like ``small_model`` with other weights: a reference policy that differs from the start."""
    from verl_dft.tiny import init_model

    return init_model(tmp_path_factory.mktemp("models") / "other", seed=5, **SMALL)


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with an output embedding of its own."""
    from verl_dft.tiny import init_model

    return sharpened(init_model(tmp_path_factory.mktemp("models") / "untied", seed=1, tied=False, **SMALL))


@pytest.fixture(scope="session")
def uneven_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 rows of about 5 to 200 tokens, in no order."""
    from verl_dft.data.records import Row, write_rows

    rng = np.random.default_rng(0)
    rows = []
    for index in range(40):
        words = int(np.exp(rng.uniform(np.log(1), np.log(95))))
        text = " ".join(str(rng.integers(0, 60)) for _ in range(2 * words))
        messages = [{"role": "user", "content": "How many ?"}, {"role": "assistant", "content": " " + text}]
        rows.append(Row(messages=messages, problem_id=f"p{index}", origin="expert"))
    path = tmp_path_factory.mktemp("rows") / "uneven.parquet"
    write_rows(path, rows)
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenised rows shared by the session's runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def train_argv(small_model: Path, uneven_rows: Path, cache_dir: Path) -> TrainArgv:
    """``train_argv(out, *overrides, model=…, rows=…)``: what runs of ``verl-dft train`` here have in common."""

    def build(out: Path, *overrides: str, model: Path = small_model, rows: Path | str = uneven_rows) -> list[str]:
        named = any(override.startswith("objective") for override in overrides)
        return [
            *([] if named else ["objective=dft"]),
            f"model={model}",
            f"data={rows}",
            f"data.cache_dir={cache_dir}",
            "data.max_length=256",
            "data.train_batch_size=8",
            "trainer.logger=[]",
            "optim.lr=1e-2",
            f"output_dir={out}",
            *overrides,
        ]

    return build


def losses(output: Path, key: str = "train/loss") -> list[float]:
    """The values of a metric by step, from ``metrics.jsonl``."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def weights(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of an exported model, as float32."""
    from safetensors.torch import load_file

    return {name: value.float().numpy() for name, value in load_file(folder / "model.safetensors").items()}


def turn_a_bit(file: Path) -> None:
    """One in the middle of a file, which is a weight's; a second call turns it back."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def assert_same_weights(a: Path, b: Path, atol: float) -> None:
    """Both exports hold the same tensors within ``atol``."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=atol, rtol=0, err_msg=name)
