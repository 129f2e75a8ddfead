"""Commands in a shared process, as the runner of steps sees them."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from verl_dft.step_server import PREFIX, Served, Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with open(tmp_path / "start.log", "ab") as log:
        server = Server("evaluate", {"VERL_DFT_HARDWARE": "cpu"}, log.fileno(), tmp_path)
    yield server
    server.close()


def processes() -> list[psutil.Process]:
    return [child for child in psutil.Process(os.getpid()).children() if "evaluate" in child.cmdline()]


def ended(served: Served) -> int:
    end = time.monotonic() + 60
    while (code := served.poll()) is None:
        assert time.monotonic() < end
        time.sleep(0.02)
    return code


@pytest.mark.slow
def test_commands_run_one_after_the_other_each_with_its_log_and_code(server: Server, tmp_path: Path) -> None:
    """Also where the first one's code is asked for only after the second has begun."""
    first = server.start(["evaluate", "model=no/a", "nonsense=1"], tmp_path / "a.log")
    end = time.monotonic() + 60
    while not server.idle:
        assert time.monotonic() < end
        time.sleep(0.02)
    second = server.start(["evaluate", "model=no/b", "benchmark=nonsense"], tmp_path / "b.log")
    assert first.poll() == 2 and ended(second) == 2
    for name in ("a", "b"):
        assert (tmp_path / f"{name}.log").read_text().startswith("error: ")
    assert server.idle
    server.close()
    assert server.poll() == 0 and not list(tmp_path.glob(f"{PREFIX}*")), "ended by itself, and left nothing"


def test_a_process_that_died_is_a_failed_command(server: Server, tmp_path: Path) -> None:
    served = server.start(["evaluate"], tmp_path / "a.log")
    (child,) = processes()
    child.kill()
    assert ended(served) == -9 == server.poll() and not server.idle
    server.close()
    assert not list(tmp_path.glob(f"{PREFIX}*"))


def test_an_ended_server_leaves_nothing(server: Server, tmp_path: Path) -> None:
    served = server.start(["evaluate"], tmp_path / "a.log")
    (child,) = processes()
    served.terminate()
    assert not child.is_running() and not server.idle and not list(tmp_path.glob(f"{PREFIX}*"))
