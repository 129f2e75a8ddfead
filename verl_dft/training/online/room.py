"""Whether a Ray cluster can ever hold the processes of a run."""

from collections.abc import Mapping, Sequence

from omegaconf import DictConfig

from verl_dft.errors import InputError

_CPUS_PER_WORKER = 3
"""What verl's ``ResourcePoolManager`` reserves per worker (``max_colocate_count``)."""
_OTHER_CPUS = 3
"""The trainer's own process, the queue's controller, and one to start the others with, which then run without."""


def check_room(config: DictConfig, machines: Sequence[Mapping[str, float]], device: str) -> None:
    """Raise :class:`InputError` where verl would wait for ever.

    Args:
        config: verl asks for ``trainer.nnodes`` groups of ``trainer.n_gpus_per_node`` workers, each group on one
            machine (which may hold several), and the same for teachers and reward models with resources of their own.
        machines: total resources of each machine, by Ray's names.
        device: Ray's name of the accelerator.
    """
    wanted = sorted(_groups(config), reverse=True)
    room = [{name: float(has.get(name, 0)) for name in (device, "CPU")} for has in machines]
    placed = 0
    for workers in wanted:  # the largest first
        need = {device: workers, "CPU": _CPUS_PER_WORKER * workers}
        machine = next((has for has in room if all(has[name] >= amount for name, amount in need.items())), None)
        if machine is None:
            break
        placed += 1
        for name, amount in need.items():
            machine[name] -= amount
    storage = config.transfer_queue.backend.SimpleStorage.num_data_storage_units
    others = storage + _OTHER_CPUS
    if placed == len(wanted) and sum(has["CPU"] for has in room) >= others:
        return
    found = "; ".join(f"{has.get(device, 0):g} {device}, {has.get('CPU', 0):g} CPU" for has in machines) or "none"
    raise InputError(
        f"the Ray cluster has no room for {' + '.join(map(str, wanted))} workers, one {device} and {_CPUS_PER_WORKER} "
        f"CPU each, every group on one machine, and {others} more CPU (its machines: {found}); change trainer.nnodes, "
        "trainer.n_gpus_per_node (distillation's likewise) or transfer_queue.backend.SimpleStorage."
        "num_data_storage_units, or start Ray's nodes with a larger --num-cpus"
    )


def _groups(config: DictConfig) -> list[int]:
    """Workers of each group."""
    parts = [config.trainer]
    if config.distillation.enabled:
        parts.append(config.distillation)
    if config.reward.reward_model.enable_resource_pool:
        parts.append(config.reward.reward_model)
    return [part.n_gpus_per_node for part in parts for _ in range(part.nnodes)]
