"""``verl-dft data list|make|show|check``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_dft.errors import InputError

ACTIONS = ("list", "make", "show", "check")


def main(argv: Sequence[str]) -> int:
    """Run ``verl-dft data ACTION [overrides]``. Returns the exit code; bad input raises InputError."""
    from verl_dft.config import compose, split_config_name

    action = argv[0] if argv else ""
    if action not in ACTIONS:
        raise InputError(f"verl-dft data needs one of {', '.join(ACTIONS)}, got {action or 'nothing'!r}; see --help")
    if action == "list":
        return list_sources()
    if action == "check":
        from verl_dft.data.check import main as check

        return check(argv[1:])
    name, overrides = split_config_name(argv[1:], "data")
    config = compose(name, overrides)
    return make(config) if action == "make" else show(config)


def list_sources() -> int:
    """Print the data configurations and benchmarks with the first line of their comment, and the prompts."""
    from verl_dft.config import group_options
    from verl_dft.data.prompts import PROMPTS

    names, benchmarks = group_options("data"), group_options("benchmark")
    width = max(len(n) for n in [*names, *benchmarks, *PROMPTS])
    print("data=NAME (options: configs/data/NAME.yaml, set with data.source.KEY=…):")
    for name in names:
        print(f"  {name:<{width}}  {_comment('data', name)[0]}")
    print("benchmark=NAME (of verl-dft evaluate and verl-dft data check):")
    for name in benchmarks:
        comment, licence = _comment("benchmark", name)
        print(f"  {name:<{width}}  {comment}{f' [{licence}]' if licence else ''}")
    print("data.prompt=NAME:")
    for name, prompt in PROMPTS.items():
        turns = [f"system: {prompt.system!r}"] if prompt.system else []
        print(f"  {name:<{width}}  {'; '.join([*turns, 'user: ' + repr(prompt.user.replace('{{}}', '{}'))])}")
    return 0


def _comment(group: str, name: str) -> tuple[str, str]:
    """First line of a configuration's comment, and its ``licence``."""
    from omegaconf import OmegaConf

    from verl_dft.paths import configs_dir

    path = configs_dir() / group / f"{name}.yaml"
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# "), str(OmegaConf.load(path).get("licence") or "")


def make(config: Any) -> int:
    """Write row files and ``problems.jsonl`` of a data configuration to ``output_dir``."""
    from verl_dft.data.prepare import prepare_rows

    if not config.output_dir:
        raise InputError("output_dir is not set; give output_dir=FOLDER, where the rows are written")
    prepared = prepare_rows(config.data, config.output_dir, problems_file=True)
    _print_report(prepared.report)
    for kind, files in (("train", prepared.train), ("val", prepared.val)):
        for file in files:
            print(f"{kind}: {file}")
    if (Path(config.output_dir) / "problems.jsonl").is_file():
        print(f"problems: {Path(config.output_dir) / 'problems.jsonl'}")
    return 0


def show(config: Any) -> int:
    """Print rows as the model of ``model.path`` would read them; trained tokens stand between ⟦ and ⟧."""
    from verl_dft.data.dataset import load_dataset
    from verl_dft.data.prepare import prepare_rows
    from verl_dft.data.sources import load_tokenizer

    if not config.model.path:
        raise InputError("model is not set; give model=FOLDER_OR_HUB_NAME, whose tokenizer and chat template are used")
    tokenizer = load_tokenizer(config.model.path)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(config.output_dir or temporary)
        prepared = prepare_rows(config.data, folder)
        first, count = config.show_from, config.show_rows
        dataset = load_dataset(
            prepared.train,
            tokenizer,
            max_length=config.data.max_length,
            overlong=config.data.overlong,
            max_rows=first + count,
            cache_dir=Path(temporary) / "cache",
        )
        _print_report({**prepared.report, **dataset.report})
        if first >= len(dataset):
            raise InputError(f"show_from={first}: there are only {len(dataset)} rows (counting from 0)")
        for index in range(first, len(dataset)):
            _print_row(index, dataset[index], tokenizer)
    return 0


def _print_row(index: int, item: dict[str, Any], tokenizer: Any) -> None:
    trained = int(item["loss_mask"].sum())
    total = len(item["input_ids"])
    ids = item["input_ids"]
    prompt, response = tokenizer.decode(ids[: total - trained]), tokenizer.decode(ids[total - trained :])
    print(f"\n--- row {index}: {total} tokens, {trained} trained (between ⟦ and ⟧) ---\n{prompt}⟦{response}⟧")


def _print_report(report: dict[str, Any]) -> None:
    width = max(map(len, report))
    for key, value in report.items():
        print(f"  {key:<{width}}  {value}")
