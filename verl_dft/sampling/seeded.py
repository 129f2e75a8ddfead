"""``choose_tokens`` inside vLLM, through its interface for custom logits processors.

A request asks for it with ``extra_args={"verl_dft": (seed, temperature, top_p, top_k)}`` and temperature 0: the
processor leaves only the drawn token, which vLLM's greedy sampling then takes. Log-probs that vLLM reports are computed
before processors run, so they stay those of the model. Imported by the engine; importing it imports vLLM.
"""

from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from verl_dft.sampling.choose import choose_tokens, uniforms

EXTRA_ARG = "verl_dft"


class SeededChoice(LogitsProcessor):
    """Replaces the logits of each request that asks for it by its drawn token."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        # batch row -> ((seed, temperature, top_p, top_k), the running list of the request's output ids)
        self._rows: dict[int, tuple[tuple[int, float, float, int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, self._state)

    @staticmethod
    def _state(params: SamplingParams, _: Any, output_ids: list[int]) -> tuple[Any, list[int]] | None:
        wanted = (params.extra_args or {}).get(EXTRA_ARG)
        return (tuple(wanted), output_ids) if wanted is not None else None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        groups: dict[tuple[float, float, int], list[int]] = {}
        for row, ((_, *options), _) in self._rows.items():
            groups.setdefault(tuple(options), []).append(row)
        for (temperature, top_p, top_k), rows in groups.items():
            seeds = [self._rows[row][0][0] for row in rows]
            u = torch.from_numpy(uniforms(seeds, [len(self._rows[row][1]) for row in rows])).to(logits.device)
            index = torch.tensor(rows, device=logits.device)
            chosen = choose_tokens(logits[index], u, temperature, top_p, top_k)
            logits[index] = float("-inf")
            logits[index, chosen] = 0.0
        return logits
