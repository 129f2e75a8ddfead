"""Runs the commands of README and docs as a new user would, and compares what they print with what is written there.

``python scripts/try_docs.py`` in a checkout after ``make setup``. Each page gets a folder of its own with ``recipes/``
in it, as a checkout has; its commands run there one after the other. What a command names that only a GPU, a hub or a
cluster has is replaced, and what is long is made short: ``scripts/try_docs.yaml``. A block that begins with ``$`` shows
its output: each line of it must be in the real one, in that order, with any numbers.

    python scripts/try_docs.py                                 # every page
    python scripts/try_docs.py README.md docs/scoring.md       # these
    python scripts/try_docs.py --list                          # what would run, and how

Writes a row a command to ``--report FILE`` (JSON lines, appended). Exit code 1 where a command failed or printed
something else.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
_COMMAND = re.compile(r"([A-Z_]+=\S+ )?(verl-dft|make|pip|torchrun|pytest|ray|sbatch|export|python)\s")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
LIMIT_S = 600


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        page: the file, from the root of the checkout.
        line: where its block begins.
        written: the command without its comment.
        output: the lines that the page shows below it.
    """

    page: str
    line: int
    written: str
    output: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """How a command is run: ``run`` is None where it is not, for ``why``."""

    command: Command
    run: str | None
    why: str = ""

    @property
    def how(self) -> str:
        """``as written``, ``adapted`` or ``not run``."""
        if self.run is None:
            return "not run"
        return "as written" if self.run == self.command.written else "adapted"


def pages() -> list[str]:
    """README, CONTRIBUTING, docs and the recipes' pages, in the order a reader meets them."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
    return [str(path.relative_to(ROOT)) for path in [*found, *sorted(ROOT.glob("recipes/*/README.md"))]]


def commands(page: str, text: str) -> Iterator[Command]:
    """The commands in a page's code blocks; one that continues over lines is one."""
    for block in _BLOCK.finditer(text):
        if block[1] not in ("", "bash", "console", "sh"):
            continue
        line = text[: block.start()].count("\n") + 1
        body = re.sub(r" *\\\n\s*", " ", block[2]).splitlines()
        shown = any(words.startswith("$ ") for words in body)
        starts = [i for i, words in enumerate(body) if (words.startswith("$ ") if shown else _COMMAND.match(words))]
        for start, end in pairwise([*starts, len(body)]):
            written = re.sub(r"\s+#\s.*", "", body[start].removeprefix("$ "))
            output = tuple(filter(str.strip, body[start + 1 : end])) if shown else ()
            yield Command(page, line, re.sub(" +", " ", written).strip(), output)


def plan(command: Command, rules: dict[str, Any]) -> Plan:
    """What is run in a command's place."""
    for pattern, why in rules["skip"]:
        if re.search(pattern, command.written):
            return Plan(command, None, why)
    if command.output:  # its output is that of these very words
        return Plan(command, command.written)
    words = command.written
    for pattern, replacement in rules["stand_ins"]:
        words = re.sub(pattern, replacement.replace("{base}", "recipes/tiny/base"), words)
    words = re.sub(" +", " ", words).strip()
    fitting = [name for name in rules["small"] if _fits(name, words)]
    keys = rules["small"][max(fitting, key=len)] if fitting else []
    given = {word.partition("=")[0].lstrip("+") for word in words.split()}
    more = [key for key in keys if key.partition("=")[0] not in given and "--help" not in given]
    return Plan(command, " ".join([words, *more]))


def apart(plans: Sequence[Plan]) -> list[Plan]:
    """The same plans, where no two commands write to one ``output_dir``."""
    users: dict[str, list[str]] = {}
    found = []
    for one in plans:
        folder = re.search(r"(?<= output_dir=)\S+", one.run or "")
        if one.run and folder and "analyze" not in one.run:
            mine = users.setdefault(folder[0], [])
            if one.run not in mine:
                mine.append(one.run)
            if nth := mine.index(one.run):
                one = replace(one, run=one.run.replace(f"output_dir={folder[0]}", f"output_dir={folder[0]}-{nth + 1}"))
        found.append(one)
    return found


def _fits(name: str, words: str) -> bool:
    verb, _, rest = name.partition(" ")
    ours = f"verl-dft {verb} " in f"{words} " or (verb == "train" and "verl_dft.training.sft" in words)
    return ours and rest in words


