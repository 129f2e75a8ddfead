"""vLLM entry point (``vllm.general_plugins``): weights that stay live on a CPU. It must not import verl.

On a CPU, vLLM repacks every linear layer at load and empties ``layer.weight`` (vllm 0.28,
``model_executor/layers/linear.py``), after which new weights cannot be loaded into a running engine: verl's weight sync
dies. This keeps the weights, at the price of the repacked kernel's speed; an engine that never syncs weights sets
``VERL_DFT_VLLM_PREPACK=1`` and keeps the kernel.
"""

import os


def register() -> bool:
    """Keep weights live; does nothing where vLLM has an accelerator. Returns whether it changed anything."""
    if os.environ.get("VERL_DFT_VLLM_PREPACK") == "1":
        return False
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False

    import torch
    import vllm.model_executor.layers.utils as layers

    def keep_weight(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = keep_weight
    return True
