r"""Named prompts: how a problem becomes the turns before the response.

The papers train on ``raw`` (the problem alone, through the tokenizer's chat template) and evaluate with
``qwen-boxed``. A prompt is a list of turns; the tokenizer's chat template does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from verl_dft.errors import InputError

_BOXED = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


@dataclass(frozen=True)
class Prompt:
    """Text of the turns; ``{problem}`` and ``{reference}`` are filled in."""

    user: str
    system: str | None = None

    @property
    def needs_reference(self) -> bool:
        """Whether the prompt shows a worked solution."""
        return "{reference}" in self.user


PROMPTS: dict[str, Prompt] = {
    # the training prompt of DFT and of data rewriting
    "raw": Prompt("{problem}"),
    # the instruction without a system turn (the template may add its own)
    "boxed": Prompt(_BOXED),
    # the evaluation prompt of DFT, data rewriting and GFT for Qwen models
    "qwen-boxed": Prompt(_BOXED, system="You are a helpful assistant."),
    # the same turns as "boxed": "User: …\n\nAssistant:" around them is DeepSeek-Math's own chat template
    "deepseek-math": Prompt(_BOXED),
    # the tiny world's guided prompt (verl_dft.data.arithmetic_world.guided_prompt)
    "arithmetic-guided": Prompt("Reference : {reference}\nRetell .\n{problem}"),
}


def get_prompt(name: str) -> Prompt:
    """The prompt called ``name``. Raises InputError naming the valid ones."""
    if name not in PROMPTS:
        raise InputError(f"no prompt {name!r}; use one of {', '.join(PROMPTS)}")
    return PROMPTS[name]


def render_messages(prompt_name: str, problem: str, reference: str | None = None) -> list[dict[str, str]]:
    """The turns that ask ``problem``: ``[{"role": "system"?}, {"role": "user"}]``.

    Raises:
        InputError: unknown prompt, or one that shows a reference when none is given (and the reverse).
    """
    prompt = get_prompt(prompt_name)
    if prompt.needs_reference != (reference is not None):
        have = "needs a reference solution" if prompt.needs_reference else "has no place for a reference solution"
        raise InputError(f"prompt {prompt_name!r} {have}")
    turns = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
    return [*turns, {"role": "user", "content": prompt.user.format(problem=problem, reference=reference)}]
