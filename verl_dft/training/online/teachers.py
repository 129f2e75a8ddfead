"""The teachers of a distillation, looked at before Ray is started."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_dft.errors import InputError


def check_teachers(config: DictConfig, tokenizer: Any) -> None:
    """A teacher scores the policy's token ids, so it must have the policy's vocabulary, and may have more.

    Raises:
        InputError: a teacher that is not named, cannot be read or has another vocabulary.
    """
    if not config.distillation.enabled:
        return
    from transformers import AutoTokenizer

    teachers = dict(config.distillation.teacher_models.items_ex(resolve=False))
    if len(teachers) > 1:  # as verl has it
        teachers.pop("teacher_model", None)
    for name in teachers:
        key = f"distillation.teacher_models.{name}.model_path"
        path = OmegaConf.select(config, key, throw_on_missing=False)
        if path is None:
            raise InputError(f"{key} is not set; give the teacher's folder or name")
        try:
            trust = config.actor_rollout_ref.model.trust_remote_code
            own = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
        except (OSError, ValueError) as error:
            raise InputError(f"{key}={path}: no tokenizer could be loaded ({str(error).splitlines()[0]})") from None
        given, wanted = own.get_vocab(), tokenizer.get_vocab()
        if differing := sum(given.get(token) != number for token, number in wanted.items()):
            raise InputError(
                f"{key}={path} has another vocabulary than the policy: {differing} of its {len(wanted)} tokens have "
                "another id there or none; take a teacher of the same family"
            )
