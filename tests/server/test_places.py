"""Who is answered now and who waits: the decisions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.server.places import Line, Ticket

REQUESTS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.booleans(), st.integers(0, 9)), max_size=60
)


@given(st.integers(1, 4), st.integers(0, 5), REQUESTS)
def test_places_are_never_more_than_there_are_and_nobody_waits_for_nothing(
    slots: int, most: int, requests: list[tuple[str, int, bool, int]]
) -> None:
    line, held = Line(slots, most), list[Ticket]()
    for client, places, leaves, which in requests:
        if leaves and held:
            line.leave(held.pop(which % len(held)))
        elif (ticket := line.join(client, places)) is not None:
            held.append(ticket)
        assert line.used <= slots
        assert len(line.waiting) <= most
        assert sorted(map(id, held)) == sorted(map(id, [*line.running, *line.waiting]))
        assert all(ticket.called.is_set() == (ticket in line.running) for ticket in held)
        if line.waiting:  # whose turn it is needs more places than are free
            assert line.used + max(ticket.places for ticket in line.waiting) > slots
    for _ in range(len(held)):
        line.leave((line.running or held)[0])
    assert not line.running
    assert not line.waiting


def test_a_client_with_many_requests_lets_others_go_first() -> None:
    line = Line(2, 10)
    greedy = [line.join("greedy", 1) for _ in range(6)]
    other = line.join("other", 1)
    assert other is not None
    assert greedy[0] is not None
    line.leave(greedy[0])
    assert other.called.is_set()
    assert [ticket.client for ticket in line.running] == ["greedy", "other"]
