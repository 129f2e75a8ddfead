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
        [torch.ones(7_000_000) for _ in range(8)]  # 28 MB each, and together more than glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults(10)
print(int(keep_freed_memory()), before, faults(30) and faults(10))  # small objects settle between the large ones first
"""


def run(**variables: str) -> list[int]:
    environment = {"PATH": "/usr/bin:/bin", **variables}
    ended = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    return list(map(int, ended.stdout.split()))


pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")]


def test_a_freed_tensors_pages_are_used_again() -> None:
    kept, before, after = run()
    assert kept and before > 10_000 and after < before / 10


def test_a_users_own_settings_stay_as_they_are() -> None:
    assert not run(MALLOC_ARENA_MAX="4")[0] and not run(GLIBC_TUNABLES="glibc.malloc.arena_max=2")[0]
