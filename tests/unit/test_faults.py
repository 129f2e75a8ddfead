"""The judge of ``scripts/faults.py`` tells a lost sample and a wrong result; failpoints; damaged files are refused."""

import errno
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from verl_dft.data import tables
from verl_dft.data.records import Row, write_rows
from verl_dft.errors import InputError
from verl_dft.failpoints import failpoint
from verl_dft.files import atomic_dir, atomic_write, write_json
from verl_dft.files import writing as full_disk
from verl_dft.grading.process import Worker
from verl_dft.sampling.engine import GeneratedText
from verl_dft.sampling.shard_file import StoredSample
from verl_dft.sampling.store import SampleStore
from verl_dft.training.resume import Checkpoint, checksums, damaged_file, resume_point

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
damage, judge, report, world = (
    importlib.import_module(f"faulting.{n}") for n in ("damage", "judge", "report", "world")
)


def sampled(out: Path, texts: dict[str, str]) -> Path:
    """A folder with a store in which each sample is a shard."""
    with SampleStore(out / "store") as store:
        for key, text in texts.items():
            store.append([StoredSample(key, 0, 1, GeneratedText([1, 2], text, "stop"))], {}, 0.5)
    return out


def rows(path: Path, *answers: str) -> Path:
    turns = [[{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": answer}] for answer in answers]
    return write_rows(path, [Row(messages, f"p{i}", "expert") for i, messages in enumerate(turns)])


# ---- what may not be lost ----


def test_a_lost_and_a_changed_sample_are_told(tmp_path: Path) -> None:
    before = judge.safe(sampled(tmp_path / "a", {"k1": "four", "k2": "five"}))
    assert set(before) == {"sample k1", "sample k2"}
    assert judge.lost(before, judge.safe(sampled(tmp_path / "b", {"k2": "five", "k1": "four", "k3": "six"}))) == []
    after = judge.safe(sampled(tmp_path / "c", {"k1": "four", "k2": "FIVE"}))
    assert judge.lost(before, after) == ["sample k2"]
    assert judge.lost(before, judge.safe(sampled(tmp_path / "d", {"k1": "four"}))) == ["sample k2"]
    assert judge.lost(before, after, frozenset({"sample k2"})) == []


def test_only_a_committed_shard_counts(tmp_path: Path) -> None:
    folder = sampled(tmp_path, {"k1": "four"}) / "store"
    (shard,) = folder.glob("*.jsonl")
    part = shard.rename(f"{shard}.part")
    assert set(judge.samples(tmp_path)) == {"k1"}  # whole but for its name: it was synced
    damage.half_line(part, random.Random(0))
    assert not judge.samples(tmp_path)


def test_finished_steps_and_scored_shards_may_not_be_made_again(tmp_path: Path) -> None:
    step, shard = tmp_path / "steps" / "a.json", tmp_path / "shards" / "rows" / "000000.npy"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"x")
    write_json(step, {"status": "done", "seconds": 1.0})
    before = judge.safe(tmp_path)
    os.utime(shard, ns=(1, 1))
    write_json(step, {"status": "done", "seconds": 2.0})
    assert len(judge.lost(before, judge.safe(tmp_path))) == 2


@pytest.mark.parametrize(
    ("steps", "log", "early"),
    [
        ([2, 4], "resuming after step 4 from x", False),
        ([2, 4], "resuming after step 2 from x", True),
        ([2, 4], "step 1", True),
        ([], "step 1", False),
        ([2, 4], "all 4 steps are done already", False),
    ],
)
def test_a_checkpoint_that_was_passed_over(steps: list[int], log: str, early: bool) -> None:
    assert bool(judge.restarted_early(steps, log)) == early


# ---- what may not differ ----


def made(out: Path, answer: str = "4", loss: float = 0.5, weight: bytes = b"w", at: str = "now") -> Path:
    rows(out / "rows.parquet", "5", answer)
    write_json(out / "statistics.json", {"rows": 2, "seconds": len(at), "where": f"{out}/rows.parquet"})
    (out / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": loss, "train/time": len(at)}) + "\n")
    (out / "model").mkdir()
    (out / "model" / "model.safetensors").write_bytes(weight)
    return sampled(out, {"k": answer})


def test_equal_results_at_other_times_and_places_are_equal(tmp_path: Path) -> None:
    mine, reference = judge.result(made(tmp_path / "x" / "a", at="later")), judge.result(made(tmp_path / "b"))
    assert judge.differences(mine, reference) == [] and "metrics.jsonl" in mine and "rows.parquet" in mine


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"answer": "44"}, {"rows.parquet", "rows.parquet.manifest.json", "store:k"}),
        ({"loss": 0.5000001}, {"metrics.jsonl"}),
        ({"weight": b"W"}, {"model/model.safetensors"}),
    ],
)
def test_a_wrong_result_is_told(tmp_path: Path, change: dict, names: set[str]) -> None:
    wrong = judge.differences(judge.result(made(tmp_path / "a", **change)), judge.result(made(tmp_path / "b")))
    assert {line.split()[0] for line in wrong} == names


