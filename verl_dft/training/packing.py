"""Packed or padded input on a CPU: whichever is estimated to take fewer operations.

With sdpa, packed rows are kept apart by a dense block mask, which costs attention over (all tokens)^2; padded rows cost
their padding in every layer. Both give the same losses. On a GPU variable-length flash attention makes packing win.
"""

from typing import Any

import numpy as np


def faster_packed(lengths: np.ndarray, micro_batch: int, model_config: Any) -> bool:
    """Whether packing is estimated to be faster for micro-batches of rows of like length.

    Args:
        lengths: [num_rows] tokens per row.
        micro_batch: rows per forward pass.
        model_config: a Hugging Face config (hidden size, layers, intermediate size, vocabulary).
    """
    rows = np.sort(np.asarray(lengths, dtype=np.float64))[::-1]
    count = max(1, len(rows) // micro_batch)
    micros = [rows[i * micro_batch : (i + 1) * micro_batch] for i in range(count)]
    packed = sum(_operations(m.sum(), m.sum() ** 2, model_config) for m in micros)
    padded = sum(_operations(len(m) * m.max(), len(m) * m.max() ** 2, model_config) for m in micros)
    return bool(packed < padded)


def _operations(tokens: float, attended: float, config: Any) -> float:
    """Multiply-adds, up to a common factor: linear layers per token, attention per attended pair."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    intermediate = getattr(config, "intermediate_size", 4 * hidden)
    linear = layers * (4 * hidden**2 + 3 * hidden * intermediate) + hidden * config.vocab_size
    return 2 * linear * tokens + 4 * hidden * layers * attended
