"""What ``verl-dft doctor`` finds out in processes of its own: ``python -m verl_dft.doctor_probe verl|vllm``.

Importing verl or vLLM changes the process that does it, may print, and may crash; so each is tried in a process of its
own, which prints its findings as one line of JSON behind :data:`MARK`.
"""

import importlib
import importlib.metadata
import json
import os
import sys
from typing import Any

MARK = "verl_dft probe:"


def _failure(error: BaseException) -> str:
    """An exception in one line, with the cause that a wrapping ImportError may hide."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}".splitlines()[0][:300]


def load_entry_points(group: str) -> list[dict[str, Any]]:
    """Load every entry point of a group: ``name, value, distribution, error`` (None where it loaded)."""
    found = []
    for entry in importlib.metadata.entry_points(group=group):
        error = None
        try:
            entry.load()
        except BaseException as caught:  # a plugin that exits is a failure too
            error = _failure(caught)
        owner = entry.dist.metadata["Name"] if entry.dist else "unknown"
        found.append({"name": entry.name, "value": entry.value, "distribution": owner, "error": error})
    return found


def _device() -> dict[str, Any]:
    """The device verl chose while it was imported, the one it should have, and the accelerator's name if any."""
    from verl.plugin.platform import get_platform

    chosen = get_platform().device_name  # before anything below can change it
    from verl_dft.platform.cpu import accelerator

    name = accelerator()
    forced = os.environ.get("VERL_PLATFORM", "").strip().lower()
    return {"chosen": chosen, "cpu_expected": forced == "cpu" or (not forced and name is None), "accelerator": name}


def _objectives() -> dict[str, str | None]:
    """Each registered objective with the error of importing its class (None where it imported)."""
    from verl_dft.objectives import list_objectives, objective_target

    found: dict[str, str | None] = {}
    for name in list_objectives():
        module, _, attribute = objective_target(name).rpartition(".")
        try:
            getattr(importlib.import_module(module), attribute)
            found[name] = None
        except Exception as error:
            found[name] = _failure(error)
    return found


def _policy_losses() -> dict[str, Any]:
    """Names under which verl's online trainer finds our objectives, or the error of registering them."""
    try:
        from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
    except Exception as error:
        return {"names": [], "error": _failure(error)}
    names = [name for name, loss in POLICY_LOSS_REGISTRY.items() if hasattr(loss, "verl_dft_objective")]
    return {"names": names, "error": None}


def probe_verl() -> dict[str, Any]:
    """Import verl as any process does, then look at what its plugins did."""
    import verl  # noqa: F401

    # verl skips plugins that VERL_USE_EXTERNAL_PLUGINS leaves out and hides those that failed
    loaded_by_verl = "verl_dft.plugin" in sys.modules
    device, policy_losses = _device(), _policy_losses()
    return {
        "loaded_by_verl": loaded_by_verl,
        "device": device,
        "entry_points": load_entry_points("verl.plugins"),
        "objectives": _objectives(),
        "policy_losses": policy_losses,
        "device_names": _device_names(),
    }


def _device_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def probe_vllm() -> dict[str, Any]:
    """Import vLLM and call our hook, as each of vLLM's processes does."""
    import vllm  # noqa: F401
    from vllm.platforms import current_platform

    found = [e for e in load_entry_points("vllm.general_plugins") if e["distribution"] == "verl-dft"]
    allowed = os.environ.get("VLLM_PLUGINS")
    for entry in found:
        if entry["error"]:
            continue
        module, _, function = entry["value"].partition(":")
        try:
            getattr(importlib.import_module(module), function)()
        except Exception as error:
            entry["error"] = _failure(error)
    return {
        "entry_points": found,
        "allowed": allowed is None or all(e["name"] in allowed.split(",") for e in found),
        "is_cpu": bool(current_platform.is_cpu()),
    }


def main(argv: list[str]) -> int:
    """Print the findings of one probe; exit code 0 even where it found something wrong."""
    probe = {"verl": probe_verl, "vllm": probe_vllm}[argv[0]]
    try:
        findings = probe()
    except BaseException as error:
        findings = {"error": _failure(error)}
    print(f"\n{MARK}{json.dumps(findings)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
