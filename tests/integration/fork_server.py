"""Runs training entry points in forked processes, so that verl is imported once instead of once a run.

Reads one JSON request a line: ``{"call": "module:function", "argv": [...], "world": 2, "env": {...}, "log": path,
"timeout": seconds}``. Forks ``world`` processes with the environment torchrun would give them, each calls
``function(argv)``; answers ``{"codes": [...]}``: exit codes, negative for a signal, 124 for a time-out. As torchrun
does, it ends the other ranks once one has failed. Nothing is stubbed: each process is a real rank on gloo.
"""

import json
import os
import sys
from pathlib import Path

import verl_dft.training.sft  # noqa: F401  (the import that is worth sharing)

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
from faulting import world  # noqa: E402


def answer(request: dict, mark: str) -> list[int]:
    """The ranks' exit codes."""
    if request["cwd"]:
        os.chdir(request["cwd"])
    run = world.start(request["call"], request["argv"], request["env"], Path(request["log"]), mark, request["world"])
    late = not run.wait(request["timeout"])
    if late:
        run.kill()
    return [124 if late else run.codes[pid] for pid in run.pids]


def main() -> None:
    answers, home = os.fdopen(os.dup(1), "w"), os.getcwd()
    os.dup2(2, 1)  # a stray print must not be read as an answer
    for number, line in enumerate(sys.stdin):
        codes = answer(json.loads(line), f"{os.getpid()}-{number}")
        os.chdir(home)
        answers.write(json.dumps({"codes": codes}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
