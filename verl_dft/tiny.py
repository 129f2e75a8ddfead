"""The tiny world's model: a 0.46M-parameter Qwen2 with random weights, ready for verl to train.

``verl-dft tiny init output_dir=FOLDER`` (or ``python -m verl_dft.tiny init FOLDER``) writes it with its tokenizer; the
base of the demo was trained from it by ``recipes/tiny/base.yaml``.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from verl_dft.errors import InputError
from verl_dft.files import atomic_dir

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
_RESIDUAL = ("o_proj", "down_proj")


def init_model(folder: str | Path, *, seed: int = 0, tied: bool = True, **shape: int) -> Path:
    """Write a randomly initialised model and the tiny world's tokenizer to ``folder``.

    Args:
        folder: made anew, atomically.
        seed: of the weights.
        tied: input and output embeddings share their weights.
        shape: overrides of :data:`SHAPE`.
    """
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    from verl_dft.data.arithmetic import train_tokenizer

    tokenizer = train_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = Qwen2Config(
        **{**SHAPE, **shape}, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tied, **ids,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).float()
        for name, parameter in model.named_parameters():
            _init(name, parameter, config.num_hidden_layers)
    model.generation_config = GenerationConfig(pad_token_id=ids["pad_token_id"], eos_token_id=ids["eos_token_id"])
    with atomic_dir(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return Path(folder)


def _init(name: str, parameter: "torch.nn.Parameter", layers: int) -> None:  # noqa: F821
    """N(0, 1/fan_in), embeddings N(0, 0.02^2), what writes to the residual stream smaller by sqrt(2 layers)."""
    from torch.nn import init

    if parameter.dim() < 2:
        init.ones_(parameter) if "norm" in name else init.zeros_(parameter)
        return
    std = 0.02 if "embed" in name or "lm_head" in name else 1 / math.sqrt(parameter.shape[1])
    if any(part in name for part in _RESIDUAL):
        std /= math.sqrt(2 * layers)
    init.normal_(parameter, 0.0, std)


def main(argv: Sequence[str]) -> int:
    """``verl-dft tiny init output_dir=FOLDER [seed=N]``, or ``init FOLDER [N]``. Returns the exit code 0.

    Raises:
        InputError: anything else, with what belongs there.
    """
    options = _options(argv)
    folder = init_model(options["output_dir"], seed=int(options["seed"]))
    print(f"wrote an untrained model to {folder}")
    return 0


def _options(argv: Sequence[str]) -> dict[str, str]:
    names, found = ["output_dir", "seed"], {"seed": "0"}
    for position, argument in enumerate(argv[1:]):
        key, separator, value = argument.partition("=")
        plain = not separator and position < len(names)
        if not plain and key not in names:
            raise InputError(f"{argument!r} is not {' or '.join(f'{name}=…' for name in names)}")
        found[names[position] if plain else key] = argument if plain else value
    if not argv or argv[0] != "init" or not found.get("output_dir"):
        raise InputError("write verl-dft tiny init output_dir=FOLDER [seed=N]")
    if not found["seed"].isdigit():
        raise InputError(f"seed={found['seed']} must be a whole number of at least 0")
    return found


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
