"""The queue of a stage: order, batches, fairness, and what a Close or an old epoch removes."""

from dataclasses import replace

import numpy as np

from shoal.engine.batch import Sampling, Want
from shoal.net.inbox import MAX_BYTES, MAX_STEPS, Batch, Inbox, held_bytes
from shoal.net.messages import STEP_LIMIT, Close, Epoch, Open, Step

NOW, OLD = Epoch(1, 2), Epoch(1, 1)


def opened(session: int, epoch: Epoch = NOW) -> Open:
    return Open(session, epoch, Sampling(), 100)


def rows(session: int, first: int, count: int = 1, epoch: Epoch = NOW) -> Step:
    return Step(session, epoch, first, (1,) * count, Want.TOKEN)


def large(session: int, first: int) -> Step:
    """A Step as large as the wire allows: 1,024 rows of 1,023 columns."""
    return replace(rows(session, first, 1024), hidden=np.zeros((1024, 1023), np.float32))


def inbox(*items: Open | Close | Step, max_rows: int = 16, chunk_rows: int = 8) -> Inbox:
    box = Inbox(NOW, max_rows, chunk_rows)
    for item in items:
        box.put(item, 0.0)
    return box


def take(box: Inbox) -> Batch:
    batch = box.take(0.0)
    assert isinstance(batch, Batch)
    return batch


def taken(box: Inbox) -> list[tuple[int, int]]:
    return [(step.session, step.first) for step in take(box).steps]


def test_a_batch_takes_one_step_of_each_session_in_order() -> None:
    box = inbox(opened(1), rows(1, 0), rows(1, 1), opened(2), rows(2, 0))
    assert box
    assert box.take(0.0) == Batch((opened(1), opened(2)), (rows(1, 0), rows(2, 0)))
    assert taken(box) == [(1, 1)]
    assert not box
    assert box.take(0.0) is None


def test_a_long_prompt_delays_others_by_one_call() -> None:
    box = inbox(*(rows(1, at, 8) for at in range(0, 80, 8)), rows(2, 5), rows(3, 7))
    assert taken(box) == [(1, 0), (2, 5), (3, 7)]
    assert taken(box) == [(1, 8)]


def test_prompts_share_the_rows_of_a_call_in_turn() -> None:
    box = inbox(*(rows(s, at, 6) for s in (1, 2, 3) for at in (0, 6)))
    assert [taken(box) for _ in range(6)] == [[(1, 0)], [(2, 0)], [(3, 0)], [(1, 6)], [(2, 6)], [(3, 6)]]


def test_small_prompts_go_together() -> None:
    assert taken(inbox(rows(1, 0, 4), rows(2, 0, 4), rows(3, 0, 2))) == [(1, 0), (2, 0)]


def test_a_batch_stays_within_its_rows_and_steps() -> None:
    box = inbox(*(rows(s, 0) for s in range(40)))
    assert len(take(box).steps) == 16
    box = inbox(*(rows(s, 0) for s in range(MAX_STEPS + 3)), max_rows=1000)
    assert (len(take(box).steps), len(take(box).steps)) == (MAX_STEPS, 3)


def test_a_step_too_long_for_any_batch_goes_alone() -> None:
    box = inbox(rows(1, 0, 50), rows(2, 0))
    assert taken(box) == [(1, 0)]
    assert taken(box) == [(2, 0)]


def test_another_epoch_is_dropped() -> None:
    assert not inbox(opened(1, OLD), rows(1, 0, epoch=OLD), Close(1, OLD), rows(2, 0, epoch=Epoch(2, 2)))


def test_close_drops_the_rows_that_wait() -> None:
    box = inbox(rows(1, 0), rows(1, 1), rows(2, 0), Close(1, NOW))
    assert box.take(0.0) == Batch((Close(1, NOW),), (rows(2, 0),))
    assert not box


def test_open_and_close_that_both_wait_never_happened() -> None:
    assert not inbox(opened(1), rows(1, 0), Close(1, NOW))


def test_full_counts_the_bytes_that_wait() -> None:
    box = inbox(*(rows(1, at) for at in range(1000)))
    assert not box.full
    box.put(large(2, 0), 0.0)
    assert box.full
    box.put(Close(2, NOW), 0.0)
    assert not box.full
    box.put(large(3, 0), 0.0)
    assert taken(box) == [(1, 0)]
    assert box.full
    assert taken(box) == [(3, 0)]
    assert not box.full


def test_an_inbox_that_is_not_full_has_room_for_the_largest_step() -> None:
    assert STEP_LIMIT - 5000 < held_bytes(large(1, 0)) - 512 - 40 * 1024 + 4 * 1024 <= STEP_LIMIT
    box, most = inbox(), 0
    for at in range(0, 1 << 20, 64):
        if box.full:
            break
        step = replace(rows(1, at, 64), hidden=np.zeros((64, 576), np.float32))
        box.put(step, 0.0)
        most += held_bytes(step)
    assert MAX_BYTES - STEP_LIMIT < most <= MAX_BYTES


def test_a_flood_of_one_sessions_opens_fills_it_too() -> None:
    box = inbox()
    for _ in range(MAX_BYTES // held_bytes(opened(1))):
        box.put(opened(1), 0.0)
    assert box.full
    take(box)
    assert not box.full
