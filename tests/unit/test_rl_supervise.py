"""Whatever becomes of a run's driver or of the command, nothing is left: processes with sessions of their own included.

The command and the driver are scripts here, which start what Ray and vLLM would.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from process_helpers import with_id

from verl_dft.end_processes import lives, still_running
from verl_dft.platform.shared_memory import shared_memory_files

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="orphans are adopted on Linux alone"),
    pytest.mark.usefixtures("only_sweeper"),
]

COMMAND = """
import sys
from pathlib import Path
from verl_dft.training.online import remains, supervise
remains._LEAVING_S = 0.5
supervise._ENDING_S = 1.0
folder = Path(sys.argv[1])
driver = [sys.executable, str(folder / "driver.py"), str(folder)]
try:
    sys.exit(supervise.supervise(driver, {"MARK": "1"}, folder, folder))
except KeyboardInterrupt:
    sys.exit(41)
"""

DRIVER = """
import os, signal, subprocess, sys, time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
folder = Path(sys.argv[1])
SLEEP = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(120)"]
def leave(count=2):
    # a daemon in a session of its own whose parent is gone, its environment cleared; and shared memory of nobody
    for number in range(count):
        if os.fork() == 0:
            os.setsid()
            started = subprocess.Popen(SLEEP, start_new_session=True, env={"PATH": os.environ["PATH"]})
            (folder / f"{number}.new").write_text(str(started.pid))
            (folder / f"{number}.new").rename(folder / f"{number}.pid")
            os._exit(0)
    memory = SharedMemory(create=True, size=64)
    resource_tracker.unregister(memory._name, "shared_memory")
    (folder / "shared").write_text(memory.name)
    while len(list(folder.glob("*.pid"))) < count:
        time.sleep(0.01)
    (folder / "ready").touch()
"""


class Script:
    """The command with a driver that does ``body``."""

    def __init__(self, folder: Path, body: str) -> None:
        (folder / "driver.py").write_text(DRIVER + body)
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(folder)], stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def ready(self) -> list[psutil.Process]:
        """Wait for the driver's ``leave``; the processes that it left."""
        deadline = time.monotonic() + 30
        while not (self.folder / "ready").exists():
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.02)
        return [psutil.Process(int(path.read_text())) for path in self.folder.glob("*.pid")]

    def end(self, timeout: float = 30) -> tuple[int, str]:
        """Exit code and last line."""
        _, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, (err.splitlines() or [""])[-1]

    def assert_clean(self) -> None:
        for path in self.folder.glob("*.pid"):
            assert not still_running(partial(with_id, int(path.read_text())), 0)
        assert (self.folder / "shared").read_text() not in shared_memory_files()


@pytest.fixture
def script(tmp_path: Path) -> Iterator:
    made: list[Script] = []

    def build(body: str) -> Script:
        made.append(Script(tmp_path, body))
        return made[-1]

    yield build
    for one in made:
        one.process.kill()
        one.process.wait()
        for path in tmp_path.glob("*.pid"):
            if psutil.pid_exists(int(path.read_text())):
                os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_codes_that_the_driver_explains_are_passed_on(script, code: int) -> None:
    run = script(f"leave(); print('told', file=sys.stderr); sys.exit({code} if os.environ['MARK'] == '1' else 9)")
    assert run.end() == (code, "told")
    run.assert_clean()


def test_a_killed_driver_is_told_of(script, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    run = script("leave(); os.kill(os.getpid(), signal.SIGKILL)")
    code, line = run.end()
    assert code == 1
    assert line == (
        "error: the run's driver was ended by signal 9 (SIGKILL) after step 2; run the same command again to start "
        "over, no checkpoint having been saved"
    )
    run.assert_clean()


def test_an_exit_code_that_nobody_explains(script) -> None:
    code, line = script("sys.exit(143)").end()
    assert code == 1 and line.startswith("error: the run's driver ended with exit code 143 before the end of the first")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("deaf", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["hears", "deaf"])
def test_interrupted(script, number: signal.Signals, deaf: bool) -> None:
    """A driver that does not hear is killed; a second signal meanwhile changes nothing."""
    handler = "signal.SIG_IGN" if deaf else "lambda *_: ((folder / 'asked').touch(), sys.exit(1))"
    run = script(f"signal.signal(signal.SIGTERM, {handler}); leave(); time.sleep(100)")
    left = run.ready()
    run.process.send_signal(number)
    time.sleep(0.4)
    run.process.send_signal(signal.SIGINT)
    assert run.end()[0] == 41
    run.assert_clean()
    assert not any(lives(process) for process in left)
    assert (run.folder / "asked").exists() != deaf


def test_the_driver_cleans_up_after_a_killed_command(script) -> None:
    run = script(
        "from verl_dft.training.online import remains\n"
        "from verl_dft.processes import end_with_parent\n"
        "remains._LEAVING_S = 0.5\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        "end_with_parent(signal.SIGTERM)\n"
        "kept = remains.Remains()\n"
        "try:\n    leave()\n    time.sleep(100)\nfinally:\n    kept.end()\n    (folder / 'cleaned').touch()\n"
    )
    run.ready()
    run.process.kill()
    run.process.communicate(timeout=20)
    deadline = time.monotonic() + 20
    while not (run.folder / "cleaned").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    run.assert_clean()


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "from verl_dft.training.online import remains as module\n"
        "module._LEAVING_S = 0.1\n"
        "old = subprocess.Popen(['sleep', '60'])\n"
        "remains = module.Remains()\n"
        "new = subprocess.Popen(['sleep', '60'])\n"
        "assert [p.pid for p in remains.processes()] == [new.pid]\n"
        "remains.end()\n"
        "assert new.poll() is not None and old.poll() is None\n"
        "old.kill()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
