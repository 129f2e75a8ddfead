"""The step runner on small real processes: order, reuse, what makes a step run again, kills, failures."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from process_helpers import with_id

from verl_dft.end_processes import lives, still_running
from verl_dft.errors import InputError
from verl_dft.steps import Step, StepError, StepRunner

_WRITE = "import pathlib,sys; p=pathlib.Path(sys.argv[1]); p.parent.mkdir(parents=True,exist_ok=True); "


def writer(root: Path, name: str, text: str = "x", needs: tuple[str, ...] = (), inputs: tuple[Path, ...] = ()) -> Step:
    """Appends a line to the run's own history, then writes ``text`` to ``<root>/NAME/out``."""
    out = root / name / "out"
    code = _WRITE + f"open({str(root / 'history')!r},'a').write({name!r}+'\\n'); p.write_text({text!r}); print('said')"
    return Step(name, (sys.executable, "-c", code, str(out)), root / name, (out,), inputs, needs)


def history(root: Path) -> list[str]:
    path = root / "history"
    return path.read_text().split() if path.exists() else []


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


def run(root: Path, steps: list[Step], at_once: int = 1) -> tuple[dict, list[str]]:
    lines: list[str] = []
    return StepRunner(root, at_once, echo=lines.append).run(steps), lines


def test_steps_run_in_the_order_of_their_needs_and_once(root):
    steps = [writer(root, "c", needs=("a", "b")), writer(root, "b", needs=("a",)), writer(root, "a")]
    records, lines = run(root, steps)
    assert history(root) == ["a", "b", "c"]
    assert not any(record["reused"] for record in records.values())
    assert "said" in (root / "logs" / "a.log").read_text()
    assert [line for line in lines if line.startswith("[00:0")] == lines
    records, lines = run(root, steps)
    assert history(root) == ["a", "b", "c"] and all(record["reused"] for record in records.values())
    assert all("reused" in line for line in lines) and len(lines) == 3


def test_a_change_runs_the_step_and_what_depends_on_it(root):
    run(root, [writer(root, "a"), writer(root, "b", needs=("a",)), writer(root, "other")])
    leftover = root / "a" / "of the old configuration"
    leftover.touch()
    records, _ = run(root, [writer(root, "a", "y"), writer(root, "b", needs=("a",)), writer(root, "other")])
    assert history(root)[3:] == ["a", "b"] and records["other"]["reused"]
    assert not leftover.exists() and (root / "a" / "out").read_text() == "y"


def test_a_changed_input_or_a_damaged_output_runs_the_step(root, tmp_path):
    source = tmp_path / "source"
    source.write_text("1")
    steps = [writer(root, "a", inputs=(source,))]
    run(root, steps)
    source.write_text("2")
    run(root, steps)
    assert history(root) == ["a", "a"]
    (root / "a" / "out").write_text("damaged")
    run(root, steps)
    assert history(root) == ["a", "a", "a"] and (root / "a" / "out").read_text() == "x"
    (root / "a" / "out").unlink()
    run(root, steps)
    assert history(root) == ["a"] * 4


def test_a_failure_names_the_log_and_ends_the_others(root):
    bad = Step("bad", (sys.executable, "-c", "print('why it failed'); raise SystemExit(3)"), root / "bad", ())
    slow = Step("slow", (sys.executable, "-c", "import time; time.sleep(60)"), root / "slow", ())
    runner = StepRunner(root, 2, echo=lambda line: None)
    before = set(psutil.Process().children())
    begun = time.monotonic()
    with pytest.raises(StepError, match=r"step bad failed .*exit code 3.*logs/bad\.log"):
        runner.run([slow, bad])
    assert time.monotonic() - begun < 30
    assert runner.failed == bad and "why it failed" in runner.log(bad).read_text()
    started = set(psutil.Process().children()) - before  # other tests keep a server of their own
    assert not [p for p in started if lives(p)]


def test_a_step_that_writes_nothing_fails(root):
    step = Step("a", (sys.executable, "-c", "pass"), root / "a", (root / "a" / "out",))
    with pytest.raises(StepError, match="did not write"):
        run(root, [step])


@pytest.mark.slow
def test_at_once(root):
    code = "import time; time.sleep(0.8)"
    steps = [Step(name, (sys.executable, "-c", code), root / name, ()) for name in "ab"]
    _, lines = run(root, steps, at_once=2)
    assert ["started" in line for line in lines[:2]] == [True, True], lines
    _, lines = run(root / "in turn", [Step(s.name, s.command, root / "in turn" / s.name, ()) for s in steps], 1)
    assert ["started" in line for line in lines] == [True, False, True, False]


_DRIVER = """
import sys
from pathlib import Path
from verl_dft.steps import Step, StepRunner
root = Path(sys.argv[1])
code = '''
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True, exist_ok=True)
if (folder / "half").exists():
    (folder / "out").write_text("continued")
else:
    (folder / "half").write_text(str(os.getpid()))
    time.sleep(120)
'''
step = Step("a", (sys.executable, "-c", code, str(root / "a")), root / "a", (root / "a" / "out",))
StepRunner(root).run([step])
"""


def test_killed_it_leaves_nobody_behind_and_continues_in_the_same_folder(root, tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(_DRIVER)
    first = subprocess.Popen([sys.executable, script, root], stdout=subprocess.DEVNULL)
    half = root / "a" / "half"
    deadline = time.monotonic() + 30
    while not (half.exists() and half.read_text()):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    child = int(half.read_text())
    with pytest.raises(InputError, match="another process"):
        run(root, [writer(root, "a")])
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not still_running(lambda: with_id(child), 10), "the step outlived its killed parent"
    done = subprocess.run([sys.executable, script, root], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "continued" in done.stdout, done.stderr
    assert (root / "a" / "out").read_text() == "continued"


def test_a_folder_with_something_else_in_it_is_left_alone(root):
    root.mkdir()
    (root / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        run(root, [writer(root, "a")])
    assert [path.name for path in root.iterdir()] == ["thesis.txt"]
