r"""Named prompts: how a problem becomes the turns before the response.

The papers train on ``raw`` (the problem alone, through the tokenizer's chat template) and evaluate with
``qwen-boxed``. A prompt is a list of turns; the tokenizer's chat template does the rest.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from verl_dft.errors import InputError

_BOXED = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
_RETELL = (
    "Below are a worked solution and the problem that it solves.\n\n"
    "Worked solution:\n{reference}\n\n"
    "Problem:\n{problem}\n\n"
    "Work through the solution until you see why each step holds. Then answer the problem yourself, step by step and "
    "in your own words, as if nobody had shown you a solution: do not copy its sentences and do not mention it. "
    "End with the final answer within \\boxed{{}}."
)


@dataclass(frozen=True)
class Prompt:
    """Text of the turns; ``{problem}`` and ``{reference}`` are filled in, other braces are written twice."""

    user: str
    system: str | None = None

    @property
    def needs_reference(self) -> bool:
        """Whether the prompt shows a worked solution."""
        return "{reference}" in self.user

    def messages(self, problem: str, reference: str | None = None) -> list[dict[str, str]]:
        """The turns that ask ``problem``: ``[{"role": "system"?}, {"role": "user"}]``."""
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*turns, {"role": "user", "content": self.user.format(problem=problem, reference=reference)}]


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
    # data rewriting's guided stage. The wording is ours: the paper's is a picture (its Fig. 2)
    "digest-and-retell": Prompt(_RETELL),
}


def get_prompt(name: str) -> Prompt:
    """The prompt called ``name``. Raises InputError naming the valid ones."""
    if not isinstance(name, str) or name not in PROMPTS:
        raise InputError(f"no prompt {name!r}; use one of {', '.join(PROMPTS)}")
    return PROMPTS[name]


def find_prompt(given: str) -> tuple[str, Prompt]:
    """A prompt by its name, by its text (of the user's turn) or by a text file, with the name it goes by.

    In a text of your own ``{problem}`` (needed) and ``{reference}`` are filled in; other braces stand for themselves.
    It is called ``own-`` and the start of its hash.

    Raises:
        InputError: neither a name nor a file nor a text with a place for the problem.
    """
    if not isinstance(given, str):
        raise InputError(f"prompt={given!r} is no text; use one of {', '.join(PROMPTS)}, or a text with {{problem}}")
    if given in PROMPTS:
        return given, PROMPTS[given]
    text, where = given, "the prompt"
    if "{problem}" not in given:
        path = Path(given).expanduser()
        if not _is_file(path):
            raise InputError(
                f"no prompt {given!r}; use one of {', '.join(PROMPTS)}, a text with {{problem}} in it, or a text file"
            )
        try:
            text, where = path.read_text(encoding="utf-8").rstrip("\n"), f"{path}"
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read as a prompt: {error}") from None
        if "{problem}" not in text:
            raise InputError(f"{where} has no {{problem}} in it; write it where the problem's text belongs")
    escaped = text.replace("{", "{{").replace("}", "}}")
    for name in ("problem", "reference"):
        escaped = escaped.replace(f"{{{{{name}}}}}", f"{{{name}}}")
    return f"own-{hashlib.sha256(text.encode()).hexdigest()[:8]}", Prompt(escaped)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a text too long for a file's name
        return False


def render_messages(prompt_name: str, problem: str, reference: str | None = None) -> list[dict[str, str]]:
    """:meth:`Prompt.messages` of the prompt called ``prompt_name``.

    Raises:
        InputError: unknown prompt, or one that shows a reference when none is given (and the reverse).
    """
    prompt = get_prompt(prompt_name)
    if prompt.needs_reference != (reference is not None):
        have = "needs a reference solution" if prompt.needs_reference else "has no place for a reference solution"
        raise InputError(f"prompt {prompt_name!r} {have}")
    return prompt.messages(problem, reference)