def missing(shown: Sequence[str], printed: str) -> str | None:
    """The first line of ``shown`` that is not in what was printed, in order; numbers, spaces and bars may differ."""
    lines = iter([_shape(line) for line in re.split(r"[\n\r]", printed)])
    return next((line for line in shown if not any(_shape(line) == found for found in lines)), None)


def _shape(line: str) -> str:
    return re.sub(r"[\s-]+", " ", re.sub(r"\d+(\.\d+)?", "0", re.sub(r"[█▏▎▍▌▋▊▉#]+", "", line))).strip()


def run(words: str, folder: Path) -> tuple[int, str, float]:
    """Run a command in a page's folder. Returns exit code, what it printed, seconds."""
    bin_dir = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}
    started = time.monotonic()
    process = subprocess.Popen(
        ["bash", "-c", words], cwd=folder, env=environment, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed = process.communicate()[0] + f"\nended after {LIMIT_S} s"
    return process.returncode, printed, time.monotonic() - started


def python_files(text: str) -> dict[str, str]:
    """Python blocks of a page that begin with their file's name."""
    blocks = (block[2] for block in _BLOCK.finditer(text) if block[1] == "python")
    return {found[1]: block for block in blocks if (found := re.match(r"# (\w+\.py)\b", block))}


def try_page(page: str, rules: dict[str, Any], report: Path) -> int:
    """Run a page's commands. Returns how many did not do what the page says."""
    text, wrong = (ROOT / page).read_text(encoding="utf-8"), 0
    plans = apart([plan(command, rules) for command in commands(page, text)])
    with tempfile.TemporaryDirectory(prefix="try_docs.") as name:
        folder = Path(name)
        for part in ("recipes", "scripts", "Makefile"):
            (folder / part).symlink_to(ROOT / part)
        for file, source in python_files(text).items():
            (folder / file).write_text(source, encoding="utf-8")
        given = [*rules["before"]["all"], *rules["before"].get(page, [])] if any(one.run for one in plans) else []
        for words in given:
            words = words.replace("{base}", "recipes/tiny/base")
            code, printed, _ = run(words, folder)
            if code:
                print(f"{page}: what it takes for granted failed: {words}\n{printed[-2000:]}")
                return 1
        for one in plans:
            wrong += not try_one(one, folder, report)
    return wrong


def try_one(one: Plan, folder: Path, report: Path) -> bool:
    """Run one command, say how it went and write it down. Returns whether it did what the page says."""
    where, row = f"{one.command.page}:{one.command.line}", {"written": one.command.written, "how": one.how}
    if one.run is None:
        ok, row["why"] = True, one.why
        print(f"not run     {where}: {one.command.written}  ({one.why})", flush=True)
    else:
        words = f"cd {shlex.quote(str(ROOT))} && {one.run}" if one.run.startswith("make ") else one.run
        code, printed, seconds = run(words, folder)
        lost = missing(one.command.output, printed)
        ok = code == 0 and lost is None
        row |= {"run": one.run, "code": code, "seconds": round(seconds, 1), "missing": lost}
        print(f"{'ok' if ok else 'WRONG':5} {seconds:4.0f} s {where}: {one.run}", flush=True)
        if not ok:
            print(f"      exit code {code}; {'not printed: ' + lost if lost else 'it ends:'}\n{printed[-2000:]}")
    with report.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"page": one.command.page, "line": one.command.line, **row, "ok": ok}) + "\n")
    return ok


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("pages", nargs="*", help="README.md, docs/scoring.md, …; default: all")
    parser.add_argument("--list", action="store_true", help="print what would run")
    parser.add_argument("--report", type=Path, default=Path("try_docs.jsonl"), help="default: try_docs.jsonl")
    arguments = parser.parse_args()
    rules = yaml.safe_load((ROOT / "scripts" / "try_docs.yaml").read_text(encoding="utf-8"))
    chosen = arguments.pages or pages()
    if unknown := set(chosen) - set(pages()):
        parser.error(f"no page {', '.join(sorted(unknown))}; there are: {', '.join(pages())}")
    if arguments.list:
        for page in chosen:
            text = (ROOT / page).read_text(encoding="utf-8")
            for one in apart([plan(command, rules) for command in commands(page, text)]):
                print(f"{one.how:10}  {page}:{one.command.line}  {one.run or f'{one.command.written}  ({one.why})'}")
        return 0
    wrong = sum(try_page(page, rules, arguments.report) for page in chosen)
    print(f"{wrong} commands did not do what their page says" if wrong else "every command did what its page says")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
