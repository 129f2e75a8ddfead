"""Memory that torch frees stays with the process."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from verl_dft.platform.memory import keep_freed_memory

torch.set_num_threads(1)

def faults(tensors):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(tensors):
        torch.ones(20_000_000)  # more than glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults(10)
print(int(keep_freed_memory()), before, faults(30) and faults(10))  # small objects settle between the large ones first
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("variable", [None, "MALLOC_ARENA_MAX"])
def test_a_freed_tensors_pages_are_used_again(variable: str | None) -> None:
    environment = {"PATH": "/usr/bin:/bin", **({variable: "4"} if variable else {})}
    ended = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    kept, before, after = map(int, ended.stdout.split())
    assert bool(kept) is (variable is None)  # the user's own settings stay as they are
    assert before > 100_000
    assert after < before / 2 if kept else after > before / 2