def test_a_missing_and_a_new_file_are_told(tmp_path: Path) -> None:
    whole, less = judge.result(made(tmp_path / "a")), made(tmp_path / "b")
    (less / "statistics.json").unlink()
    assert judge.differences(judge.result(less), whole) == ["statistics.json is missing"]
    assert judge.differences(whole, judge.result(less)) == ["statistics.json is new"]


def test_a_clear_error_is_one_line_without_a_traceback() -> None:
    assert judge.told("50%\nerror: no room; make some\n") == "error: no room; make some"
    assert judge.told("Traceback (most recent call last):\nerror: x\n") is None
    assert judge.told("error: x\n1\n2\n3\n4\n") is None and judge.told("") is None


def leave_a_child(argv: list[str]) -> int:
    subprocess.Popen(["sleep", "60"])
    return 0


def test_a_process_that_outlives_its_command_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_GRACE_S", 0.2)
    run = world.start(f"{__name__}:leave_a_child", [], {}, tmp_path / "log", f"test.{os.getpid()}")
    assert run.wait(20) and run.code == 0, run.text
    assert run.clear() == ["sleep 60"] and run.clear() == []


# ---- the report ----


def test_a_report_goes_on_after_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    record = {"at": "2026-01-01T00:00:00Z", "commit": "c", "seed": 1, "scenario": "sample", "kind": "failpoint",
              "place": "store.before_rename:2", "problems": [], "lost": 0}  # fmt: skip
    report.append(path, record)
    with open(path, "a") as file:
        file.write('{"seed": 2, "scen')
    report.append(path, {**record, "seed": 3, "problems": ["lost: k"], "lost": 1})
    records = report.read(path)
    assert [r["seed"] for r in records] == [1, 3]
    assert [report.outcome(r) for r in records] == ["equal", "LOST"] and report.bad(records) == records[1:]
    page = report.markdown(records, "faults.py")
    assert "2 faults, 1 lost samples, 0 silent wrong results, 0 hangs" in page
    assert "| `store.before_rename` | 2 |" in page and "lost: k" in page
    assert "`store.after_rename`" in page.partition("Not hit:")[2]


# ---- what the faults use, and what they found ----


def in_child(wanted: str, names: list[tuple[str, str]]) -> int:
    """Pass these places in a forked process; its exit code, negative for a signal: how many it passed."""
    pid = os.fork()
    if pid == 0:
        os.environ["VERL_DFT_FAILPOINT"] = wanted
        passed = 0
        try:
            for name, detail in names:
                failpoint(name, detail)
                passed += 1
        except OSError as error:
            passed += 100 if error.errno == errno.ENOSPC else 0
        os._exit(passed)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_failpoints_by_name_detail_count_and_action(tmp_path: Path) -> None:
    names = [("file", "a"), ("file", "b"), ("other", ""), ("file", "b")]
    killed = -signal.SIGKILL
    assert in_child("file", names) == in_child("file@b:2", names) == in_child("other:1", names) == killed
    assert in_child("file:4", names) == in_child("file@c", names) == 4
    assert in_child("file@b:2:enospc", names) == 103
    trace = tmp_path / "trace"
    assert in_child(f"trace:{trace}", names) == 4
    assert [line.split()[1] for line in trace.read_text().splitlines()] == ["file@a", "file@b", "other", "file@b"]


