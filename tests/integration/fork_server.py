"""Runs training entry points in forked processes, so that verl is imported once instead of once a run.

Reads one JSON request a line: ``{"call": "module:function", "argv": [...], "world": 2, "env": {...}, "log": path,
"timeout": seconds}``. Forks ``world`` processes with the environment torchrun would give them, each calls
``function(argv)``; answers ``{"codes": [...]}``: exit codes, negative for a signal, 124 for a time-out. As torchrun
does, it ends the other ranks once one has failed. Nothing is stubbed: each process is a real rank on gloo.
"""

import importlib
import itertools
import json
import os
import signal
import socket
import sys
import time
import traceback

import verl_dft.training.sft  # noqa: F401  (the import that is worth sharing)

_ports = itertools.cycle(range(20_000, 30_000))
for _ in range(os.getpid() * 101 % 10_000):  # servers that run at the same time start far apart
    next(_ports)


def free_port() -> int:
    """One that the system gives to nobody by itself: rank 0 listens on it only a second later."""
    for port in _ports:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise AssertionError


def child(request: dict, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    if request.get("cwd"):
        os.chdir(request["cwd"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        module, _, function = request["call"].partition(":")
        code = int(getattr(importlib.import_module(module), function)(request["argv"]) or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(request: dict) -> dict[int, int]:
    world, port = request["world"], free_port()
    pids = {}
    for rank in range(world):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **request.get("env", {}),
        }
        pid = os.fork()
        if pid == 0:
            child(request, environment)
        pids[pid] = rank
    return pids


def wait(pids: dict[int, int], timeout: float) -> list[int]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < len(pids):
        for pid in pids:
            if pids[pid] in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pids[pid]] = os.waitstatus_to_exitcode(status)
        late = time.monotonic() > deadline
        if late or any(code != 0 for code in codes.values()):
            for pid, rank in pids.items():
                if rank not in codes:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[rank] = 124 if late else -signal.SIGTERM
        time.sleep(0.01)
    return [codes[rank] for rank in sorted(codes)]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a stray print must not be read as an answer
    for line in sys.stdin:
        request = json.loads(line)
        codes = wait(start(request), request["timeout"])
        answers.write(json.dumps({"codes": codes}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
