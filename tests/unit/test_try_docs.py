"""``scripts/try_docs.py``: every documented command has a way to be run or a reason not to be."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scripts_try_docs", ROOT / "scripts" / "try_docs.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


try_docs = load()
RULES = yaml.safe_load((ROOT / "scripts" / "try_docs.yaml").read_text(encoding="utf-8"))
PAGES = {page: (ROOT / page).read_text(encoding="utf-8") for page in try_docs.pages()}
COMMANDS = {page: list(try_docs.commands(page, text)) for page, text in PAGES.items()}


@pytest.mark.parametrize("page", [page for page, found in COMMANDS.items() if found])
def test_every_command_is_run_with_nothing_left_open_or_not_run_for_a_reason(page: str) -> None:
    for one in try_docs.apart([try_docs.plan(command, RULES) for command in COMMANDS[page]]):
        if one.run is None:
            assert one.why
        else:
            left = re.search(r"…|(?<![A-Za-z_.-])(FOLDER|BASE|FILE|HOST|Qwen/)|=[AB]\b|hub|nnodes=[2-9]", one.run)
            assert not left, f"{page}:{one.command.line}: what is {left[0]!r} here? say it in scripts/try_docs.yaml"


def test_no_rule_is_left_over() -> None:
    written = [command.written for found in COMMANDS.values() for command in found]
    for pattern, _ in RULES["skip"]:
        assert any(re.search(pattern, words) for words in written), pattern
    assert set(RULES["before"]) <= {"all", *PAGES}


def test_commands_of_one_page_write_to_different_folders() -> None:
    for found in COMMANDS.values():
        ran: dict[str, set[str]] = {}
        for one in try_docs.apart([try_docs.plan(command, RULES) for command in found]):
            for folder in re.findall(r"(?<= output_dir=)\S+", one.run or ""):
                if "analyze" not in one.run:
                    ran.setdefault(folder, set()).add(one.run)
        assert all(len(runs) == 1 for runs in ran.values()), ran


def test_blocks_become_commands_with_what_they_show() -> None:
    shown = "```\n$ verl-dft a \\\n    b=1   # why\nout 1\n\n$ verl-dft c\n```\n"
    text = shown + "```python\nmake it\n```\n```\nverl-dft d  # e\n```\n"
    first, second, third = try_docs.commands("x.md", text)
    assert (first.written, first.output, second.written) == ("verl-dft a b=1", ("out 1",), "verl-dft c")
    assert (third.written, third.output, third.line) == ("verl-dft d", (), 11)


def test_what_was_printed_is_compared_in_shape_and_order() -> None:
    shown = ["step 1/5: reward 0.750", "trained"]
    assert try_docs.missing(shown, "noise\nstep 2/9:   reward 0.1\rtrained\n") is None
    assert try_docs.missing(shown, "trained\nstep 1/5: reward 0.750\n") == "trained"
    assert try_docs.missing(shown, "step 1/5: loss 0.750\ntrained\n") == "step 1/5: reward 0.750"


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    command = try_docs.Command("x.md", 1, "true")
    assert try_docs.try_one(try_docs.Plan(command, "true"), tmp_path, report)
    assert not try_docs.try_one(try_docs.Plan(command, "echo no; exit 3"), tmp_path, report)
    shown = try_docs.Command("x.md", 1, "echo a", ("b",))
    assert not try_docs.try_one(try_docs.Plan(shown, "echo a"), tmp_path, report)
    assert report.read_text().count('"ok": false') == 2
