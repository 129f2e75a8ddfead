"""Break the objectives on purpose, one small change at a time, and see that a test fails each time.

    python scripts/mutation_check.py [--jobs 2] [FILE …]

Each mutant is one change to one file of `verl_dft/objectives`: a stop-gradient, clamp, mask or normaliser dropped, a
comparison, sign or default changed, a check taken out. Nothing is written to the tree: a process is forked for each
mutant, the mutated source is put in the place of the module there, and pytest runs the objectives' tests until one
fails. Prints a table and exits with 1 if a mutant survives that is not listed as equivalent in `mutations.py`.
"""

import argparse
import functools
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is used here, and each would be imported for each mutant

from mutations import EQUIVALENT, Mutant, mutants_of  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "verl_dft" / "objectives"
OWN_TESTS = {
    "batch.py": "tests/contract",
    "chord.py": "tests/unit/test_objective_weights.py",
    "eaft.py": "tests/unit/test_objective_weights.py",
    "focal.py": "tests/unit/test_objective_weights.py",
    "options.py": "tests/unit/test_objective_options.py",
    "__init__.py": "tests/unit/test_objective_registry.py",
    "dft.py": "tests/unit/test_dft.py",
    "sft.py": "tests/unit/test_dft.py",
}
"""The tests to try first, where it is not ``tests/unit/test_objective_<file>``; then all of these are run."""
TIMEOUT_S = 120


def all_tests() -> list[str]:
    """Every fast test of the objectives, in the order in which they are likeliest to see a fault."""
    units = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests/unit").glob("test_objective_*.py"))
    return ["tests/unit/test_objective_options.py", *units, "tests/unit/test_dft.py", "tests/contract", "tests/parity"]


class MutantLoader(importlib.machinery.SourceFileLoader):
    """Loads a module from changed source, and from no cache."""

    source = ""

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)


class MutantFinder(importlib.abc.MetaPathFinder):
    """Finds the one module that is to be replaced."""

    def __init__(self, module: str, path: Path, source: str) -> None:
        self.module, self.path, self.source = module, path, source

    def find_spec(self, fullname, path, target=None):  # noqa: ANN001, ANN201 (importlib's interface)
        if fullname != self.module:
            return None
        loader = MutantLoader(fullname, str(self.path))
        loader.source = self.source
        return importlib.util.spec_from_file_location(fullname, self.path, loader=loader)


class FirstFailure:
    """A pytest plugin that remembers which test failed."""

    nodeid = ""

    def pytest_runtest_logreport(self, report) -> None:  # noqa: ANN001
        if report.failed and not self.nodeid:
            self.nodeid = report.nodeid

    def pytest_collectreport(self, report) -> None:  # noqa: ANN001
        if report.failed and not self.nodeid:
            self.nodeid = f"{report.nodeid} (import)"


def run_tests(mutant: Mutant | None, answer: Path) -> None:
    """In a process of its own: run the tests on the mutant and write the first that fails, or nothing."""
    import pytest

    stages = [all_tests()]
    if mutant:
        name = mutant.file.removesuffix(".py")
        module = "verl_dft.objectives" + ("" if name == "__init__" else f".{name}")
        sys.meta_path.insert(0, MutantFinder(module, FOLDER / mutant.file, mutant.source))
        stages.insert(0, [OWN_TESTS.get(mutant.file, f"tests/unit/test_objective_{name}.py")])
    failed = ""
    for tests in stages:
        watch = FirstFailure()
        code = pytest.main(["-x", "-q", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider", *tests], [watch])
        failed = watch.nodeid or ("" if code == 0 else f"pytest exit {code}")
        if failed:
            break
    answer.write_text(json.dumps(failed))


def start(mutant: Mutant | None, folder: Path) -> tuple[int, Path]:
    """Fork a process for a mutant; its number and where its answer will be."""
    handle, name = tempfile.mkstemp(dir=folder)
    os.close(handle)
    answer = Path(name)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            output = os.open(str(answer) + ".log", os.O_CREAT | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            run_tests(mutant, answer)
        finally:
            os._exit(0)
    return pid, answer


def preload() -> None:
    """Import what every mutant's process needs, and nothing of ours; and look installed packages through only once."""
    import omegaconf  # noqa: F401
    import psutil  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401

    importlib.metadata.entry_points = functools.lru_cache(importlib.metadata.entry_points)
    assert not any(name.startswith("verl_dft") for name in sys.modules)


def judge(mutants: list[Mutant | None], jobs: int, folder: Path) -> Iterator[tuple[Mutant | None, str, str]]:
    """Run every mutant, ``jobs`` at a time; yields it, the test that failed ("" if none) and the log."""
    waiting, running = list(reversed(mutants)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            pid, answer = start(mutant, folder)
            running[pid] = (mutant, answer, time.monotonic())
        time.sleep(0.02)
        for pid, (mutant, answer, begun) in list(running.items()):
            late = time.monotonic() - begun > TIMEOUT_S
            if late:
                os.kill(pid, signal.SIGKILL)
            done, _ = os.waitpid(pid, 0 if late else os.WNOHANG)
            if done:
                del running[pid]
                text = answer.read_text()
                log = Path(f"{answer}.log").read_text(errors="replace")
                yield mutant, json.loads(text) if text else ("timeout" if late else "crash"), log


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", help="file names in verl_dft/objectives (default: all)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    args = parser.parse_args()
    files = [FOLDER / name for name in args.files] or sorted(FOLDER.glob("*.py"))
    mutants = [mutant for path in files for mutant in mutants_of(path)]
    if args.list:
        print(*(f"{m.file}:{m.line}  {m.change}" for m in mutants), sep="\n")
        return 0
    os.chdir(ROOT)
    preload()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for _, failed, log in judge([None], 1, Path(folder)):
            if failed:
                sys.exit(f"the tests fail without any mutation: {failed}\n{log[-3000:]}")
        survived = report(judge(list(mutants), args.jobs, Path(folder)), len(mutants))
    print(f"{time.monotonic() - started:.0f} s")
    return 1 if survived else 0


def report(results: Iterator[tuple[Mutant | None, str, str]], total: int) -> int:
    """Print a line per mutant and a summary per file; the number of unexplained survivors."""
    counts: dict[str, Counter] = {}
    for done, (mutant, failed, _) in enumerate(results, 1):
        assert mutant
        reason = EQUIVALENT.get((mutant.file, mutant.change))
        state = "killed" if failed else "equivalent" if reason else "survived"
        counts.setdefault(mutant.file, Counter())[state] += 1
        verdict = {"killed": failed.removeprefix("tests/"), "equivalent": f"equivalent: {reason}"}.get(
            state, "SURVIVED"
        )
        print(f"{done}/{total}  {mutant.file}:{mutant.line}  {mutant.change}  |  {verdict}", flush=True)
    print("\n| file | mutants | killed | equivalent | survived |\n|---|---|---|---|---|")
    for file, c in sorted(counts.items()):
        print(f"| {file} | {sum(c.values())} | {c['killed']} | {c['equivalent']} | {c['survived']} |")
    whole = sum(counts.values(), Counter())
    print(f"| all | {total} | {whole['killed']} | {whole['equivalent']} | {whole['survived']} |")
    return whole["survived"]


if __name__ == "__main__":
    sys.exit(main())