def test_a_damaged_row_group_is_refused_and_never_read_as_other_rows(tmp_path: Path) -> None:
    whole = rows(tmp_path / "whole.parquet", *(f"The answer is {i}." for i in range(40)))
    wanted, path = tables.read_records(whole), tmp_path / "rows.parquet"
    bare = tmp_path / "bare.parquet"
    pq.write_table(pq.read_table(whole), bare)
    refused = unseen = 0
    for seed in range(60):
        shutil.copyfile(whole, path)
        damage.row_group(path, random.Random(seed))
        try:
            assert tables.read_records(path) == wanted, seed
        except InputError as error:
            refused += str(path) in str(error) and "make it again" in str(error)
        shutil.copyfile(bare, path)
        damage.row_group(path, random.Random(seed))
        try:
            unseen += pq.read_table(path).to_pylist() != wanted
        except (OSError, ValueError):
            continue
    assert refused > 30 and unseen > 5, "without a checksum wrong rows are read"


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"global_step_{step}"
    path.mkdir(parents=True)
    for name in ("model_world_size_1_rank_0.pt", "optim_world_size_1_rank_0.pt"):
        with zipfile.ZipFile(path / name, "w") as archive:
            archive.writestr("data/0", random.Random(step).randbytes(4000))
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (path / "adapter.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"12345678")
    write_json(path / "complete.json", {"step": step, "world_size": 1})
    return path


@pytest.mark.parametrize("name", ["optim_world_size_1_rank_0.pt", "adapter.safetensors"])
def test_a_checkpoint_that_was_cut_off_is_named(tmp_path: Path, name: str) -> None:
    paths = {step: checkpoint(tmp_path, step) for step in (2, 4)}
    options = {"mode": "auto", "given": None, "world_size": 1}
    assert resume_point(tmp_path, **options) == Checkpoint(paths[4], 4)
    damage.cut(paths[4] / name, random.Random(1))
    with pytest.raises(InputError, match=rf"{name} is damaged; delete .*global_step_4 .*goes on from step 2"):
        resume_point(tmp_path, **options)
    with pytest.raises(InputError, match=r"needs another trainer\.resume_from_path"):
        resume_point(tmp_path / "own", **{**options, "given": paths[4], "mode": "resume_path"})
    shutil.rmtree(paths[4])
    assert resume_point(tmp_path, **options) == Checkpoint(paths[2], 2)
    damage.cut(paths[2] / name, random.Random(1))
    with pytest.raises(InputError, match="it starts over"):
        resume_point(tmp_path, **options)


def test_a_turned_bit_in_a_checkpoint_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 2)
    file = path / "model_world_size_1_rank_0.pt"
    assert damaged_file(path, thorough=True) is None
    damage.turn_bit(file, random.Random(0), 1000, 2000)
    assert damaged_file(path) is None and damaged_file(path, thorough=True) == file
    assert damaged_file(path, thorough=True, rank=0) == file and damaged_file(path, thorough=True, rank=1) is None
    options = {"mode": "auto", "given": None, "world_size": 1}
    assert resume_point(tmp_path, **options) == Checkpoint(path, 2)
    with pytest.raises(InputError, match=rf"{file.name} is damaged; delete"):
        resume_point(tmp_path, thorough=True, **options)


def test_each_rank_reads_its_own_files_and_the_first_those_of_none(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 2)
    other = path / "model_world_size_12_rank_11.pt"
    shutil.copyfile(path / "model_world_size_1_rank_0.pt", other)
    damage.turn_bit(other, random.Random(0), 1000, 2000)
    (path / "rng_state.pth").write_bytes(b"no archive")
    found = [damaged_file(path, thorough=True, rank=rank) for rank in (0, 1, 11)]
    assert found == [path / "rng_state.pth", None, other]


