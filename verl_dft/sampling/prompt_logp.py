"""Log-probs of given texts by vLLM: what it says about a prompt's own tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from verl_dft.errors import InputError
from verl_dft.sampling.engine import VLLMEngine


def prompt_logp(engine: VLLMEngine, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Log-prob of every token of each text but the first, given those before it.

    Args:
        texts: token ids; each needs one place less than the engine's ``max_model_len``, since vLLM always generates.

    Returns:
        [T - 1] float32 of each text, nats, under the model at temperature 1; value t is that of token t + 1. vLLM takes
        the log-softmax in float32 of logits in the model's dtype. No prefix is reused, so a call's result is a function
        of it alone.

    Raises:
        InputError: a text that is too long.
    """
    llm, params = engine._llm, _params(engine._vllm)
    assert llm is not None, "the engine is closed"
    for index, ids in enumerate(texts):
        if len(ids) >= engine.max_model_len:
            raise InputError(
                f"text {index} has {len(ids)} tokens, and vLLM scores at most {engine.max_model_len - 1} in a context "
                f"of {engine.max_model_len}; use backend=verl, or a lower data.max_length"
            )
    llm.reset_prefix_cache()
    outputs = llm.generate([{"prompt_token_ids": list(ids)} for ids in texts], params, use_tqdm=False)
    assert len(outputs) == len(texts)
    return [_values(output.prompt_logprobs, ids) for output, ids in zip(outputs, texts, strict=True)]


def _params(vllm: Any) -> Any:
    # prompt_logprobs=0: the prompt's own tokens and no others
    return vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False, flat_logprobs=True)


def _values(found: Any, ids: Sequence[int]) -> np.ndarray:
    """From vLLM's flat record of a prompt: nothing for the first token, then one entry a token."""
    assert len(found) == len(ids) and list(found.token_ids) == list(ids[1:]), "vLLM scored other tokens"
    return np.asarray(found.logprobs, dtype=np.float32)
