"""Shared by the tests of the sample store: its failpoints, and dying at one."""

import os
import signal
from collections.abc import Callable

# (place, how often it is passed in a run of 4 shards, 11 samples and 4 headers)
PLACES = [
    ("store.before_append", 15),
    ("store.after_append", 15),
    ("store.shard_commit", 4),
    ("store.before_fsync", 4),
    ("store.after_fsync", 4),
    ("store.before_rename", 4),
    ("store.after_rename", 4),
]


def killed(failpoint: str, work: Callable[[], object]) -> bool:
    """Do ``work`` in a forked process with a failpoint set; whether it was killed there."""
    pid = os.fork()
    if pid == 0:
        os.environ["VERL_DFT_FAILPOINT"] = failpoint
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
