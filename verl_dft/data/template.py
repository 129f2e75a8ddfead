r"""From a conversation to token ids: where the assistant's last turn begins and ends, under any chat template.

The conversation is rendered once, in full, by the tokenizer's own template. Two more renderings locate the response in
it: the prompt that generation would start from (``add_generation_prompt=True``), and the conversation with a marker in
place of the response. The response runs from the end of the generation prompt to the end-of-turn token, included;
whatever the template writes after that token (Qwen's newline) is left out. Only the last assistant turn is trained on.

The rules where a template makes that difficult:

- The text of the prompt is the generation prompt where it begins the full rendering. A template without a generation
  prompt, or one whose generation prompt adds text that the full rendering lacks, is cut where the marker stands.
- What the template itself writes after the generation prompt (an empty reasoning block) is part of the response:
  the model will have to generate it.
- A template that rewrites the response (dropping its reasoning, for example) is not allowed to: the response is then
  the row's text after the generation prompt, less an opening that the prompt already ends with. Counted as
  ``rewritten``.
- The end token is the first special token that the template writes after the response; where there is none, the
  tokenizer's eos token is appended straight after the text (``Tokens.end_appended``).
- Prompt ids are exactly what generation is fed. Where the tokenizer would merge across the boundary, prompt and
  response are encoded apart. Counted as ``split_at_boundary``.
- Text is text: a special token's name inside a message (``<|im_end|>`` in a quotation) is encoded as ordinary
  characters, so that data cannot end a turn. Counted as ``special_text``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from verl_dft.data.pieces import cut, interleave, shown
from verl_dft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
_MARKER = "verldftresponsemarker"
_HIDDEN = "\ue0f0"
"""Of the private use area: no template looks for it."""


@dataclass(frozen=True)
class Span:
    """A rendered conversation: ``text[:start]`` is the prompt, ``text[start:]`` the response, end token included."""

    text: str
    start: int
    append_end: bool
    """Whether the end token is missing from the text and follows it."""


class Tokens(NamedTuple):
    """Ids of a conversation."""

    prompt: list[int]
    response: list[int]
    """With the end token."""
    end_appended: bool
    """Whether the template wrote no end token, so that it was appended."""


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids that the tokenizer's model has, by the ``config.json`` beside it; without one the tokenizer's own.

    Models pad their vocabulary, and once in a long while a sampler draws such an id."""
    from transformers.utils import cached_file

    name = getattr(tokenizer, "name_or_path", "")
    try:
        path = cached_file(name, "config.json", local_files_only=True) if name else None
        config = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        config = {}
    sizes = [config.get("vocab_size"), (config.get("text_config") or {}).get("vocab_size")]
    return max([len(tokenizer), *(size for size in sizes if isinstance(size, int))])


