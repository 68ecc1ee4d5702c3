"""Who is answered now and who waits: the decisions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.server.limiter import FairQueue, Ticket

REQUESTS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.booleans(), st.integers(0, 9)), max_size=60
)


@given(st.integers(1, 4), st.integers(0, 5), REQUESTS)
def test_slots_are_never_more_than_there_are_and_nobody_waits_for_nothing(
    slots: int, most: int, requests: list[tuple[str, int, bool, int]]
) -> None:
    queue, held = FairQueue(slots, most), list[Ticket]()
    for client, wanted, leaves, which in requests:
        if leaves and held:
            queue.leave(held.pop(which % len(held)))
        elif (ticket := queue.join(client, wanted)) is not None:
            held.append(ticket)
        assert queue.used <= slots
        assert len(queue.waiting) <= most
        assert sorted(map(id, held)) == sorted(map(id, [*queue.running, *queue.waiting]))
        assert all(ticket.called.is_set() == (ticket in queue.running) for ticket in held)
        if queue.waiting:  # whose turn it is needs more slots than are free
            assert queue.used + max(ticket.slots for ticket in queue.waiting) > slots
    for _ in range(len(held)):
        queue.leave((queue.running or held)[0])
    assert not queue.running
    assert not queue.waiting


def test_a_client_with_many_requests_lets_others_go_first() -> None:
    queue = FairQueue(2, 10)
    greedy = [queue.join("greedy", 1) for _ in range(6)]
    other = queue.join("other", 1)
    assert other is not None
    assert greedy[0] is not None
    queue.leave(greedy[0])
    assert other.called.is_set()
    assert [ticket.client for ticket in queue.running] == ["greedy", "other"]
