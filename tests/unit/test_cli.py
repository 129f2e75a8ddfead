"""What the command does around its verbs: output that nobody reads, and a disk that is full."""

import errno
import os
import subprocess
import sys

import pytest

from verl_dft import cli
from verl_dft.data import command


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-u", "-m", "verl_dft.cli", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/rows.parquet")

    monkeypatch.setattr(command, "list_sources", full)
    assert cli.main(["data", "list"]) == 1
    assert capsys.readouterr().err == (
        "error: runs/rows.parquet: No space left on device; what is finished is kept: make room and run it again\n"
    )


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(errno.EACCES, "no", "x")

    monkeypatch.setattr(command, "list_sources", refused)
    with pytest.raises(PermissionError):
        cli.main(["data", "list"])
