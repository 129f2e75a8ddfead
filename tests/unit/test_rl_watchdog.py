"""What ends an online run that hangs or has lost a process, and the one line that it leaves."""

import errno
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import ray
from omegaconf import OmegaConf

from verl_dft.errors import InputError
from verl_dft.files import write_json
from verl_dft.training.online import failures, watchdog
from verl_dft.training.online.failures import RolloutFailed, RunFailed, check_groups, place
from verl_dft.training.online.ray_errors import failure, root_cause
from verl_dft.training.online.room import check_room
from verl_dft.training.online.watchdog import Watchdog
from verl_dft.training.only_one import LOCK_FILE, only_run


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, health: Callable[[], str | None] = lambda: None, **limits: float | None):
    """A quick watchdog and the reasons that it gave."""
    monkeypatch.setattr(watchdog, "_LOOK_S", 0.02)
    reasons: list[str] = []
    with Watchdog(limits, reasons.append, health, every_s=0.05, grace_s=0.2) as dog:
        yield dog, reasons


def until(condition: Callable[[], object], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_a_phase_that_takes_too_long_ends_the_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch, update=0.1) as (dog, reasons), dog.phase("update"):
        assert until(lambda: reasons)
        time.sleep(0.2)
    assert reasons == ["the run hangs: more than limits.update=0.1 seconds (null: no limit) have passed"]


def test_the_inner_limit_counts_and_the_outer_one_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch, update=0.5, sample=None) as (dog, reasons), dog.phase("update"):
        for _ in range(3):
            time.sleep(0.3)
            with dog.phase("sample"):
                assert dog.doing == "sample"
                time.sleep(0.3)
        assert reasons == [] and dog.doing == "update"
        assert until(lambda: reasons, 2) and "limits.update" in reasons[0]


def test_the_start_ends_when_training_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch, start=0.2) as (dog, reasons), dog.phase("start"):
        dog.begun()
        time.sleep(0.5)
    assert reasons == []


def test_the_trainer_may_tell_of_a_death_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog waits for that, and ends the run where the trainer hangs."""
    with watched(monkeypatch, lambda: "an engine has died") as (_, reasons):
        time.sleep(0.15)  # seen dead, within the grace
    time.sleep(0.4)
    assert reasons == []
    with watched(monkeypatch, lambda: "an engine has died") as (_, reasons):
        assert until(lambda: reasons)
    assert reasons == ["an engine has died"]


def test_limits_hold_when_health_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str | None:
        raise ConnectionError("no answer")

    with watched(monkeypatch, broken, sample=0.3) as (dog, reasons), dog.phase("sample"):
        assert until(lambda: reasons) and "limits.sample" in reasons[0]


def test_the_phase_of_an_error_is_the_innermost(monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as (dog, _):
        with pytest.raises(ZeroDivisionError), dog.phase("start"):
            dog.begun()
            with dog.phase("update"), dog.phase("sample"):
                raise ZeroDivisionError
        assert dog.failed_in == "sample"
    with watched(monkeypatch) as (dog, _):  # verl's hooks open a phase and leave it open over an error
        with pytest.raises(ZeroDivisionError), ExitStack() as never, dog.phase("update"):
            opened = dog.phase("sample")
            opened.__enter__()
            never.push(lambda *_: opened and None)
            raise ZeroDivisionError
        assert dog.failed_in == "sample"


# ---- the line ----


def remote(error: Exception, times: int = 1) -> BaseException:
    """``error`` as it comes through so many processes of Ray."""
    for _ in range(times):
        error = ray.exceptions.RayTaskError("run", "Traceback\n  a wall of text", error).as_instanceof_cause()
    return error


@pytest.mark.parametrize("times", [0, 1, 3])
def test_errors_through_ray_are_one_line(times: int) -> None:
    told = failure(remote(InputError("the rows\nare wrong"), times), None, 3, None, "run it again")
    assert isinstance(told, InputError) and str(told) == "the rows are wrong"
    told = failure(remote(ZeroDivisionError("by zero"), times), None, 3, "update", "run it again")
    assert isinstance(told, RunFailed) and not told.shown
    assert str(told) == (
        "the run has failed in step 3 while updating: ZeroDivisionError: by zero (its traceback is above); run it again"
    )
    told = failure(remote(RolloutFailed("2 of 4 lack"), times), None, 3, None, "run it again")
    assert str(told) == "2 of 4 lack; run it again, or set rollout_failure=skip" and told.shown
    for full in (
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc]"),
    ):
        told = failure(remote(full, times), None, 3, "save", "run it again")
        wanted = r"the disk was full in step 3 while saving a checkpoint \(.+\); make room, then run it again"
        assert re.fullmatch(wanted, str(told)) and told.shown


@pytest.mark.parametrize("phase", ["start", "update", None])
def test_words_tell_of_a_full_disk_only_where_weights_are_saved(phase: str | None) -> None:
    """Torch's reader has them for some damaged checkpoints."""
    damaged = RuntimeError("PytorchStreamReader failed [enforce fail at inline_container.cc]")
    assert "the disk was full" not in str(failure(remote(damaged), None, 3, phase, "run it again"))
    full = OSError(errno.ENOSPC, "No space left on device")
    assert "the disk was full" in str(failure(remote(full), None, 3, phase, "run it again"))


