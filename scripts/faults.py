"""Disturb commands on purpose, run them again, and compare with what undisturbed ones make.

    python scripts/faults.py --report runs/faults.jsonl --faults 200
    python scripts/faults.py --report runs/faults.jsonl --only vllm,ray --faults 6      minutes for each
    python scripts/faults.py --report runs/faults.jsonl --summary docs/benchmarks/faults.md

Faults are chosen so that what was hit least comes first, and drawn from a seed; run again, the report goes on. The exit
code is 0 where every fault in it ended well. A folder of a fault that did not is kept.
"""

import argparse
import importlib
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from faulting import damage, report, targets  # noqa: E402
from faulting.attempt import Attempt, Reference, refer  # noqa: E402
from faulting.inject import AT_PLACES, KINDS, inject  # noqa: E402
from faulting.scenarios import SCENARIOS, Scenario, prepare  # noqa: E402

from verl_dft.provenance import commit, now  # noqa: E402

FULL = ("file.before_write", "file.before_flush", "file.before_rename", "folder.before_write", "folder.before_rename",
        "store.before_append", "store.before_fsync", "store.before_rename", "metrics.before_append",
        "score.before_write", "score.before_rename", "checkpoint.before_save")  # fmt: skip
"""Failpoints before something is written, where the disk may be full."""


def preload(verl: bool) -> None:
    """Import once what the processes that are forked from this one need."""
    names = ["sampling.command", "sampling.endpoint", "sampling.sampler", "evaluation.run", "evaluation.command"]
    names += ["build.groups_command", "build.reject_command", "build.rewrite_command", "data.command", "data.prepare"]
    names += ["steps", "evaluation.report", *(["training.sft", *_TRAINING] if verl else [])]
    for name in names:
        importlib.import_module(f"verl_dft.{name}")
    for name in ("hydra", "openai", "pyarrow.parquet", "transformers.models.auto.tokenization_auto"):
        importlib.import_module(name)


_TRAINING = ("training.score_command", "training.launch", "training.preference_config", "training.export")


class Lab:
    """Where the faults happen: a folder, the scripted endpoint, the shared inputs, undisturbed runs."""

    def __init__(self, folder: Path, scenarios: Sequence[Scenario]) -> None:
        self.folder, self.scenarios = folder, {scenario.name: scenario for scenario in scenarios}
        script = Path(__file__).resolve().parent / "faulting" / "endpoint.py"
        env = {**os.environ, "PYTHONPATH": sys.path[1]}
        self.server = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=env)
        assert self.server.stdout is not None
        self.env = {targets.ENDPOINT: f"http://127.0.0.1:{int(self.server.stdout.readline())}/v1"}
        if any(scenario.call for scenario in scenarios):
            preload(any(scenario.needs_verl for scenario in scenarios))
        self.given = prepare(folder / "given", self.env[targets.ENDPOINT])
        self.references: dict[str, Reference] = {}
        self.missed: Counter[tuple[str, str]] = Counter()

    def attempt(self, scenario: Scenario, name: str, rng: random.Random) -> Attempt:
        """A run to be disturbed, in a folder of its own."""
        reference = self.references.get(scenario.name)
        return Attempt(scenario, reference, self.folder / name / "run", self.given, self.env, rng, name)

    def reference(self, name: str) -> Reference:
        """The undisturbed run of a scenario, made when first asked for."""
        if name not in self.references:
            self.references[name] = refer(self.attempt(self.scenarios[name], f"reference_{name}", random.Random(0)))
            found = self.references[name]
            print(f"{name}: {found.seconds:.1f} s, {len(found.result)} results, {len(found.places)} places", flush=True)
        return self.references[name]

    def close(self) -> None:
        self.server.kill()
        self.server.wait()


