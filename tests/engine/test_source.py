"""The source of a new sequence is what a plain search through all sequences says."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine import sharing
from shoal.engine.sharing import Source, source_for

LEAST = 3


@pytest.fixture(autouse=True, scope="module")
def few() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "LEAST", LEAST)
        yield


@dataclass(eq=False)
class Held:
    tokens: list[int]
    held: int
    will_hold: int


def search(tokens: list[int], sessions: list[Held]) -> Source[Held] | None:
    def shared(session: Held, positions: int) -> int:
        most = min(positions, len(tokens) - 1)
        return next((i for i in range(most) if session.tokens[i] != tokens[i]), most)

    if not tokens or not sessions:
        return None
    # `max` takes the first of equals, and the last one opened is wanted
    now = max(reversed(sessions), key=lambda s: shared(s, s.held))
    soon = max(reversed(sessions), key=lambda s: shared(s, max(s.held, s.will_hold)))
    here, there = shared(now, now.held), shared(soon, max(soon.held, soon.will_hold))
    if there >= max(here, 0) + LEAST:
        return Source(soon, there, later=True)
    return Source(now, here) if here >= LEAST else None


texts = st.lists(st.integers(0, 1), max_size=12)


@st.composite
def holders(draw: st.DrawFn) -> Held:
    tokens = draw(texts)
    positions = st.integers(0, len(tokens))
    return Held(tokens, draw(positions), draw(positions))


@given(texts, st.lists(holders(), max_size=6))
def test_the_scan_finds_what_a_search_finds(tokens: list[int], sessions: list[Held]) -> None:
    assert source_for(tokens, sessions) == search(tokens, sessions)


@given(st.integers(100, 200), st.lists(st.integers(0, 200), max_size=8))
def test_long_prefixes(length: int, cuts: list[int]) -> None:
    story = list(range(length))
    sessions = [Held([*story[:cut], -1, *story], min(cut, length) + 1, 0) for cut in cuts]
    found, best = source_for(story, sessions), max([min(cut, length - 1) for cut in cuts], default=0)
    if best < LEAST:
        assert found is None
    else:
        assert found is not None and found.positions == best
