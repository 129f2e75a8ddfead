"""The doctor's report: form, exit codes, and the checks that need no import of verl or vLLM."""

import json

import pytest

from verl_dft import doctor
from verl_dft.errors import InputError

VERL_FOUND = {
    "loaded_by_verl": True,
    "device": {"chosen": "cpu", "cpu_expected": True, "accelerator": None},
    "device_names": [],
    "entry_points": [
        {"name": "verl_dft", "value": "verl_dft.plugin", "distribution": "verl-dft", "error": None},
    ],
    "objectives": {"sft": None},
    "policy_losses": {"names": ["sft"], "error": None},
}


def failed(checks: list[doctor.Check]) -> dict[str, str]:
    return {check.name: check.fix for check in checks if check.status == "FAIL"}


def test_exit_code_and_fix_follow_the_checks(monkeypatch, capsys):
    checks = [doctor.Check("python", "ok", "3.11"), doctor.Check("verl", "FAIL", "0.8.0", "pip install verl==0.9.1")]
    monkeypatch.setattr(doctor, "run_checks", lambda: checks)
    assert doctor.main([]) == 1
    shown = capsys.readouterr().out
    assert "FAIL verl" in shown and "fix: pip install verl==0.9.1" in shown and "1 of 2 checks failed" in shown
    assert doctor.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False and [c["status"] for c in report["checks"]] == ["ok", "FAIL"]
    monkeypatch.setattr(doctor, "run_checks", lambda: checks[:1])
    assert doctor.main([]) == 0
    assert "all 1 checks passed" in capsys.readouterr().out


def test_unknown_argument_is_bad_input():
    with pytest.raises(InputError, match="--jsn.*--json"):
        doctor.main(["--jsn"])


def test_a_good_probe_passes():
    assert failed(doctor._check_verl_probe(VERL_FOUND)) == {}


@pytest.mark.parametrize(
    ("change", "name", "fix"),
    [
        ({"device": {"chosen": "cuda", "cpu_expected": True, "accelerator": None}}, "device", "verl plugin"),
        (
            {"device": {"chosen": "cpu", "cpu_expected": False, "accelerator": "nvidia"}, "device_names": ["H200"]},
            "device",
            "VERL_PLATFORM",
        ),
        ({"entry_points": []}, "verl_dft", "reinstall"),
        (
            {"entry_points": [{**VERL_FOUND["entry_points"][0], "error": "ImportError: no torch"}]},
            "verl.plugins: verl_dft",
            "solve the error",
        ),
        ({"objectives": {"mine": "ImportError: x"}}, "objectives", "mine"),
        ({"policy_losses": {"names": [], "error": None}}, "policy losses", "verl plugin"),
        ({"policy_losses": {"names": [], "error": "InputError: taken"}}, "policy losses", "solve the error"),
    ],
    ids=[
        "no-cpu-platform",
        "cpu-forced-on-gpu",
        "not-registered",
        "plugin-raises",
        "objective-raises",
        "no-policy-losses",
        "policy-losses-raise",
    ],
)
def test_a_bad_probe_fails_with_its_fix(change, name, fix):
    assert fix in failed(doctor._check_verl_probe({**VERL_FOUND, **change}))[name]


def test_flash_attention_is_missed_only_on_a_gpu():
    gpu = {"device": {"chosen": "cuda", "cpu_expected": False, "accelerator": "nvidia"}, "device_names": ["H200"]}
    by_name = {check.name: check for check in doctor._check_verl_probe({**VERL_FOUND, **gpu})}
    assert by_name["flash-attn"].status == "note" and "gpu" in by_name["flash-attn"].fix
    assert by_name["device"].status == "ok" and "H200" in by_name["device"].detail


def test_vllm_plugin_left_out_fails_only_on_a_cpu():
    entry = {"name": "verl_dft_cpu", "value": "m:f", "distribution": "verl-dft", "error": None}
    for is_cpu, status in ((True, "FAIL"), (False, "note")):
        checks = doctor._check_vllm_probe({"entry_points": [entry], "allowed": False, "is_cpu": is_cpu})
        assert checks[-1].status == status and "unset VLLM_PLUGINS" in checks[-1].fix


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: {"verl-dft": "0.1.0", "torch": "2.0.0"}.get(name))
    found = failed(doctor._check_requirements())
    assert found["torch"] == "pip install 'torch>=2.11'"
    assert "hydra-core" in found and "verl" in found
    assert doctor._check_vllm().status == "FAIL"
