"""What sequences that decode and a prompt beside them take together, as net/inbox.py divides the stages.

While rows of the prompt wait, all sequences are one group, and a gap from token to token takes about GAP
times as long as without the prompt. In it each stage runs as many calls as there are stages, equally long, of
which one has the rows of the sequences; the rest of their time is the prompt's.
"""

from __future__ import annotations

from dataclasses import dataclass

from .groups import Way, best_groups, round_seconds, slice_rows

GAP = 1.95
"""Stages aim at 1.8, but one that ends a call late makes the next ones later."""


@dataclass(frozen=True, slots=True)
class Pressed:
    """Seconds from token to token of a sequence, and until the first token of the prompt."""

    gap: float
    prompt: float


def pressed(way: Way, count: int, tokens: int, depth: int = 0) -> Pressed:
    """What `count` sequences that decode at that depth and a prompt of so many tokens take together."""
    gap = GAP * round_seconds(way, count, best_groups(way, count, depth), depth)
    others = len(way.stages) - 1
    call = gap / (1 + others)
    at, seconds = 0, others * call + sum(way.latency)  # the last rows pass the stages after the first
    while at < tokens:
        rows = slice_rows(way, count, depth, at, call) + others * slice_rows(way, 0, depth, at, call)
        seconds += gap * min(1.0, (tokens - at) / rows)
        at += rows
    return Pressed(gap, seconds)
