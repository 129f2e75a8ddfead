"""The paper's numbers beside ours, and what may be said of each pair. The rules: docs/report.md."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError
from verl_dft.paths import recipes_dir
from verl_dft.report.expected import Block, Expected, load_expected
from verl_dft.report.measured import Measured
from verl_dft.report.numbers import Columns, Number, number_of
from verl_dft.report.runs import Run

STATUSES = ("reproduced", "off", "not comparable", "not run", "no number stated")
_RESOURCES = (
    "parity", "seed", "seeds", "n_gpus_per_node", "nnodes", "num_replicas", "tensor_parallel_size", "num_threads",
    "gpu_memory_utilization", "micro_batch_size_per_gpu", "max_token_len_per_gpu", "use_dynamic_bsz", "data_dir",
    "save_freq", "logger", "launcher", "shard_size", "param_offload", "optimizer_offload",
)  # fmt: skip
"""Last parts of keys that do not decide what is measured. ``parity``: the authors' departures are theirs to compare."""
_LOW = 0.2
"""Of a low percentage the paper's and ours may differ by this share of it: two points would be all of 1.6%."""
_LOGP = "other texts: the paper's question and answer as raw text, here the response under the chat template"


@dataclass(frozen=True)
class Limits:
    """How far apart two numbers that agree may be: ``points`` for percentages (of a low one a fifth of it), for others
    a ``share`` of the paper's value."""

    points: float = 2.0
    share: float = 0.05


@dataclass(frozen=True)
class Cell:
    """One number of the paper beside ours.

    ``paper`` is None where the text has no number, ``ours`` where this run has none. ``difference`` is ours minus the
    paper's, ``allowed`` how large it may be; both are None where the pair is not compared, and ``why`` says so.
    """

    block: str
    model: str
    method: str
    column: str
    paper: float | None
    ours: Number | None
    difference: float | None
    allowed: float | None
    status: str
    why: str = ""


def expected_of(run: Run) -> Expected | None:
    """What the paper of a run's recipe states; None for a recipe without such a file beside it.

    Raises:
        InputError: the file is broken.
    """
    shipped = recipes_dir() / f"{run.recipe}.yaml"
    path = shipped if shipped.is_file() else Path(str(run.facts.get("recipe_path") or shipped))
    file = path.parent / "expected.yaml"
    return load_expected(file) if file.is_file() else None


def blocks_of(run: Run, expected: Expected) -> list[Block]:
    """The paper's tables and figures that a recipe is of: of its own name, or of two metrics, then ``NAME_METRIC``."""
    name = Path(run.recipe).name
    return [block for key, block in expected.blocks.items() if key == name or key.startswith(f"{name}_")]


def cells(run: Run, block: Block, measured: Measured, limits: Limits) -> list[Cell]:
    """Every cell of a block, in its order, with its status."""
    found = []
    for cell in block.cells():
        ours = _ours(run, block, measured, cell.model, cell.method, cell.column) if run.scale == "paper" else None
        status, why, difference, allowed = "not run", "", None, None
        if cell.value is None:
            status = "no number stated"
        elif ours is not None:
            why = not_comparable(run, block, cell.model, ours)
            status = "not comparable"
            if not why:
                difference, allowed = ours.value - cell.value, allowance(cell.value, ours, block.unit, limits)
                status = "reproduced" if abs(difference) <= allowed + 1e-9 else "off"
        found.append(Cell(block.name, cell.model, cell.method, cell.column, cell.value, ours, difference, allowed,
                          status, why))  # fmt: skip
    return found


def not_comparable(run: Run, block: Block, model: str, ours: Number) -> str:
    """Why a number of a run at the paper's scale is not what the paper's is; empty if it is."""
    if other := _other_model(run, model):
        return f"another model: {other}"
    if others := [key for key in run.facts.get("changed") or {} if not _harmless(key)]:
        return f"other settings: {', '.join(others)}"
    metric = block.metric.split()[0]
    if metric.startswith(("avg@", "pass@")) and ours.metric != metric:
        return f"{ours.metric} here, {metric} there"
    if ours.part:
        return f"a part of the benchmark: {ours.part}"
    if block.unit == "nats" and ours.unit == "nats per response":
        return _LOGP
    return ""


def allowance(paper: float, ours: Number, unit: str, limits: Limits) -> float:
    """How far ours may be from the paper's value: the limit, or what sampling alone does where that is more."""
    if unit != "%":
        return limits.share * abs(paper)
    return max(min(limits.points, _LOW * abs(paper)), ours.noise or 0.0)


def kind_of(block: Block) -> str:
    """The kind of measurement that a block of percentages is of."""
    metric = block.metric.split()[0]
    return metric if metric.startswith("pass@") else "evaluation"


def kinds_of(block: Block, column: str) -> list[str]:
    """The kinds of measurement that a column's values can be of, the block's own first."""
    if block.unit == "%":
        return [kind_of(block), "training"]
    if block.unit == "nats":
        return [{"kl": "kl", "loss": "training"}.get(column, "logp")]
    return ["stages"] if block.unit == "problems" else []


def _ours(run: Run, block: Block, measured: Measured, model: str, method: str, column: str) -> Number | None:
    """Our number of a cell, from the first kind of measurement that has one."""
    for kind in kinds_of(block, column):
        seeds = seeds_of(measured, kind, model, method, block)
        number = number_of(seeds, column) if seeds and whole(block, seeds, column) else None
        if number is not None:
            return number
    return None


def whole(block: Block, seeds: Mapping[str, Columns], column: str) -> bool:
    """Whether a column may be compared: an average only if it is over the benchmarks of the block's other columns."""
    if column != "avg":
        return True
    wanted = {name for name in block.columns if name != "avg"}
    return all({name for name, number in columns.items() if number.shares} == wanted for columns in seeds.values())


def seeds_of(measured: Measured, kind: str, model: str, method: str, block: Block) -> Mapping[str, Columns]:
    """What was measured of a model and method, by seed; empty where nothing was."""
    found = measured.get(kind, {})
    if (model, method) in found:
        return found[model, method]
    # a recipe of one model has no loop over models
    return found.get(("", method), {}) if len(block.values) == 1 else {}


def _other_model(run: Run, model: str) -> str:
    """The model that the command line put in the place of the paper's; empty where its name is the recipe's.

    The last part of a path counts, so that ``FOLDER/Qwen2.5-Math-7B`` is that model.
    """
    changes: Mapping[str, Any] = run.facts.get("changed") or {}
    given = changes.get(f"models.{model}.path", changes.get("model"))
    if given is None:
        return ""
    return "" if Path(str(given)).name.lower().removesuffix("-base") == model.lower() else str(given)


def _harmless(key: str) -> bool:
    """Whether a key of the command line says where or with what a run is made, and not what."""
    model = key == "model" or (key.startswith("models.") and key.endswith(".path"))  # _other_model looks at it
    return model or key.rpartition(".")[2] in _RESOURCES


def check_limits(points: Any, share: Any) -> Limits:
    """Raises InputError for limits that are not numbers of at least 0."""
    for key, value in (("tolerance", points), ("relative_tolerance", share)):
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise InputError(f"{key}={value} must be a number of at least 0")
    return Limits(float(points), float(share))
