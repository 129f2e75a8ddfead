"""The environment in which vLLM's engine starts."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from verl_dft.platform.temporary import temporaries_in


@contextmanager
def engine_environment(folder: Path, num_threads: int | None) -> Iterator[None]:
    """In the block vLLM's temporary files go to ``folder``, and each CPU process that it starts has ``num_threads``.

    vLLM would bind each of several processes to a NUMA node of its own, and refuses to start where there are fewer.
    """
    wanted = temporaries_in(folder)
    if num_threads is not None:
        wanted["OMP_NUM_THREADS"] = str(num_threads)
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    given = {name: os.environ.get(name) for name in wanted}
    usual, tempfile.tempdir = tempfile.tempdir, str(folder)  # which Python looks up once a process
    os.environ.update(wanted)
    try:
        yield
    finally:
        tempfile.tempdir = usual
        restore_environment(given)


def restore_environment(values: Mapping[str, str | None]) -> None:
    """Give each variable its value; None removes it."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
