"""The process that verifies answers one at a time. Started by the pool as ``python -m verl_dft.grading.worker``.

Requests and replies are JSON lines on the original stdin and stdout; whatever a library prints goes nowhere. A plain
subprocess rather than ``multiprocessing``: it needs no ``__main__`` guard, no fork of a process with threads, and no
shared lock that a killed worker could leave taken.
"""

import argparse
import importlib
import json
import logging
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import IO, Any

_ORPHAN_CHECK_S = 10.0


def _private_pipes() -> tuple[IO[bytes], IO[str]]:
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    return requests, replies


def _load(target: str) -> Callable[[str, str, str], Any]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _next_request(requests: IO[bytes], buffer: bytearray, parent: int) -> bytes | None:
    """The next line, or None when the parent is gone: it closed the pipe, or died while a fork of it holds the pipe."""
    while b"\n" not in buffer:
        if select.select([requests], [], [], _ORPHAN_CHECK_S)[0]:
            chunk = requests.read(1 << 16)
            if not chunk:
                return None
            buffer += chunk
        elif os.getppid() != parent:
            return None
    line, _, rest = bytes(buffer).partition(b"\n")
    buffer[:] = rest
    return line


def _answer(verify: Callable[[str, str, str], Any], request: bytes, memory_mb: int) -> dict[str, Any]:
    try:
        equal, qwen, rule = verify(*json.loads(request))
        return {"equal": bool(equal), "qwen": bool(qwen), "rule": rule}
    except MemoryError:
        return {"error": f"needs more than {memory_mb} MB", "rule": "memory_limit"}
    except BaseException as error:  # math-verify's own time-out is a BaseException
        return {"error": f"{type(error).__name__}: {error}"[:300], "rule": "exception"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--verify", default="verl_dft.grading.verify:verify")
    parser.add_argument("--timeout", type=float, required=True)
    parser.add_argument("--memory-mb", type=int, required=True)
    options = parser.parse_args()
    parent = os.getppid()
    requests, replies = _private_pipes()
    verify = _load(options.verify)
    verify(r"\sin^2 x", r"1 - \cos^2 x", "auto")  # imports what it needs before the clock of the first item starts
    logging.disable(logging.CRITICAL)  # math-verify warns at each call that it has no time-out
    limit = options.memory_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps({"ready": os.getpid()}), file=replies, flush=True)
    buffer = bytearray()
    while (request := _next_request(requests, buffer, parent)) is not None:
        # The kernel ends this process when its CPU time is up, whatever it is doing and whether or not the pool lives.
        signal.setitimer(signal.ITIMER_PROF, options.timeout)
        reply = _answer(verify, request, options.memory_mb)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    sys.setrecursionlimit(3000)
    main()
