"""`verl-dft doctor` on this installation, and on installations that were broken on purpose."""

import json
import time

import pytest

from verl_dft.objectives import list_objectives
from verl_dft.training.policy_options import online_names

pytestmark = pytest.mark.integration


def write_distribution(folder, name: str, version: str, entry_points: str = "") -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


def failures(result) -> dict[str, dict]:
    report = json.loads(result.stdout)
    assert result.rc == (0 if report["ok"] else 1)
    return {check["name"]: check for check in report["checks"] if check["status"] == "FAIL"}


def test_this_installation_passes(run_cli, tmp_path):
    started = time.monotonic()
    rc, stdout, stderr = run_cli(["doctor"], cwd=tmp_path)
    assert rc == 0, stdout + stderr
    for name in ("python", "verl ", "torch", "vllm ", "transformers", "ray", "tensordict", "device", "objectives"):
        assert f"ok   {name}" in stdout, stdout
    assert "verl.plugins: verl_dft" in stdout and "vllm.general_plugins: verl_dft_cpu" in stdout
    assert ", ".join(list_objectives()) in stdout
    assert "ok   policy losses" in stdout and ", ".join(online_names()) in stdout
    assert time.monotonic() - started < 60  # 7 s on two idle cores


@pytest.mark.slow
def test_plugins_switched_off(run_cli):
    found = failures(run_cli(["doctor", "--json"], env={"VERL_USE_EXTERNAL_PLUGINS": "none"}))
    assert "unset VERL_USE_EXTERNAL_PLUGINS" in found["verl plugin"]["fix"]


@pytest.mark.slow
def test_another_packages_plugin_and_a_wrong_verl(run_cli, tmp_path):
    """verl would hide both failures at DEBUG level: the plugin that raises, and ours, which refuses that version."""
    write_distribution(tmp_path, "noisy", "1.0", "[verl.plugins]\nnoisy = noisy_plugin\n")
    (tmp_path / "noisy_plugin.py").write_text("raise RuntimeError('not today')\n")
    write_distribution(tmp_path, "verl", "0.8.0")
    found = failures(run_cli(["doctor", "--json"], env={"PYTHONPATH": str(tmp_path)}))
    assert "not today" in found["verl.plugins: noisy"]["detail"]
    assert "uninstall noisy" in found["verl.plugins: noisy"]["fix"]
    assert "0.8.0" in found["verl"]["detail"] and "pip install" in found["verl"]["fix"]
    assert "0.8.0" in found["verl.plugins: verl_dft"]["detail"]
    assert not found.keys() & {"python", "torch", "configs", "objectives"}, "what is sound must not be blamed"
