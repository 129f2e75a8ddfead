"""Temporary folders that go with what they were made for."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from verl_dft.files import scratch_folder, sweep_scratch
from verl_dft.platform.temporary import temporaries_in
from verl_dft.sampling.engine_environment import engine_environment

HOLD = """
from verl_dft.files import scratch_folder
with scratch_folder("engine") as folder:
    (folder / "socket").touch()
    print(folder, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_folder_goes_with_its_block(temporary: Path) -> None:
    with pytest.raises(KeyError), scratch_folder("engine") as folder:
        (folder / "file").touch()
        assert folder.parent == temporary
        raise KeyError
    assert list(temporary.iterdir()) == []


def test_a_killed_ones_folder_is_swept_and_a_living_ones_stays(temporary: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            held = Path(process.stdout.readline().strip())
            sweep_scratch("engine")
            assert (held / "socket").exists()
        finally:
            process.kill()
        process.wait(20)
    assert held.exists()
    sweep_scratch("other")
    assert held.exists()
    with scratch_folder("engine") as mine:
        assert list(temporary.iterdir()) == [mine]


def test_an_engine_starts_with_its_own_folder(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    folder = Path("/tmp/x")
    before = dict(os.environ)
    with engine_environment(folder, 3):
        assert tempfile.gettempdir() == os.environ["TMPDIR"] == os.environ["VLLM_RPC_BASE_PATH"] == "/tmp/x"
        assert os.environ["RAY_TMPDIR"] == str(temporary)
        assert (os.environ["OMP_NUM_THREADS"], os.environ["TORCHINDUCTOR_CACHE_DIR"]) == ("3", "mine")
    assert dict(os.environ) == before
    assert tempfile.gettempdir() == str(temporary)


def test_a_path_that_is_too_long_for_a_socket_is_left_alone() -> None:
    assert temporaries_in(Path("/tmp/" + "x" * 65))["TMPDIR"].endswith("x")
    assert temporaries_in(Path("/tmp/" + "x" * 66)) == {}


def test_what_torch_has_compiled_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    with tempfile.TemporaryDirectory(dir="/tmp", prefix="vd") as short:  # sockets lie in it
        monkeypatch.setattr(tempfile, "tempdir", short)
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        usual = Path(default_cache_dir())
        for _ in range(2):
            with scratch_folder("engine") as folder:
                assert temporaries_in(folder)["TORCHINDUCTOR_CACHE_DIR"] == str(usual)
                (folder / usual.name / "header").touch()
            assert not folder.exists() and (usual / "header").is_file()
