"""Token entropy by training step, where a training logged it.

Only what computes the whole distribution logs it: ``actor/entropy`` of the online trainer (over the rollouts), and
``train/entropy`` of ``objective=eaft`` (over the data). The two are of different texts; ``verl-dft score`` stores none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl_dft.analysis import dynamics
from verl_dft.analysis.output import Analysis
from verl_dft.errors import InputError

check = dynamics.check


def run(config: Mapping[str, Any]) -> Analysis:
    """Keys: ``configs/analysis/entropy.yaml``. Raises InputError where a run has no entropy, or of the other kind."""
    points, files, data = dynamics.load(config, "entropy")
    kinds = {path: dynamics.find_metric("entropy", curves) for path, curves in data.items()}
    for path, kind in kinds.items():
        if kind is None:
            raise InputError(
                f"{files[path]}: no entropy is logged; online training (verl-dft rl) logs actor/entropy, and "
                "objective=eaft train/entropy"
            )
    if len(set(kinds.values())) > 1:
        where = ", ".join(f"{files[path]} has {kind}" for path, kind in kinds.items())
        raise InputError(f"{where}: entropies of rollouts and of data are not comparable; draw one kind at a time")
    wanted = [str(next(iter(kinds.values())))]
    return dynamics.analyze("entropy", points, files, data, wanted, config["smooth"], strict=True)