class ConversationEncoder:
    """Encodes conversations with one tokenizer.

    ``counts`` gathers how often each rule of the module's docstring was needed.

    Raises:
        InputError: the tokenizer has no chat template, or no way to end a turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"tokenizer {self.name!r} has no chat template; use the instruct model's tokenizer, or save a "
                "chat_template.jinja beside the tokenizer"
            )
        self.vocabulary = vocabulary_size(tokenizer)
        self.counts: Counter[str] = Counter()
        self._special = special_tokens(tokenizer)
        names = sorted(self._special, key=len, reverse=True)
        self._special_name = re.compile("|".join(map(re.escape, names))) if names else None
        self._tails: dict[tuple[str, ...], _Tail] = {}
        self.end_id = self._tail(("user", "assistant")).end_id
        self.end_ids = frozenset({self.end_id} | ({tokenizer.eos_token_id} - {None}))
        """Ids that end a response: the template's end of turn, and the tokenizer's eos."""

    def encode(self, conversations: Sequence[Messages], where: Callable[[int], str]) -> list[Tokens]:
        """Prompt and response ids of each conversation, which must end with the assistant.

        Args:
            where: names conversation i in an error message (file and row).
        """
        spans = self._spans(conversations, where)
        whole = self._ids([span.text for span in spans])
        prompts = self._ids([span.text[: span.start] for span in spans])
        found = []
        for i, (span, ids, prompt) in enumerate(zip(spans, whole, prompts, strict=True)):
            if self._has_special_text(conversations[i]):
                prompt, response = self._encode_literally(conversations[i], span, lambda _, i=i: where(i))
            elif ids[: len(prompt)] == prompt and len(ids) > len(prompt):
                response = ids[len(prompt) :]
            else:
                prompt, response = self._encode_apart(span, ids, prompt)
            if span.append_end:
                response = [*response, self._tail(_roles(conversations[i])).end_id]
            if not prompt or not response:
                raise InputError(f"{where(i)}: the chat template of {self.name!r} leaves no prompt or no response")
            found.append(Tokens(prompt, response, span.append_end))
        return found

    def encode_prompts(self, conversations: Sequence[Messages], where: Callable[[int], str]) -> list[list[int]]:
        """Ids of the generation prompts (for responses whose ids are stored); a final assistant turn is left out."""
        asked = [c[:-1] if c[-1]["role"] == "assistant" else c for c in conversations]
        texts = self._render(asked, where, generation=True)
        prompts = self._ids(texts)
        for i, text in enumerate(texts):
            if self._has_special_text(asked[i]):
                pieces = self._pieces(asked[i], text, generation=True)
                if pieces is None:
                    hidden, names = self._hide(asked[i])
                    (text,) = self._render([hidden], lambda _, i=i: where(i), generation=True)
                    pieces = shown(text, names)
                prompts[i] = self._ids_of(pieces)
        return prompts

    # ---- text ----

    def _spans(self, conversations: Sequence[Messages], where: Callable[[int], str]) -> list[Span]:
        full = self._render(conversations, where)
        marked = self._render([[*c[:-1], {**c[-1], "content": _MARKER}] for c in conversations], where)
        prompts = self._render([c[:-1] for c in conversations], where, generation=True)
        zipped = zip(conversations, full, marked, prompts, strict=True)
        return [self._span(c, *texts, where=lambda i=i: where(i)) for i, (c, *texts) in enumerate(zipped)]

    def _span(self, messages: Messages, full: str, marked: str, prompt: str, where: Callable[[], str]) -> Span:
        tail = self._tail(_roles(messages))
        prefix, _, suffix = marked.rpartition(_MARKER)
        content = messages[-1]["content"].strip()
        if tail.uses_generation_prompt and full.startswith(prompt):
            start = len(prompt)
        elif full.startswith(prefix):
            start = len(prefix)
        else:
            start = -1
        end = len(full) - len(suffix)
        if start >= 0 and start < end and full.endswith(suffix) and content in full[start:end]:
            return Span(full[:end] + tail.text, start, append_end=not tail.text)
        # the template changed the response: keep the row's own text, after what generation starts from
        if not tail.uses_generation_prompt:
            raise InputError(f"{where()}: the chat template of {self.name!r} does not render the response as it is")
        self.counts["rewritten"] += 1
        overlap = next((k for k in range(min(len(prompt), len(content)), 0, -1) if prompt.endswith(content[:k])), 0)
        return Span(prompt + content[overlap:] + tail.text, len(prompt), append_end=not tail.text)

    def _tail(self, roles: tuple[str, ...]) -> _Tail:
        """What the template writes after the last assistant turn of a conversation with these roles."""
        if roles not in self._tails:
            probe = [{"role": role, "content": f"{role} text"} for role in roles[:-1]]
            name = f"a conversation of roles {', '.join(roles)}"
            marked = self._render([[*probe, {"role": roles[-1], "content": _MARKER}]], lambda _: name)[0]
            if _MARKER not in marked:
                raise InputError(f"the chat template of {self.name!r} does not render the assistant's turn in {name}")
            plain, generation = (self._render([probe], lambda _: name, generation=g)[0] for g in (False, True))
            suffix = marked.rpartition(_MARKER)[2]
            end = self._special_name.search(suffix) if self._special_name else None
            end_id = self._special[end[0]] if end else self.tokenizer.eos_token_id
            if end_id is None:
                raise InputError(
                    f"tokenizer {self.name!r} has no eos token and its chat template ends no turn; set one"
                )
            self._tails[roles] = _Tail(suffix[: end.end()] if end else "", end_id, plain != generation)
        return self._tails[roles]

    def _render(
        self, conversations: Sequence[Messages], where: Callable[[int], str], generation: bool = False
    ) -> list[str]:
        render = self.tokenizer.apply_chat_template
        try:
            return (
                render(list(conversations), tokenize=False, add_generation_prompt=generation) if conversations else []
            )
        except Exception:  # jinja raises what the template's author chose; find the row that did
            for i, messages in enumerate(conversations):
                try:
                    render(messages, tokenize=False, add_generation_prompt=generation)
                except Exception as error:
                    detail = " ".join(str(error).split())[:200]
                    raise InputError(f"{where(i)}: the chat template of {self.name!r} refuses it: {detail}") from None
            raise

    # ---- ids ----

    def _ids(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        if not texts:
            return []
        # templates write the begin-of-text token themselves
        return self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
            padding=False, truncation=False, verbose=False, **options,
        )["input_ids"]  # fmt: skip

    def _encode_apart(self, span: Span, whole: list[int], prompt: list[int]) -> tuple[list[int], list[int]]:
        """Prompt and response where a token of the joint encoding lies across the boundary."""
        self.counts["split_at_boundary"] += 1
        response = self._ids([span.text[span.start :]])[0]
        if self._decode(prompt + response) == self._decode(whole):
            return prompt, response
        # the tokenizer marks the start of every text (SentencePiece): keep the joint ids and give the token that
        # lies across to the response, whose first characters it holds
        shared = next((k for k, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), len(prompt))
        return whole[:shared], whole[shared:]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _has_special_text(self, messages: Messages) -> bool:
        return self._special_name is not None and any(self._special_name.search(m["content"]) for m in messages)

    def _encode_literally(
        self, messages: Messages, span: Span, where: Callable[[int], str]
    ) -> tuple[list[int], list[int]]:
        """Prompt and response of a row whose messages name special tokens, which must stay text."""
        pieces = self._pieces(messages, span.text, generation=False)
        if pieces is None:  # the template changes what it is given
            (hidden, names), counts = self._hide(messages), self.counts.copy()
            (span,) = self._spans([hidden], where)
            self.counts = counts  # of this conversation once
            parts = (span.text[: span.start], span.text[span.start :])
            return self._ids_of(shown(parts[0], names)), self._ids_of(shown(parts[1], names))
        prompt, response, at = [], [], 0
        for text, literal in pieces:
            cut = min(max(span.start - at, 0), len(text))
            prompt.append((text[:cut], literal))
            response.append((text[cut:], literal))
            at += len(text)
        return self._ids_of(prompt), self._ids_of(response)

    def _ids_of(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        ids: list[int] = []
        for text, literal in pieces:
            if text:
                ids += self._ids([text], split_special_tokens=True)[0] if literal else self._ids([text])[0]
        return ids

    def _pieces(self, messages: Messages, text: str, generation: bool) -> list[tuple[str, bool]] | None:
        """``text`` as (piece, whether it is a message's own words), or None where the template changes the words."""
        marks = [f"{_MARKER}{i}x" for i in range(len(messages))]
        marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
        rendered = self.tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=generation)
        between = re.split("|".join(map(re.escape, marks)), rendered)
        if len(between) == len(messages) + 1:
            for strip in (False, True):  # many templates trim the messages
                words = [m["content"].strip() if strip else m["content"] for m in messages]
                mixed = [(piece, bool(i % 2)) for i, piece in enumerate(interleave(between, words))]
                if "".join(piece for piece, _ in mixed).startswith(text):
                    self.counts["special_text"] += 1
                    return cut(mixed, len(text))
        self.counts["special_text"] += 1
        return None

    def _hide(self, messages: Messages) -> tuple[Messages, dict[str, str]]:
        """The messages with a mark in place of every special token's name, so that the template sees none, and what
        each mark stands for."""
        assert self._special_name is not None
        start = _HIDDEN
        while any(start in message["content"] for message in messages):
            start += _HIDDEN
        marks = {name: f"{start}{index}{_HIDDEN}" for index, name in enumerate(self._special)}
        texts = [self._special_name.sub(lambda name: marks[name[0]], m["content"]) for m in messages]
        hidden = [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]
        return hidden, {mark: name for name, mark in marks.items()}


@dataclass(frozen=True)
class _Tail:
    text: str
    """From the end of the response to the end token, included; empty where the template has none."""
    end_id: int
    uses_generation_prompt: bool


def _roles(messages: Messages) -> tuple[str, ...]:
    return tuple(message["role"] for message in messages)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Name and id of every special token (those flagged special, and the named ones such as eos)."""
    found = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return found | {str(token): index for token, index in named if index is not None}
