"""verl's entry point (``verl.plugins``): imported on any ``import verl``, in the driver and in every Ray worker.

verl logs a plugin's failure at DEBUG only, so this module reports its own on stderr. ``verl-dft doctor`` shows
``STATUS``.
"""

import importlib.util
import sys
from types import ModuleType

from verl_dft.platform.hooks import refuse_import, when_imported

STATUS: dict[str, str] = {}
"""``{"platform": …}``, ``policy_losses`` once verl's losses were imported and, after a failure, ``error``."""


def _load() -> None:
    from verl_dft.platform.compat import check_verl_version

    check_verl_version()
    from verl_dft.platform import cpu

    STATUS["platform"] = "cpu" if cpu.install() else "left to verl"

    # verl imports it for every worker, and it imports vLLM (1.1 s); verl expects it to be missing
    if importlib.util.find_spec("torch_npu") is None:
        refuse_import("verl.checkpoint_engine.hccl_checkpoint_engine", "Ascend's torch_npu is not installed")

    # importing these modules of verl takes seconds, and most processes never do
    when_imported("verl.workers.config.actor", _widen_config)
    when_imported("verl.trainer.ppo.core_algos", _register_policy_losses)
    when_imported("verl.models.transformers.monkey_patch", _load_trl_only_where_used)
    when_imported("verl.experimental.agent_loop.agent_loop", _register_agent_loops)
    when_imported("verl.utils.model", _change_model_loading)


def _widen_config(module: ModuleType) -> None:
    from verl_dft.training.policy_options import widen_policy_loss_config

    widen_policy_loss_config(module)


def _register_policy_losses(module: ModuleType) -> None:
    from verl_dft.training.policy_loss import register_policy_losses

    STATUS["policy_losses"] = " ".join(register_policy_losses(module))


def _register_agent_loops(module: ModuleType) -> None:
    from verl_dft.training.online.registry import register_agent_loops

    register_agent_loops(module)


def _change_model_loading(module: ModuleType) -> None:
    from verl_dft.platform.auto_class import choose_by_name
    from verl_dft.platform.critic import respect_attention

    respect_attention(module)
    choose_by_name(module)


def _load_trl_only_where_used(module: ModuleType) -> None:
    """verl imports TRL for every model, to change TRL's value-head class; a model of that class has imported it."""
    module.is_trl_available = lambda: "trl" in sys.modules  # type: ignore[attr-defined]


try:
    _load()
except Exception as error:
    STATUS["error"] = f"{type(error).__name__}: {error}"
    print(f"verl_dft: plugin failed to load: {STATUS['error']} (run: verl-dft doctor)", file=sys.stderr)
    raise
