"""The grader where training runs it: as verl's reward function, in threads, asyncio, forked and Ray processes."""

import asyncio
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from omegaconf import OmegaConf

from verl_dft.errors import InputError
from verl_dft.grading import GradeItem, grade_batch, shared_pool
from verl_dft.grading.reward import compute_score

RIGHT, WRONG = (r"\boxed{\cos^2 x}", r"1-\sin^2 x"), (r"\boxed{\sin x}", r"\cos x")


def test_verl_loads_and_calls_it() -> None:
    """Through verl's own loader, with its keyword arguments and the configuration's."""
    from verl.trainer.ppo.reward import get_custom_reward_fn

    function = {"path": "pkg://verl_dft.grading.reward", "name": "compute_score", "reward_kwargs": {"harness": "qwen"}}
    reward = get_custom_reward_fn(OmegaConf.create({"reward": {"custom_reward_function": function}}))
    result = reward(data_source="math", solution_str=r"so \boxed{1600}", ground_truth="16", extra_info={"index": 1})
    assert result == {
        "score": 1.0, "acc": 0.0, "acc_qwen": 1.0, "graded": 1.0, "verdict": "wrong", "pred": "1600",
    }  # fmt: skip


def test_the_score_is_the_verdict_asked_for() -> None:
    assert compute_score("d", RIGHT[0], RIGHT[1])["score"] == 1.0
    assert compute_score("d", WRONG[0], WRONG[1])["score"] == 0.0
    assert compute_score("d", "no idea", "5")["verdict"] == "no_answer"
    assert compute_score("d", r"\boxed{4.25}", "4.2", {"tolerance": 0.1})["score"] == 1.0
    lost = compute_score("d", r"\boxed{\sin(9^{9^{9^{9}}})+x}", r"\sqrt{x}", timeout_s=0.5)
    assert (lost["score"], lost["graded"], lost["verdict"]) == (0.0, 0.0, "timeout")
    with pytest.raises(InputError, match="strict, qwen"):
        compute_score("d", "5", "5", harness="lenient")


def test_threads_and_asyncio_share_one_pool() -> None:
    """As verl's reward loop does it: single answers from an executor's threads."""

    def verdict(number: int) -> str:
        answer = rf"\boxed{{\cos^2 x + {number}}}"
        return grade_batch([GradeItem(answer, rf"1-\sin^2 x + {number % 3}")], 2)[0].verdict

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(asyncio.to_thread(verdict, number) for number in range(12)))

    expected = ["correct"] * 3 + ["wrong"] * 9
    assert asyncio.run(all_of_them()) == expected
    with ThreadPoolExecutor(6) as executor:
        assert list(executor.map(verdict, range(12))) == expected
    assert shared_pool(2) is shared_pool(2)
    assert len(shared_pool(2).worker_pids()) <= 2


def test_a_forked_child_starts_its_own_workers() -> None:
    """The parent's pipes are not the child's to use: mixed replies would be wrong verdicts."""
    assert grade_batch([GradeItem(*RIGHT)], 1)[0].verdict == "correct"
    mine = shared_pool(1).worker_pids()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            verdicts = [grade.verdict for grade in grade_batch([GradeItem(*RIGHT), GradeItem(*WRONG)], 1)]
            own = set(shared_pool(1).worker_pids()).isdisjoint(mine)
            os.write(writer, repr((verdicts, own)).encode())
            shared_pool(1).close()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read() in ("(['correct', 'wrong'], True)",)
    os.waitpid(child, 0)
    assert grade_batch([GradeItem(*RIGHT), GradeItem(*WRONG)], 1)[1].verdict == "wrong"


def test_workers_end_with_the_process_that_started_them() -> None:
    """Whether it ends by itself or is killed."""
    code = (
        "import os, sys\nfrom verl_dft.grading import GradeItem, grade_batch, shared_pool\n"
        f"grade_batch([GradeItem({RIGHT[0]!r}, {RIGHT[1]!r})], 1)\n"
        "print(*shared_pool(1).worker_pids(), flush=True)\n"
        "os.kill(os.getpid(), 9) if sys.argv[1] == 'killed' else None"
    )
    for how in ("ends", "killed"):
        out = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, timeout=120)
        (worker,) = map(int, out.stdout.split())
        for _ in range(100):
            if not _alive(worker):
                break
            subprocess.run(["sleep", "0.1"])
        assert not _alive(worker), how


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_in_a_ray_actor() -> None:
    import ray

    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:

        @ray.remote
        class Grader:
            def grade(self, pairs: list[tuple[str, str]]) -> list[str]:
                return [grade.verdict for grade in grade_batch([GradeItem(*pair) for pair in pairs], 1)]

        assert ray.get(Grader.remote().grade.remote([RIGHT, WRONG]), timeout=120) == ["correct", "wrong"]
    finally:
        ray.shutdown()
