"""Commands in a shared process, as the runner of steps sees them."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from verl_dft.step_server import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with open(tmp_path / "start.log", "ab") as log:
        server = Server("evaluate", {"VERL_DFT_HARDWARE": "cpu"}, log.fileno())
    yield server
    server.close()


def processes() -> list[psutil.Process]:
    return [child for child in psutil.Process(os.getpid()).children() if "evaluate" in child.cmdline()]


def ended(server: Server) -> int:
    end = time.monotonic() + 60
    while (code := server.poll()) is None:
        assert time.monotonic() < end
        time.sleep(0.02)
    return code


@pytest.mark.slow
def test_commands_run_one_after_the_other_each_with_its_log(server: Server, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert server.idle
        served = server.start(["evaluate", f"model=no/{name}", "nonsense=1"], tmp_path / f"{name}.log")
        assert ended(server) == 2 == served.poll()
        assert (tmp_path / f"{name}.log").read_text().startswith("error: ")
    assert server.idle


def test_a_process_that_died_is_a_failed_command(server: Server, tmp_path: Path) -> None:
    served = server.start(["evaluate"], tmp_path / "a.log")
    (child,) = processes()
    child.kill()
    assert ended(server) == -9 == served.poll() and not server.idle


def test_an_ended_server_leaves_nothing(server: Server, tmp_path: Path) -> None:
    served = server.start(["evaluate"], tmp_path / "a.log")
    (child,) = processes()
    served.terminate()
    assert not child.is_running() and not server.idle
    server.close()