def test_what_has_died_is_the_reason_whatever_came_of_it() -> None:
    for error in (ZeroDivisionError(), RolloutFailed("2 of 4 lack"), ray.exceptions.ActorDiedError()):
        told = failure(remote(error), "a worker has died", 3, None, "run it again")
        assert str(told) == "a worker has died in step 3; run it again" and told.shown
    copy = pickle.loads(pickle.dumps(told))
    assert isinstance(copy, RunFailed) and (copy.message, copy.shown) == (told.message, True)
    assert isinstance(root_cause(remote(remote(told))), RunFailed)


def test_where_and_how_to_go_on(tmp_path: Path) -> None:
    assert place(0, None) == "before the first step"
    assert place(4, "start") == place(0, "start") == "while the workers started"
    assert place(4, "weight_sync") == "in step 4 while weights went to vLLM" and place(4, None) == "in step 4"
    assert failures.advice(tmp_path) == "run the same command again to start over, no checkpoint having been saved"
    for step in (2, 10):
        (tmp_path / f"global_step_{step}").mkdir()
    write_json(tmp_path / "global_step_2" / "complete.json", {})
    assert failures.advice(tmp_path) == "run the same command again to go on from step 2"  # 10 is not whole


def test_the_last_step_is_read_from_the_metrics(tmp_path: Path) -> None:
    assert failures.last_step(tmp_path) == "before the end of the first step"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert failures.last_step(tmp_path) == "after step 2"


def test_a_reason_is_left_for_the_driver(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    failures.forget_reason(tmp_path)
    assert failures.left_reason(tmp_path) is None
    failures.leave_reason(tmp_path, "it hangs")
    assert failures.left_reason(tmp_path) == "it hangs"
    failures.forget_reason(tmp_path)
    assert failures.left_reason(tmp_path) is None


# ---- a failed group ----


ROWS = [f"{uid}_{session}_0" for uid in ("p", "q") for session in range(4)]


@pytest.mark.parametrize(
    ("failed", "missing"),
    [({"q"}, ()), (set(), ("q_3_0",)), (set(), ("p_0_0", "p_1_0", "p_2_0", "p_3_0")), ({"p", "q"}, tuple(ROWS))],
    ids=["told", "one-silently", "all-silently", "everything"],
)
def test_a_group_that_lacks_a_response_is_an_error(failed: set[str], missing: tuple[str, ...]) -> None:
    rows = [key for key in ROWS if key not in missing]
    with pytest.raises(RolloutFailed, match=r"^\d of 2 problems lack a response"):
        check_groups(["p", "q"], rows, failed, 4)


def test_whole_groups_pass_whatever_others_lack() -> None:
    check_groups(["p", "q"], [*ROWS, "p_0_1", "other_0_0"], {"other"}, 4)  # a response of two parts counts once


# ---- one run in a folder ----

HOLD = """
import sys, time
from verl_dft.training.only_one import only_run
with only_run(sys.argv[1], "rl"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_second_run_is_refused_and_a_killed_one_is_no_hindrance(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        with pytest.raises(InputError, match=rf"is in use by another verl-dft rl \(process {first.pid} on .*\); wait"):
            with only_run(tmp_path, "rl"):
                pass
        assert first.poll() is None
    assert (tmp_path / LOCK_FILE).read_text()  # what the killed one left
    with only_run(tmp_path, "rl"):
        pass
    with only_run(tmp_path, "rl"):
        pass


def test_the_folder_is_held_as_long_as_the_child_lives(tmp_path: Path) -> None:
    """A command that was killed may have left its driver, which is ending."""
    with only_run(tmp_path, "rl") as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    try:
        with pytest.raises(InputError, match="in use"), only_run(tmp_path, "rl"):
            pass
    finally:
        child.communicate(b"\n", timeout=20)
    with only_run(tmp_path, "rl"):
        pass


# ---- room ----


def sizes(nodes: int, workers: int, teachers: int = 0, storage: int = 1):
    part = {"nnodes": nodes, "n_gpus_per_node": workers}
    return OmegaConf.create(
        {
            "trainer": part,
            "distillation": {"enabled": teachers > 0, "nnodes": 1, "n_gpus_per_node": teachers},
            "reward": {"reward_model": {"enable_resource_pool": False, **part}},
            "transfer_queue": {"backend": {"SimpleStorage": {"num_data_storage_units": storage}}},
        }
    )


def machines(*amounts: tuple[int, int]) -> list[dict[str, float]]:
    return [{"GPU": gpus, "CPU": cpus} for gpus, cpus in amounts]


@pytest.mark.parametrize(
    ("config", "cluster"),
    [
        (sizes(1, 1), [(1, 7)]),
        (sizes(2, 2), [(2, 6), (2, 10)]),
        (sizes(2, 2), [(4, 32)]),  # both groups on one machine
        (sizes(1, 8, teachers=2), [(2, 16), (8, 64)]),
    ],
)
def test_clusters_that_hold_a_run(config, cluster: list[tuple[int, int]]) -> None:
    check_room(config, machines(*cluster), "GPU")


@pytest.mark.parametrize(
    ("config", "cluster"),
    [
        (sizes(1, 4), [(2, 64), (2, 64)]),  # enough in all, on no machine
        (sizes(2, 2), [(3, 64), (1, 64)]),
        (sizes(1, 1), [(1, 6)]),  # CPUs for the worker alone
        (sizes(1, 1, storage=8), [(1, 13)]),
        (sizes(1, 8, teachers=1), [(8, 640)]),
        (sizes(1, 1), []),
    ],
)
def test_clusters_that_never_will(config, cluster: list[tuple[int, int]]) -> None:
    with pytest.raises(InputError, match="the Ray cluster has no room for .* change trainer.nnodes") as error:
        check_room(config, machines(*cluster), "GPU")
    assert "\n" not in str(error.value)
