"""One run that is disturbed: its folder and environment, its end, and what is to be said about the run after it."""

import os
import random
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faulting import judge
from faulting.scenarios import Scenario
from faulting.world import Run, start

HANG_S = 60.0


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: what it made, the failpoints it passed (how often one process did), its time and size."""

    result: Mapping[str, str]
    places: Mapping[str, int]
    seconds: float
    size: int


@dataclass
class Attempt:
    """One fault in the making. ``problems``: what should not have been; empty: all is well."""

    scenario: Scenario
    reference: Reference | None
    folder: Path
    given: Mapping[str, Any]
    env: Mapping[str, str]
    rng: random.Random
    mark: str
    problems: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    count: int = 0
    kept: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shown = self.given
        if self.scenario.input:  # each run has its own, which may be damaged; at the same place as the reference's
            own = self.folder / "input.parquet"
            shutil.copyfile(self.given[self.scenario.input], own)
            self.shown = {**self.given, self.scenario.input: own}

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def limit(self) -> float:
        """Seconds after which a run hangs."""
        return max(self.scenario.limit_s, 3 * self.reference.seconds + HANG_S) if self.reference else 900.0

    def start(self, failpoint: str | None = None) -> Run:
        """The command."""
        self.count += 1
        env = {**self.env, "VERL_DFT_CACHE": str(self.folder / "cache")}
        env["VERL_DFT_FAILPOINT"] = failpoint or ""
        argv = self.scenario.argv(self.out, self.shown)
        log = self.folder.parent / f"{self.count}.log"  # not on a disk that is to be full
        return start(self.scenario.call, argv, env, log, f"{os.getpid()}.{self.mark}.{self.count}", self.scenario.ranks)

    def end(self, run: Run, since: float | None = None) -> Run:
        """Wait for a run's end and clear up after it. ``since``: when the fault was, that it may not notice."""
        if not run.wait(self.limit):
            self.facts["hang"] = True
            self.problems.append(f"hung for more than {self.limit:.0f} s")
        elif since is not None and run.ended is not None:
            self.facts["detect_s"] = round(max(0.0, run.ended - since), 2)
            if run.code and self.facts["detect_s"] > HANG_S:
                self.facts["hang"] = True
                self.problems.append(f"noticed after {self.facts['detect_s']} s only")
        self._keep()
        if left := run.clear():
            self.facts["left_processes"] = self.facts.get("left_processes", 0) + len(left)
            self.problems.append(f"left over: {'; '.join(left)[:300]}")
        return run

    def _keep(self) -> None:
        """Whatever was safe after the run before must still be there as it was."""
        now = judge.safe(self.out)
        if gone := judge.lost(self.kept, now, frozenset(f"sample {key}" for key in self.facts.get("keys", ()))):
            self.facts["lost"] = self.facts.get("lost", 0) + len(gone)
            self.problems.append(f"lost: {', '.join(gone)[:300]}")
        self.kept = now

    def refused(self, run: Run, *names: str) -> None:
        """Check that a run ended with one clear line, with these in it."""
        line = judge.told(run.text)
        self.facts["told"] = line
        if run.code == 0 or line is None:
            self.problems.append(f"no clear error (exit code {run.code}): {run.text.strip()[-400:]}")
        elif missing := [name for name in names if name not in line]:
            self.problems.append(f"the error does not say {', '.join(missing)}: {line}")


def refer(a: Attempt) -> Reference:
    """An undisturbed run, with every failpoint that it passes."""
    trace = a.folder.parent / "trace"
    run = a.end(a.start(f"trace:{trace}"))
    assert run.code == 0 and not a.problems, f"{a.scenario.name}: {a.problems} {run.text[-3000:]}"
    passed: dict[str, Counter[str]] = {}
    for line in trace.read_text().splitlines() if trace.is_file() else []:
        pid, place = line.split(" ", 1)
        passed.setdefault(place, Counter())[pid] += 1
    places = {place: max(counts.values()) for place, counts in passed.items()}
    size = sum(path.stat().st_size for path in a.folder.rglob("*") if path.is_file())
    return Reference(judge.result(a.out), places, run.seconds, size)


def again(a: Attempt) -> None:
    """Run the command once more and compare what it has made with the reference."""
    assert a.reference is not None
    steps, kept = judge.whole_checkpoints(a.out), len(a.kept)
    trained = (a.out / "model" / "config.json").is_file()
    run = a.end(a.start())
    a.facts["again_s"] = round(run.seconds, 2)
    a.facts["kept"] = kept
    if run.code:
        a.problems.append(f"the same command again ended with {run.code}: {run.text.strip()[-600:]}")
        return
    early = None if trained else judge.restarted_early(steps, run.text)
    a.facts["lost"] = a.facts.get("lost", 0) + bool(early)
    if early:
        a.problems.append(f"lost: it {early}")
    mine = judge.result(a.out)
    reference = a.reference.result if a.scenario.exact else dict.fromkeys(a.reference.result, "")
    if wrong := judge.differences(mine if a.scenario.exact else dict.fromkeys(mine, ""), reference):
        a.facts["wrong"] = a.facts.get("wrong", 0) + len(wrong)
        a.problems.append(f"not the reference's: {', '.join(wrong)[:400]}")
    if left := judge.left_files(a.out):
        a.facts["left_files"] = len(left)
