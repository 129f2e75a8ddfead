"""What is disturbed: commands of the smallest size at which each of their writes happens several times."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from faulting import targets
from faulting.world import start
from verl_dft.data.tables import write_parquet
from verl_dft.paths import recipes_dir

CHEAP = ("failpoint", "enospc", "moment", "twice", "disk", "two_runs")
STORED = (*CHEAP, "half_line", "shard", "grader")
TRAINED = ("failpoint", "enospc", "moment", "checkpoint", "disk", "two_runs")
BASE = recipes_dir() / "tiny" / "base"
_ARITHMETIC = ("data=arithmetic", "data.source.num_rows=48", "data.source.num_val=16")


@dataclass(frozen=True)
class Scenario:
    """A command.

    ``argv(out, given)``: its arguments; ``given`` has the shared inputs by name. ``call``: what a forked process calls;
    None: ``verl-dft`` in an interpreter of its own. ``input``: the shared file of rows whose corruption it is to
    notice, as a copy of its own. ``kinds``: of faults (see ``inject``). ``weight``: how often it is chosen.
    ``limit_s``: of a whole undisturbed run. ``exact``: whether two undisturbed runs make the same result, bit by bit.
    """

    name: str
    argv: Callable[[Path, Mapping[str, Path]], list[str]]
    call: str | None = "verl_dft.cli:main"
    ranks: int = 0
    input: str | None = None
    kinds: tuple[str, ...] = CHEAP
    weight: float = 1.0
    limit_s: float = 120.0
    exact: bool = True
    needs_verl: bool = False
    titles: Mapping[str, str] = None  # type: ignore[assignment]


def _sampling(out: Path, given: Mapping[str, Path]) -> list[str]:
    small = ["shard_size=4", "grading.num_workers=1", "want_logp=false", f"output_dir={out}"]
    return [f"data={given['problems']}", "model.path=teacher", *small]


def _training(out: Path, given: Mapping[str, Path]) -> list[str]:
    return [
        "objective=dft", f"model={BASE}", f"data={given['rows']}", f"data.cache_dir={out.parent / 'cache'}",
        "data.max_length=256", "data.train_batch_size=8", "trainer.total_training_steps=6", "trainer.save_freq=2",
        "trainer.max_ckpt_to_keep=2", "trainer.logger=[]", "optim.lr=1e-3", f"output_dir={out}",
    ]  # fmt: skip


def _preference(out: Path, given: Mapping[str, Path]) -> list[str]:
    return [
        "objective=dpo", f"model={BASE}", f"data={given['pairs']}", "data.max_length=256", "data.train_batch_size=8",
        "trainer.total_training_steps=4", "trainer.save_freq=2", "trainer.max_ckpt_to_keep=1", "trainer.logger=[]",
        "optim.lr=1e-3", "hardware=cpu", f"output_dir={out}",
    ]  # fmt: skip


def _vllm(out: Path, *more: str) -> list[str]:
    small = ["benchmark.generator.num_problems=8", "n=2", "shard_size=4", "max_tokens=40", "engine.dtype=float32"]
    return ["evaluate", f"model={BASE}", "benchmark=arithmetic", *small, *more, f"output_dir={out}"]


def _rl(out: Path) -> list[str]:
    small = ["data.train_batch_size=4", "data.max_response_length=48", "trainer.logger=[]", "trainer.save_freq=1"]
    return ["rl", "--config-name", "tiny/rl", "algorithm=grpo", *small, "trainer.total_training_steps=3",
            f"output_dir={out}"]  # fmt: skip


def _recipe(out: Path) -> list[str]:
    short = ["verbs.data.data.source.num_rows=64", "verbs.train.trainer.total_training_steps=4"]
    short += ["verbs.train.trainer.save_freq=2", "verbs.evaluate.limit=16", "verbs.evaluate.n=2"]
    return ["recipe", "run", "dft/table1", "scale=tiny", f"output_dir={out}", *short]


_ENGINE, _RAY = r"VLLM::EngineCore", r"ray::"
SCENARIOS = [
    Scenario("data", lambda out, given: ["data", "make", *_ARITHMETIC, f"output_dir={out}"], weight=2),
    Scenario("sample", lambda out, given: [*_sampling(out, given), "n=2"], "faulting.targets:sample",
             kinds=STORED, weight=3),
    Scenario("rewrite", lambda out, given: [*_sampling(out, given), "self.n=2", "guided.n=2", "limit=6"],
             "faulting.targets:rewrite", kinds=STORED, weight=2),
    Scenario("evaluate", lambda out, given: [f"model={BASE}", "benchmark=arithmetic", "n=2", "shard_size=4",
                                             "benchmark.generator.num_problems=8", f"output_dir={out}"],
             "faulting.targets:evaluate", kinds=(*CHEAP, "half_line", "shard"), weight=2),
    Scenario("groups", lambda out, given: [
        "groups", f"samples={given['samples']}", f"data={given['problems']}", f"teacher.endpoint={given['url']}",
        "teacher.model=teacher", "composition=1:2:2", "shard_size=4", "want_logp=false", "grading.num_workers=1",
        "missing=skip", "teacher.requests.backoff_s=0.05", f"output_dir={out}"], input="samples",
        kinds=(*STORED, "parquet"), weight=2),
    Scenario("reject", lambda out, given: ["reject", f"samples={given['samples']}", f"output_dir={out}"],
             input="samples", kinds=(*CHEAP, "parquet"), weight=2),
    Scenario("steps", lambda out, given: [str(out), str(given["samples"])], "faulting.targets:steps",
             kinds=("failpoint", "moment", "child", "two_runs"), weight=0.7, titles={"child": "verl_dft.cli"}),
    Scenario("train", lambda out, given: ["train", *_training(out, given)], input="rows",
             kinds=(*TRAINED, "parquet"), weight=2, needs_verl=True),
    Scenario("train_2_ranks", lambda out, given: [*_training(out, given), "trainer.n_gpus_per_node=2"],
             "verl_dft.training.sft:main", ranks=2, kinds=("failpoint", "rank", "checkpoint"), weight=1,
             needs_verl=True),
    Scenario("score", lambda out, given: [
        "score", f"model={BASE}", f"data={given['rows']}", "shard_size=8", "data.max_length=256",
        f"data.cache_dir={out.parent / 'cache'}", f"output_dir={out}"], input="rows",
        kinds=(*CHEAP, "parquet"), weight=1.5, needs_verl=True),
    Scenario("dpo", lambda out, given: ["train", *_preference(out, given)], input="pairs",
             kinds=(*TRAINED, "parquet"), weight=1, needs_verl=True),
    Scenario("train_launcher", lambda out, given: ["train", *_training(out, given), "trainer.n_gpus_per_node=2"],
             None, kinds=("moment", "child"), weight=0, limit_s=240,
             titles={"child": r"verl_dft\.training\.(launch|sft)"}),
    Scenario("vllm", lambda out, given: _vllm(out), None, kinds=("failpoint", "moment", "child"), weight=0,
             limit_s=240, titles={"child": _ENGINE}),
    Scenario("ray", lambda out, given: _vllm(out, "num_replicas=2"), None, kinds=("moment", "child"), weight=0,
             limit_s=300, titles={"child": _RAY}),
    Scenario("recipe", lambda out, given: _recipe(out), None, kinds=("moment", "child"), weight=0, limit_s=400,
             titles={"child": r"verl_dft\.(cli|step_server)"}),
    Scenario("rl", lambda out, given: _rl(out), None, kinds=("moment", "child"), weight=0, limit_s=600, exact=False,
             titles={"child": rf"{_ENGINE}|ray::WorkerDict|ray::AgentLoop|online\.driver"}),
]  # fmt: skip
"""All. Weight 0: only where it is asked for by name (``--only``), since a fault there costs minutes."""


def prepare(folder: Path, url: str) -> dict[str, Path]:
    """The shared inputs: problems whose golds need algebra, graded samples of them, training rows, pairs."""
    problems, made, sampled = folder / "problems.jsonl", folder / "rows", folder / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(12):
        gold = rf"\frac{{x+{number}}}{{2}}" if number % 3 else str(number)
        problem = {"id": f"p{number}", "problem": f"Halve {number} plus x.", "answer": gold}
        lines.append(json.dumps(problem | {"solution": f"It is \\boxed{{{gold}}}."}) + "\n")
    problems.write_text("".join(lines))
    given = {"problems": problems, "url": url, "rows": made / "train.parquet", "samples": sampled / "samples.parquet"}
    env = {targets.ENDPOINT: url}
    making = start("verl_dft.cli:main", ["data", "make", *_ARITHMETIC, f"output_dir={made}"], env, folder / "log", "p")
    sampling = start("faulting.targets:sample", [*_sampling(sampled, given), "n=4"], env, folder / "log", "p")
    for run in (making, sampling):
        assert run.wait(120) and run.code == 0, run.text[-3000:]
    given["pairs"] = _pairs(given["rows"], folder / "pairs.parquet")
    return given


def _pairs(rows: Path, path: Path) -> Path:
    """Each row's response preferred to the same without its last words."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pairs = []
    for row in pq.read_table(rows, use_threads=False).to_pylist():  # a thread pool would not survive the next fork
        *prompt, answer = row["messages"]
        shorter = {"role": "assistant", "content": " ".join(answer["content"].split()[:-4])}
        pairs.append({"prompt": prompt, "chosen": [answer], "rejected": [shorter], "problem_id": row["problem_id"]})
    with open(path, "wb") as file:
        write_parquet(pa.Table.from_pylist(pairs), file)
    return path
