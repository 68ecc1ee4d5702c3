"""The rebalancer: proposes to move layers while answers are computed. It does no I/O and reads no clock."""

from __future__ import annotations

USUAL_TOKENS = 64
"""An answer that has just begun is expected to have so many tokens."""


def expected_tokens(made: int, most: int) -> int:
    """The tokens that an answer should need still, after `made` of at most `most`. Its length is unknown, and
    one that has lasted long will last longer: it is expected to double."""
    return max(0, min(most - made, max(made, USUAL_TOKENS)))
