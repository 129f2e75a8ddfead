"""The process that verifies answers one at a time. Started by the pool as ``python -m verl_dft.grading.worker``.

Requests and replies are JSON lines on the original stdin and stdout; whatever a library prints goes nowhere. A plain
subprocess rather than ``multiprocessing``: it needs no ``__main__`` guard, no fork of a process with threads, and no
shared lock that a killed worker could leave taken.
"""

import argparse
import importlib
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import IO


def _private_pipes() -> tuple[IO[str], IO[str]]:
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    return requests, replies


def _load(target: str) -> Callable[[str, str, str], tuple[bool, str]]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _limit_cpu(seconds: float) -> None:
    """Let the kernel end this process after ``seconds`` more of CPU: the pool may be gone and unable to."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--verify", default="verl_dft.grading.verify:verify")
    parser.add_argument("--timeout", type=float, required=True)
    parser.add_argument("--memory-mb", type=int, required=True)
    options = parser.parse_args()
    requests, replies = _private_pipes()
    verify = _load(options.verify)
    verify("1", "2", "auto")  # imports what it needs before the clock of the first item starts
    limit = options.memory_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps({"ready": os.getpid()}), file=replies, flush=True)
    for line in requests:
        _limit_cpu(2 * options.timeout)
        try:
            equal, rule = verify(*json.loads(line))
            reply = {"equal": bool(equal), "rule": rule}
        except MemoryError:
            reply = {"error": f"needs more than {options.memory_mb} MB"}
        except BaseException as error:  # math-verify's own time-out is a BaseException
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    sys.setrecursionlimit(3000)
    main()
