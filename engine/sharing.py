"""Which sequence another one begins with: the one that holds most of its first tokens.

Sequences whose tokens begin alike share keys and values as far as one is a fork of the other. The batcher
decides so in one process, and the coordinator over nodes. Pure: the sequences say what they hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from .batch import common_prefix

LEAST = 16
"""Fewer positions are not shared: their rows take about as long as another call, or as waiting for it."""


class Holder(Protocol):
    """What is used of a sequence."""

    @property
    def tokens(self) -> Sequence[int]:
        """A list of the tokens that it holds, has sent, or is about to send."""

    @property
    def held(self) -> int:
        """The positions that the stage, or the whole chain, certainly holds."""

    @property
    def will_hold(self) -> int:
        """The positions that it will hold if its answer goes on; 0 if it does not go on."""


H = TypeVar("H", bound=Holder)


@dataclass(frozen=True, slots=True)
class Source(Generic[H]):
    """A sequence from which another one is opened, and the positions that they share. With `later` they are
    not there yet."""

    session: H
    positions: int
    later: bool = False


def source_for(tokens: Sequence[int], sessions: Iterable[H]) -> Source[H] | None:
    """The sequence from which one with these tokens is opened: the one with which it shares most positions,
    now or soon; of several, one that holds them now, and the one that was opened last. At least one row of
    its own remains. None: nothing worth while is shared.

    `sessions` are in the order of opening, and are all looked at: most of them are refused by the first token
    that would be more than the best so far, which is quicker than a tree is kept."""
    now: Source[H] | None = None
    soon: Source[H] | None = None
    at_now, at_soon, most = 0, LEAST - 1, len(tokens) - 1
    for session in reversed(list(sessions)):
        here = min(session.held, most)
        there = min(max(session.held, session.will_hold), most)
        known = session.tokens
        if not (_exceeds(tokens, known, here, at_now) or _exceeds(tokens, known, there, at_soon)):
            continue
        shared = common_prefix(tokens, known)
        if min(shared, here) > at_now:
            at_now = min(shared, here)
            now = Source(session, at_now)
        if min(shared, there) > at_soon:
            at_soon = min(shared, there)
            soon = Source(session, at_soon, later=True)
    if soon is not None and at_soon >= at_now + LEAST:
        return soon
    return now if at_now >= LEAST else None


def _exceeds(tokens: Sequence[int], known: Sequence[int], most: int, best: int) -> bool:
    """Whether more than `best` positions may be shared, of at most `most`."""
    return most > best and known[best] == tokens[best]
