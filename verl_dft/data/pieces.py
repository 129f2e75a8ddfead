"""A rendered conversation in pieces: what its template writes, and what somebody wrote, which must stay text."""

import re
from collections.abc import Mapping, Sequence


def interleave(outer: Sequence[str], inner: Sequence[str]) -> list[str]:
    """``outer[0], inner[0], outer[1], …``; ``outer`` is longer by one."""
    return [piece for pair in zip(outer, [*inner, ""], strict=True) for piece in pair][:-1]


def cut(pieces: Sequence[tuple[str, bool]], length: int) -> list[tuple[str, bool]]:
    """The pieces up to ``length`` characters together."""
    kept = []
    for text, literal in pieces:
        kept.append((text[:length], literal))
        length -= len(kept[-1][0])
    return kept


def shown(text: str, names: Mapping[str, str]) -> list[tuple[str, bool]]:
    """``text`` as (piece, whether somebody wrote it); each mark of ``names`` is replaced by what it stands for."""
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
    return [(names.get(part, part), bool(i % 2)) for i, part in enumerate(parts)]
