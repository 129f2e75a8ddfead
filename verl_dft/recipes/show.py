"""What the terminal shows of recipes: the list, a recipe's steps, the commands of a dry run, the figures at the end."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_dft.recipes.estimate import Cost
from verl_dft.recipes.load import load_recipe, recipe_names
from verl_dft.recipes.plan import Planned
from verl_dft.recipes.settings import Settings, loop_variables

_WIDTH = 118


def listing() -> str:
    """A line per recipe: its name, title and source."""
    recipes = [load_recipe(name) for name in recipe_names()]
    names, titles = (max((len(getattr(r, key)) for r in recipes), default=0) for key in ("name", "title"))
    return "\n".join(f"{r.name:<{names}}  {r.title:<{titles}}  {r.source}".rstrip() for r in recipes)


def page(settings: Settings, steps: Sequence[Planned]) -> str:
    """A recipe at a scale: its keys, and of each step what it runs, on what, and what it needs."""
    recipe = settings.recipe
    lines = [f"{recipe.name}: {recipe.title}" + (f" ({recipe.source})" if recipe.source else "")]
    lines.append(f"scale={settings.scale}: {len(steps)} steps, into {settings.root}")
    for key, value in settings.keys.items():
        lines.append(f"  {key}={_short(list(value) if isinstance(value, dict) else value)}")
    for option, choice in settings.choices.items():
        others = [name for name in recipe.options[option] if name != "default"]
        lines.append(f"  {option}={choice}  (of {', '.join(others)})")
    if variables := loop_variables(recipe):
        lines.append(f"  loops over {', '.join(variables)}: VARIABLE=ARM keeps one")
    names = {str(step.folder): step.name for step in steps}
    for number, step in enumerate(steps, 1):
        needs = f"   after {', '.join(step.needs)}" if step.needs else ""
        lines += ["", f"{number:>3} {step.name}: {step.verb}{needs}"]
        words = [_named(word, names) for word in step.command[len(step.verb.split()) : -1]]
        lines += [f"      {line}" for line in _wrapped(words)]
    return "\n".join(lines)


def commands(settings: Settings, steps: Sequence[Planned], costs: Mapping[str, Cost]) -> str:
    """The commands of a run in order, each as it can be typed, and what they would cost."""
    lines = [f"# {settings.recipe.name}, scale={settings.scale}: {len(steps)} commands, in this order"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in settings.env.items()]
    for number, step in enumerate(steps, 1):
        lines += ["", f"# {number}/{len(steps)} {step.name}: {_priced(costs[step.name])}"]
        lines.append(shlex.join(["verl-dft", *step.command]))
        lines += [f"#   {line}" for line in cluster_lines(step)]
    return "\n".join([*lines, "", *_total(settings, costs)])


def cluster_lines(step: Planned) -> list[str]:
    """How the same step is started on several GPUs or machines by hand."""
    get = step.composed.get
    ranks, nodes = int(get("trainer.n_gpus_per_node", 1)), int(get("trainer.nnodes", 1))
    rest = shlex.join(step.command[1:])
    if step.verb == "rl" and ranks * nodes > 1:
        lines = [] if nodes == 1 else _ray_lines(nodes)
        return [*lines, f"scripts/slurm_ray.sh verl-dft rl {rest}"] if nodes > 1 else []
    if step.verb not in ("train", "score") or ranks * nodes == 1 or get("objective.name") == "dpo":
        return []
    if get("launcher") == "ray":
        return [*_ray_lines(nodes), f"scripts/slurm_ray.sh verl-dft train {rest}"] if nodes > 1 else []
    module = "sft" if step.verb == "train" else "score_command"
    where = "--standalone" if nodes == 1 else (
        f"--nnodes={nodes} --node-rank=$NODE_RANK --master-addr=$MASTER_ADDR --master-port=29500"
    )  # fmt: skip
    lines = [f"torchrun {where} --nproc-per-node={ranks} -m verl_dft.training.{module} {rest}"]
    return [*lines, f"scripts/slurm_torchrun.sh verl-dft {step.verb} {rest}"] if nodes > 1 else lines


def _ray_lines(nodes: int) -> list[str]:
    return [
        "on the first machine: ray start --head --port=6379",
        f"on the {nodes - 1} others: ray start --address=$HEAD:6379",
        "then on the first, with RAY_ADDRESS=$HEAD:6379, the command above; or",
    ]


def _priced(cost: Cost) -> str:
    parts = [f"{_count(cost.rows)} rows"] if cost.rows and not cost.steps and not cost.sampled_tokens else []
    parts += [f"{cost.steps:,} steps"] if cost.steps else []
    parts += [f"{_count(cost.trained_tokens)} tokens trained on"] if cost.trained_tokens else []
    parts += [f"{_count(cost.sampled_tokens)} tokens sampled"] if cost.sampled_tokens else []
    parts += [f"about {_hours(cost.gpu_hours)} GPU-hours"] if cost.gpu_hours else []
    return ", ".join(parts) or "small"


def _total(settings: Settings, costs: Mapping[str, Cost]) -> list[str]:
    values = list(costs.values())
    total = Cost(
        0,
        sum(cost.steps for cost in values),
        sum(cost.trained_tokens for cost in values),
        sum(cost.sampled_tokens for cost in values),
        sum(cost.gpu_hours or 0 for cost in values),
    )
    lines = [f"# in all an estimated {_priced(total)}"]
    if settings.estimate:
        assumed = " ".join(f"estimate.{key}={value}" for key, value in settings.estimate.items())
        lines.append(f"# It is an estimate of work, without start-up and waiting, from: {assumed}")
    unknown = [name for name, cost in costs.items() if cost.gpu_hours is None]
    if unknown and settings.estimate:
        lines.append(f"# without {', '.join(unknown)}: the size of their model is not known from its name")
    return lines


def figures(steps: Sequence[Planned]) -> str:
    """The results of a run's evaluations and the pages of its analyses, a line each; empty where it has none."""
    from verl_dft.evaluation.report import format_table

    names = {str(step.outputs["model"]): step.name for step in steps if "model" in step.outputs}
    results = []
    for step in steps:
        for path in step.outputs.get("results", []):
            result = json.loads(Path(path).read_text(encoding="utf-8"))
            several = isinstance(step.values.get("model"), list)
            results.append(result | {"model": names.get(result["model"], result["model"]) if several else step.name})
    table = [format_table(results)] if results else []
    pages = [f"{step.name}: {step.outputs['page']}, and figures beside it" for step in steps if "page" in step.outputs]
    return "\n\n".join([*table, *(["\n".join(pages)] if pages else [])])


# ---- words ----


def _named(word: str, names: Mapping[str, str]) -> str:
    """An argument with the folders of steps as ``<step>``."""
    for folder, name in names.items():
        word = word.replace(folder, f"<{name}>")
    return word


def _wrapped(words: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(word) + 7 <= _WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _short(value: Any) -> str:
    text = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
    return text if len(text) <= _WIDTH - 20 else f"{text[: _WIDTH - 24]} …]"


def _count(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{number:,.0f}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 20 else f"{hours:.1f}" if hours >= 1 else f"{hours:.2g}"
