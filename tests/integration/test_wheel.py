"""A wheel built from the tree works in a clean environment, from another directory."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def wheel(repo_root, run_command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, repo_root]
    rc, stdout, stderr = run_command(command, timeout=300)
    assert rc == 0, stdout + stderr
    (built,) = folder.glob("verl_dft-*.whl")
    return built


@pytest.fixture(scope="module")
def clean_bin(wheel, run_command, tmp_path_factory) -> Path:
    """`bin` of an environment with the wheel in it, which borrows every other package from this test's own.

    A path in a .pth file is put on sys.path without reading the .pth files in it, so an editable install of this
    project, if there is one there, stays out of reach.
    """
    venv = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=120)
    python = venv / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    rc, stdout, stderr = run_command(command, timeout=120)
    assert rc == 0, stdout + stderr
    (site,) = venv.glob("lib/python3*/site-packages")
    (site / "borrowed.pth").write_text(
        "\n".join(dict.fromkeys(sysconfig.get_paths()[k] for k in ("purelib", "platlib")))
    )
    return venv / "bin"


@pytest.fixture(scope="module")
def clean_env(clean_bin) -> dict[str, str]:
    return {"PATH": f"{clean_bin}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}


def test_wheel_holds_the_tree(wheel, repo_root):
    shipped = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in {
        "configs": "verl_dft/_configs",
        "recipes": "verl_dft/_recipes",
        "verl_dft": "verl_dft",
    }.items():
        paths = [p for p in (repo_root / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        assert paths, folder
        missing = {f"{inside}/{path.relative_to(repo_root / folder)}" for path in paths} - shipped
        assert not missing
    assert not [
        name for name in shipped if name.split("/")[0] not in ("verl_dft", wheel.name.rsplit("-", 3)[0] + ".dist-info")
    ]


def test_doctor_from_the_wheel(clean_bin, clean_env, run_command, tmp_path):
    rc, stdout, stderr = run_command([clean_bin / "verl-dft", "doctor"], timeout=120, cwd=tmp_path, env=clean_env)
    assert rc == 0, stdout + stderr
    assert str(clean_bin.parent) in stdout and "_configs" in stdout, stdout


def test_train_from_the_wheel(clean_bin, clean_env, run_command, tmp_path):
    (base,) = clean_bin.parent.glob("lib/python3*/site-packages/verl_dft/_recipes/tiny/base")
    command = [clean_bin / "verl-dft", "train", "objective=dft", "data=arithmetic", f"model={base}"]
    command += ["data.source.num_rows=64", "data.train_batch_size=8", "trainer.total_training_steps=2"]
    rc, stdout, stderr = run_command([*command, "output_dir=run"], timeout=400, cwd=tmp_path, env=clean_env)
    assert rc == 0, stdout[-3000:] + stderr[-3000:]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 2
    assert list((tmp_path / "run" / "model").glob("*.safetensors"))
