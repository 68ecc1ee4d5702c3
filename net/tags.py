"""Tags: what a stage knows of the tokens of its sessions, in the place of the tokens.

Only the first stage reads token ids, and the last one where its draws depend on them. Every stage must know,
though, which sessions begin alike, so that they go on sharing pages of keys and values when layers move
(net/carry.py), and whether rows that fill lost keys and values are those of the session. The coordinator
computes a tag of 64 bits for each whole chunk of a session's positions, from all tokens up to its end and a
secret that it draws at its start. Two sessions have the same tag for a chunk if they have the same tokens up
to its end, and else with a probability of 2**-64. Without the secret nothing else follows from a tag.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from hashlib import blake2b

from ..engine.layout import CHUNK as _CHUNK

CHUNK = _CHUNK
"""The positions of a chunk."""
_SECRET = secrets.token_bytes(32)


def spanned(first: int, last: int) -> slice:
    """Where the tags of the chunks that end in positions [first, last) are among those of a session."""
    return slice(first // CHUNK, last // CHUNK)


def counted(first: int, last: int) -> int:
    """The number of chunks that end in positions [first, last)."""
    return last // CHUNK - first // CHUNK


def extend(tags: list[int], tokens: Sequence[int], last: int) -> None:
    """Adds the tags of the chunks of `tokens` that end before position `last`, as far as they are missing."""
    while (end := (len(tags) + 1) * CHUNK) <= last:
        before = tags[-1] if tags else 0
        text = before.to_bytes(8, "little") + array("i", tokens[end - CHUNK : end]).tobytes()
        tags.append(int.from_bytes(blake2b(text, digest_size=8, key=_SECRET).digest(), "little"))