def choose(
    lab: Lab, done: Sequence[Mapping[str, Any]], kinds: frozenset[str], rng: random.Random
) -> tuple[Scenario, str, str]:
    """A scenario, a kind and, where it has one, a place: what was hit least for its weight."""
    count = Counter(record["scenario"] for record in done)
    able = [s for s in lab.scenarios.values() if kinds & set(s.kinds)]
    scenario = min(able, key=lambda s: (count[s.name] / max(s.weight, 0.1), rng.random()))
    # places are many and cheap to miss: two of three faults are at one
    of_kind = Counter(record["kind"] for record in done if record["scenario"] == scenario.name)
    of_kind.update({kind: missed for (name, kind), missed in lab.missed.items() if name == scenario.name})
    share = {"failpoint": 4.0, "enospc": 2.0}
    kind = min(sorted(kinds & set(scenario.kinds)), key=lambda k: (of_kind[k] / share.get(k, 1.0), rng.random()))
    if kind not in AT_PLACES:
        return scenario, kind, ""
    everywhere = report.hits(done)
    hit = Counter(str(r["place"]).partition(":")[0] for r in done if r["scenario"] == scenario.name and r.get("place"))
    places = lab.reference(scenario.name).places
    places = {p: n for p, n in places.items() if kind != "enospc" or report.name_of(p) in FULL}
    place = min(sorted(places), key=lambda p: (hit[p], everywhere[report.name_of(p)], rng.random()))
    return scenario, kind, f"{place}:{rng.randint(1, places[place])}"


def one(lab: Lab, done: Sequence[Mapping[str, Any]], kinds: frozenset[str], seed: int) -> dict[str, Any] | None:
    """One fault, as a record; None where it hit nothing."""
    rng = random.Random(seed)
    scenario, kind, place = choose(lab, done, kinds, rng)
    lab.reference(scenario.name)
    begun, name = time.monotonic(), f"fault_{seed}"
    attempt = lab.attempt(scenario, name, rng)
    found = inject(attempt, kind, place)
    if found is None or not found["problems"]:
        shutil.rmtree(lab.folder / name, ignore_errors=True)
    if found is None:
        lab.missed[scenario.name, kind] += 1
        return None
    facts = {"at": now(), "commit": commit(), "seed": seed, "scenario": scenario.name, "kind": kind}
    if place:
        facts["place"] = place
    return {**facts, **found, "seconds": round(time.monotonic() - begun, 1)}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True, help="a line of JSON for each fault; continued")
    parser.add_argument("--faults", type=int, default=0, help="how many to add")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no fault after so long")
    parser.add_argument("--only", default="", help="scenarios, with commas between")
    parser.add_argument("--kinds", default="", help="kinds of faults, with commas between")
    parser.add_argument("--summary", type=Path, help="write the report as Markdown")
    parser.add_argument("--work", type=Path, help="folder to work in; a temporary one by default")
    options = parser.parse_args(argv)
    names = {scenario.name for scenario in SCENARIOS}
    for key, given, valid in (("only", options.only, names), ("kinds", options.kinds, set(KINDS))):
        if unknown := {part for part in given.split(",") if part} - valid:
            parser.error(f"--{key} {', '.join(sorted(unknown))} is not one of {', '.join(sorted(valid))}")
    return options


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    done = report.read(options.report)
    if options.faults:
        only = {part for part in options.only.split(",") if part}
        scenarios = [s for s in SCENARIOS if (s.name in only if only else s.weight > 0)]
        kinds = frozenset(part for part in options.kinds.split(",") if part) or frozenset(KINDS)
        kinds -= frozenset() if damage.can_mount() else {"disk"}
        add(options, done, scenarios, kinds)
    if options.summary:
        command = f"python scripts/faults.py --report {shlex.quote(options.report.name)} --faults {len(done)}"
        options.summary.write_text(report.markdown(done, command), encoding="utf-8")
    wrong = report.bad(done)
    print(f"{len(done)} faults, {len(wrong)} with problems; report: {options.report}")
    return 1 if wrong else 0


def add(
    options: argparse.Namespace, done: list[dict[str, Any]], scenarios: Sequence[Scenario], kinds: frozenset[str]
) -> None:
    """Add faults to the report and to ``done``."""
    folder = (options.work or Path(tempfile.mkdtemp(prefix="faults_"))).resolve()
    lab, begun, wanted = Lab(folder, scenarios), time.monotonic(), len(done) + options.faults
    seed = max([0, *(record["seed"] for record in done)])
    try:
        while len(done) < wanted and time.monotonic() - begun < options.seconds:
            seed += 1
            record = one(lab, done, kinds, seed)
            if record is None:
                continue
            report.append(options.report, record)
            done.append(record)
            told = "; ".join(record["problems"]) or report.outcome(record)
            print(f"{len(done)} {record['scenario']} {record['kind']} {record.get('place', '')}: {told}", flush=True)
    finally:
        lab.close()
        if not report.bad(done):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
