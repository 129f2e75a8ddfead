"""What an objective requires, checked against the models and checkpoints named, before anything large is loaded."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_dft.errors import InputError
from verl_dft.training.configure import objective_of
from verl_dft.training.exempt import exempt_ids


def check_requirements(config: DictConfig, tokenizer: Any, checkpoint: Path | None) -> None:
    """Raise :class:`InputError` where the trainer could not provide a field.

    Args:
        config: the run's.
        tokenizer: of the trained model.
        checkpoint: what the run goes on from, if anything.
    """
    objective = objective_of(config)
    if "exempt" in objective.requires:
        exempt_ids(objective.exempt_tokens, tokenizer)
    if config.reference.path:
        _check_reference(config, "ref_kl" in objective.requires, len(tokenizer))
    if checkpoint and "ema_logp" in objective.requires and not any(checkpoint.glob("average_world_size_*")):
        raise InputError(f"{checkpoint} was saved by a run without a moving average, which this objective needs")


def _check_reference(config: DictConfig, compares_logits: bool, num_tokens: int) -> None:
    from transformers import AutoConfig

    path, trust = config.reference.path, config.model.trust_remote_code
    try:
        theirs = AutoConfig.from_pretrained(path, trust_remote_code=trust).vocab_size
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"reference.path={path}: no model could be loaded ({reason})") from None
    ours = AutoConfig.from_pretrained(config.model.path, trust_remote_code=trust).vocab_size
    # models of one family pad the same tokenizer's vocabulary differently: log-probs of tokens can still be compared
    if (ours != theirs) if compares_logits else (theirs < num_tokens):
        raise InputError(
            f"reference.path={path} has a vocabulary of {theirs} tokens, the trained model {ours} ({num_tokens} in its "
            "tokenizer); both must have the same tokenizer"
        )
