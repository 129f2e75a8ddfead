"""Fixtures of the unit tests."""

import fcntl
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def _temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What verl, torchrun and wandb leave in the temporary folder, where a test calls them in this process."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("temporary"))
    yield
    tempfile.tempdir = before


@pytest.fixture
def only_sweeper() -> Iterator[None]:
    """For tests of what removes shared memory that nobody holds: another's, too, if both ran at a time."""
    with open(__file__, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
