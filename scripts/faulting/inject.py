"""The kinds of faults: each disturbs a run, the same command is run again, and both are judged."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from faulting import damage, judge
from faulting.attempt import Attempt, again
from faulting.world import Run, abandoned, shared_memory, wait_for

GRADER = r"verl_dft\.grading\.worker"


# ---- the kinds: each disturbs, and returns whether there was anything to disturb ----


def failpoint(a: Attempt, place: str) -> bool:
    """Killed when it passes ``place`` for the n-th time."""
    run = a.start(place)
    a.end(run, since=run.started + (a.reference.seconds if a.reference else 0))
    if a.scenario.name in ("steps", "recipe") and run.code > 0:  # a step of it was killed
        a.refused(run)
    elif run.code not in (0, -signal.SIGKILL):
        a.problems.append(f"ended with {run.code} where it was to be killed: {run.text.strip()[-400:]}")
    return run.code != 0


def enospc(a: Attempt, place: str) -> bool:
    """No room on the disk at ``place``."""
    run = a.end(a.start(f"{place}:enospc"))
    if run.code == 0:
        return False
    a.refused(run)
    return True


def twice(a: Attempt, place: str) -> bool:
    """Killed at ``place``, and again while it recovers."""
    if not failpoint(a, place):
        return False
    parts = list(a.out.rglob("*.jsonl.part"))
    second = a.rng.choice(["store.before_recover", "store.after_recover"]) if parts else place.rpartition(":")[0]
    a.facts["second"] = second
    a.end(a.start(second))
    return True


def moment(a: Attempt, _: str) -> bool:
    """The command is killed at any moment."""
    return _kill(a, lambda run: ("command", run.pids))


def rank(a: Attempt, _: str) -> bool:
    """One of several ranks is killed at any moment."""

    def one(run: Run) -> tuple[str, list[int]]:
        number = a.rng.randrange(len(run.pids))
        return f"rank {number}", [run.pids[number]]

    return _kill(a, one)


def _kill(a: Attempt, victims: Callable[[Run], tuple[str, list[int]]]) -> bool:
    assert a.reference is not None
    run, at = a.start(), a.rng.uniform(0.02, a.reference.seconds)
    if run.wait(at):
        a.end(run)
        return False
    title, pids = victims(run)
    a.facts |= {"at_s": round(at, 2), "killed": title}
    begun = time.monotonic()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    a.end(run, begun)
    return True


def child(a: Attempt, _: str, title: str | None = None) -> bool:
    """A descendant is killed at any moment: a rank, a worker of Ray, an engine, a step."""
    assert a.reference is not None
    title = title or a.scenario.titles["child"]
    run = a.start()

    def others() -> list[int]:
        return [pid for pid in run.find(title) if pid not in run.pids]

    if wait_for(run, others, a.limit):
        run.wait(a.rng.uniform(0, max(0.1, 0.9 * a.reference.seconds - run.seconds)))
    found = [] if run.poll() else [f for f in run.family() if f.pid in others()]
    if not found:
        a.end(run)
        return False
    victim, begun = a.rng.choice(found), time.monotonic()
    a.facts |= {"at_s": round(run.seconds, 2), "killed": victim.title[:100]}
    os.kill(victim.pid, signal.SIGKILL)
    a.end(run, begun)
    if run.code > 0:
        a.refused(run)
    elif run.code < 0:
        a.problems.append(f"the command itself ended with {run.code}")
    return True


def grader(a: Attempt, _: str) -> bool:
    """The grader's worker is killed: nobody may notice."""
    if not child(a, "", GRADER):
        return False
    if "told" in a.facts:
        a.problems.append(f"the command failed: {a.facts['told']}")
    return True


def disk(a: Attempt, _: str) -> bool:
    """A file system that is too small; then there is room."""
    run = a.end(a.start())
    if run.code == 0:
        return False
    a.refused(run)
    damage.make_room(a.folder)
    return True


