"""Names of our agent loops for verl, which imports a loop when it is first used."""

from types import ModuleType

LOOPS = {
    "verl_dft": "verl_dft.training.online.loops.SeededLoop",
    "verl_dft_group": "verl_dft.training.online.loops.GroupLoop",
    "verl_dft_rewrite": "verl_dft.training.online.rewrite_loop.RewriteLoop",
}
"""``rollout.agent.default_agent_loop`` -> class."""


def register_agent_loops(agent_loop: ModuleType) -> None:
    """What ``register`` of ``verl.experimental.agent_loop.agent_loop`` does, without importing the classes."""
    agent_loop._agent_loop_registry.update({name: {"_target_": target} for name, target in LOOPS.items()})