def test_a_format_without_checksums_has_them_in_the_marker(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 2)
    file = path / "adapter.safetensors"
    write_json(path / "complete.json", {"step": 2, "world_size": 1, "crc32": checksums(path)})
    assert damaged_file(path, thorough=True) is None
    size = file.stat().st_size
    damage.turn_bit(file, random.Random(0), size - 8, size)
    assert damaged_file(path) is None and damaged_file(path, thorough=True) == file


@pytest.mark.parametrize("content", ["", "[]", '{"step": 2}', '{"step": 2, "world_size": "x"}', "\udcff"])
def test_a_damaged_marker_is_named(tmp_path: Path, content: str) -> None:
    path = checkpoint(tmp_path, 2)
    (path / "complete.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"complete\.json is damaged; delete .*global_step_2 and run"):
        resume_point(tmp_path, mode="auto", given=None, world_size=1)


def killed_writing(place: str, path: Path, content: str) -> None:
    """Kill a process at a failpoint of writing a folder (with a file in it), or a file."""
    pid = os.fork()
    if pid == 0:
        os.environ["VERL_DFT_FAILPOINT"] = place
        if place.startswith("folder"):
            with atomic_dir(path) as folder:
                (folder / "file").write_text(content)
        else:
            write_json(path, content)
        os._exit(0)
    os.waitpid(pid, 0)


def test_a_folder_killed_between_its_two_renames_is_whole_under_other_names(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for content in ("old", "new"):
        killed_writing("folder.moved_aside", folder, content)
    left = [(tmp_path / name / "file").read_text() for name in judge.left_files(tmp_path)]
    assert not folder.exists() and sorted(left) == ["new", "old"]
    with atomic_dir(folder) as made_in:
        (made_in / "file").write_text("newest")
    assert (folder / "file").read_text() == "newest" and judge.left_files(tmp_path) == []


def test_what_a_killed_writer_left_goes_with_the_next_write_and_what_a_living_one_holds_stays(tmp_path: Path) -> None:
    mine, other = tmp_path / "a" / "mine.json", tmp_path / "a" / "other.json"
    killed_writing("file.before_rename", mine, "1")
    killed_writing("file.before_flush", other, "1")
    assert len(judge.left_files(tmp_path)) == 2 and not mine.exists()
    with atomic_write(mine) as writing:
        writing.write("2")
        pid = os.fork()  # another process writes the same file meanwhile
        if pid == 0:
            write_json(mine, "3")
            os._exit(len(judge.left_files(tmp_path)))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2, "the living writer's and the other file's"
    assert mine.read_text() == "2" and len(judge.left_files(tmp_path)) == 1
    write_json(other, "4")
    assert judge.left_files(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 2 vs 1"), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (RuntimeError("a shape is wrong"), False),
    ],
)
def test_a_writer_without_room_is_told_in_one_line(tmp_path: Path, error: Exception, told: bool) -> None:
    with pytest.raises(InputError if told else RuntimeError) as caught, full_disk(tmp_path):
        raise error
    assert ("make room and run the same command again" in str(caught.value)) == told


@pytest.mark.slow
def test_a_grading_worker_that_is_killed_while_it_starts_is_started_again() -> None:
    killed = []

    def kill_the_first() -> None:
        while not killed:
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError, IndexError):
                    parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                    if int(parent) == os.getpid() and b"verl_dft.grading.worker" in (process / "cmdline").read_bytes():
                        os.kill(int(process.name), signal.SIGKILL)
                        killed.append(process.name)

    killer = threading.Thread(target=kill_the_first, daemon=True)
    killer.start()
    worker = Worker("verl_dft.grading.verify:verify", 10.0, 2048)
    try:
        assert len(killed) == 1 and worker.alive() and str(worker.pid) not in killed
        assert worker.ask(("x+1", "1+x", "auto"))["equal"]
    finally:
        worker.close()
