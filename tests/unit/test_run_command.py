"""The helper that runs commands for other tests: whole output, and nothing left running after a timeout."""

import re
import sys

import pytest
from process_helpers import with_id

from verl_dft.end_processes import still_running


def test_output_status_and_environment(run_command, tmp_path):
    code = "import os, sys; print(os.getcwd(), os.environ['MINE']); print('e', file=sys.stderr); sys.exit(3)"
    rc, stdout, stderr = run_command([sys.executable, "-c", code], timeout=60, cwd=tmp_path, env={"MINE": "x"})
    assert (rc, stdout, stderr) == (3, f"{tmp_path} x\n", "e\n")


def test_a_timeout_ends_the_command_and_what_it_started(run_command):
    """The child is in a session of its own, as torchrun's ranks are."""
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        "print(f'<{child.pid}>', flush=True)\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(pytest.fail.Exception, match="still running after 3 s") as caught:
        run_command([sys.executable, "-c", code], timeout=3)
    child = int(re.search(r"<(\d+)>", str(caught.value)).group(1))
    assert not still_running(lambda: with_id(child), 10), "the child outlived the timeout"