def checkpoint(a: Attempt, _: str) -> bool:
    """Killed, and a file of the newest checkpoint is damaged: it is named, and what to do leads on."""
    where = "preference.step" if a.scenario.name == "dpo" else "worker.step"
    failpoint(a, f"{where}:{a.rng.randrange(3, 7)}")
    steps = judge.whole_checkpoints(a.out)
    if not steps:
        return False
    folder = a.out / "checkpoints" / f"global_step_{steps[-1]}"
    path = a.rng.choice(sorted(p for p in folder.rglob("*") if p.suffix in (".pt", ".pth", ".safetensors")))
    if a.rng.random() < 0.7:
        a.facts["damage"] = damage.cut(path, a.rng)
    else:
        size = path.stat().st_size
        a.facts["damage"] = damage.turn_bit(path, a.rng, size // 4, size // 2)
    run = a.end(a.start(), time.monotonic())
    if run.code == 0:  # a bit between the tensors, which nobody reads; the result tells
        return True
    a.refused(run, path.name, "delete")
    if judge.whole_checkpoints(a.out) != steps:
        a.problems.append("the refused run changed the checkpoints")
    shutil.rmtree(folder)
    return True


def parquet(a: Attempt, _: str) -> bool:
    """A row group of the input is damaged: it is named; with the input as it was, all goes on."""
    path = a.folder / "input.parquet"
    a.facts["damage"] = damage.row_group(path, a.rng)
    run = a.end(a.start())
    if run.code:
        a.refused(run, path.name)
    elif a.reference is not None and (wrong := judge.differences(judge.result(a.out), a.reference.result)):
        wrong = [w for w in wrong if "manifest" not in w and "config" not in w]
        if wrong:
            a.facts["wrong"] = len(wrong)
            a.problems.append(f"damaged rows were taken as they are: {', '.join(wrong)[:300]}")
        shutil.rmtree(a.out)
        a.kept = {}
    assert a.scenario.input is not None
    shutil.copyfile(a.given[a.scenario.input], path)
    return True


def half_line(a: Attempt, place: str) -> bool:
    """Killed while a shard was written, and its last line is half there."""
    failpoint(a, f"store.after_append:{a.rng.randrange(1, 1 + a.reference.places.get('store.after_append', 1))}")  # type: ignore[union-attr]
    parts = list(a.out.rglob("*.jsonl.part"))
    if not parts:
        return False
    a.facts["damage"] = damage.half_line(parts[0], a.rng)
    return True


def shard(a: Attempt, _: str) -> bool:
    """The last line of a committed shard is half there: it is told, and only that shard is made again."""
    count = a.reference.places.get("store.after_rename", 2) if a.reference else 2
    failpoint(a, f"store.after_rename:{a.rng.randrange(1, 1 + count)}")
    files = sorted(a.out.rglob("store/*.jsonl"))
    if not files:
        return False
    path = a.rng.choice(files)
    a.facts["keys"] = [record["key"] for record in judge.committed(path.read_bytes())]
    a.facts["damage"] = damage.half_line(path, a.rng)
    return True


def two_runs(a: Attempt, _: str) -> bool:
    """A second run in the same folder while one is going on."""
    assert a.reference is not None
    first = a.start()
    if first.wait(a.rng.uniform(0, 0.8 * a.reference.seconds)):
        a.end(first)
        return False
    second = a.start()
    a.end(second)
    a.end(first)
    for run in (first, second):
        if run.code:
            a.refused(run)
    if first.code and second.code:
        a.problems.append("neither run went through")
    a.facts["second_run"] = "refused" if second.code else "went through"
    return True


KINDS: dict[str, Callable[[Attempt, str], bool]] = {
    kind.__name__: kind
    for kind in (failpoint, enospc, twice, moment, child, grader, rank, disk, checkpoint, parquet, half_line, shard,
                 two_runs)
}  # fmt: skip
AT_PLACES = ("failpoint", "enospc", "twice")


def inject(a: Attempt, kind: str, place: str) -> dict[str, Any] | None:
    """Do it, run the command again, and judge. None where the fault came too late to hit anything."""
    assert a.reference is not None
    before_shm = shared_memory()
    with ExitStack() as stack:
        if kind == "disk":
            shutil.rmtree(a.folder)
            inputs = a.given[a.scenario.input].stat().st_size if a.scenario.input else 0
            size = inputs + int((a.reference.size - inputs) * a.rng.uniform(0.1, 0.9)) // 4096 * 4096 + 4096
            stack.enter_context(damage.small_disk(a.folder, size))
            a.facts["disk_bytes"] = size
            a.__post_init__()
        if not KINDS[kind](a, place):
            return None
        again(a)
    if shm := abandoned(shared_memory() - before_shm):
        a.facts["left_shm"] = len(shm)
        a.problems.append(f"left in /dev/shm: {', '.join(sorted(shm))[:200]}")
    return {"problems": a.problems, **{key: value for key, value in a.facts.items() if key != "keys"}}
