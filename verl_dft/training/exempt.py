"""Which token ids an objective's ``exempt_tokens`` means, in the run's tokenizer."""

from collections.abc import Sequence
from typing import Any

from verl_dft.data.template import ConversationEncoder
from verl_dft.errors import InputError

END_OF_TURN, ADDED = "end_of_turn", "added"


def exempt_ids(names: Sequence[str | int], tokenizer: Any) -> tuple[int, ...]:
    """Token ids of ``names``.

    Args:
        names: ``end_of_turn`` (what the chat template, or generation, ends an assistant's turn with), ``added`` (every
            token added to the tokenizer's vocabulary, special ones included), a token's text, or an id.
        tokenizer: the run's.

    Raises:
        InputError: a token or an id that the tokenizer does not have.
    """
    ids: set[int] = set()
    for name in names:
        if name == END_OF_TURN:
            encoder = ConversationEncoder(tokenizer)
            ids |= {encoder.end_id, *encoder.end_ids}
        elif name == ADDED:
            ids |= set(tokenizer.added_tokens_decoder)
        elif isinstance(name, int):
            if not 0 <= name < len(tokenizer):
                raise InputError(f"objective.exempt_tokens has id {name}; the tokenizer has 0 to {len(tokenizer) - 1}")
            ids.add(name)
        else:
            found = tokenizer.get_vocab().get(name)
            if found is None:
                raise InputError(
                    f"objective.exempt_tokens has {name!r}, which is not one token of the tokenizer; give a token, an "
                    f"id, {END_OF_TURN} or {ADDED}"
                )
            ids.add(found)
    return tuple(sorted(ids))
