"""The plugin package of docs/extend.md: built into a wheel, installed, and trained with. Nothing is downloaded."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TrainArgv, losses

from verl_dft.config import group_options

pytestmark = pytest.mark.integration

TIMEOUT_S = 120


@pytest.fixture(scope="module")
def source(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that the build leaves nothing in the tree."""
    target = tmp_path_factory.mktemp("plugin") / "verl-dft-gce"
    shutil.copytree(repo_root / "tests" / "plugin_package", target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


@pytest.fixture(scope="module")
def installed(source: Path, run_command: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the package installed."""
    wheels, site = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    for command in (
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, source],
        [*pip, "install", "-q", "--no-deps", "--no-index", "--target", site, f"--find-links={wheels}", "verl-dft-gce"],
    ):
        rc, stdout, stderr = run_command(command, timeout=TIMEOUT_S, cwd=source.parent)
        assert rc == 0, stdout + stderr
    assert not (site / "tests").exists(), "the wheel holds more than the package"
    return {"PYTHONPATH": str(site)}


def test_its_own_tests_pass(source: Path, installed: dict[str, str], run_command: Callable, tmp_path: Path) -> None:
    # importlib: nothing of the source folder comes onto sys.path, so what is imported is what was installed
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    command += [source / "tests"]
    rc, stdout, stderr = run_command(command, timeout=TIMEOUT_S, cwd=tmp_path, env=installed)
    assert rc == 0 and " passed" in stdout, stdout + stderr


def test_help_lists_it(run_cli: Callable, installed: dict[str, str]) -> None:
    listed = ", ".join(sorted([*group_options("objective"), "gce"]))
    assert f"objective: {listed}" in run_cli(["train", "--help"], env=installed).stdout
    assert "gce" not in group_options("objective")


def test_it_trains_by_its_name(
    run_cli: Callable, installed: dict[str, str], train_argv: TrainArgv, tmp_path: Path
) -> None:
    argv = train_argv(tmp_path / "run", "objective=gce", "objective.q=0.5", "trainer.total_training_steps=2")
    rc, stdout, stderr = run_cli(["train", *argv], timeout=TIMEOUT_S, cwd=tmp_path, env=installed)
    assert rc == 0, stdout[-3000:] + stderr[-3000:]
    assert "trained gce" in stdout + stderr
    found = losses(tmp_path / "run")
    assert len(found) == 2 and all(0 < value < 2 for value in found), "(1 - p^q) / q lies between 0 and 1 / q"
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "_target_: verl_dft_gce.GCE" in config and "q: 0.5" in config
    assert list((tmp_path / "run" / "model").glob("*.safetensors"))
