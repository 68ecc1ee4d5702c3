"""The queue of a stage: order, batches, fairness, and what a Close or an old epoch removes."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from shoal.engine.batch import Want
from shoal.net.inbox import (
    BUSY_STRETCH,
    LEAST_STRETCH,
    MAX_BYTES,
    MAX_STEPS,
    STRETCH,
    WHOLE_SECONDS,
    Batch,
    Inbox,
    enough_bytes,
    held_bytes,
    load,
    most_bytes,
)
from shoal.net.messages import STEP_LIMIT, Close, Epoch, Open, Step
from shoal.net.scheduler import Load
from shoal.planner.groups import Grouping

NOW, OLD = Epoch(1, 2), Epoch(1, 1)
ALONE = Grouping(1, 0.01)


def opened(session: int, epoch: Epoch = NOW) -> Open:
    return Open(session, epoch, 100)


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


def prompt(session: int, first: int, count: int, want: Want = Want.NOTHING) -> Step:
    return Step(session, NOW, first, tuple(range(first, first + count)), want)


def take(box: Inbox, now: float = 0.0) -> Batch:
    batch = box.take(now)
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


def test_rows_that_decode_go_before_rows_of_prompts() -> None:
    box = inbox(*(rows(1, at, 8) for at in range(0, 80, 8)), rows(2, 5), rows(3, 7))
    assert taken(box) == [(2, 5), (3, 7), (1, 0)]
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
    assert taken(box) == [(2, 0)]
    assert taken(box) == [(1, 0)]


def test_another_epoch_is_dropped() -> None:
    assert not inbox(opened(1, OLD), rows(1, 0, epoch=OLD), Close(1, OLD), rows(2, 0, epoch=Epoch(2, 2)))


def test_close_drops_the_rows_that_wait() -> None:
    box = inbox(rows(1, 0), rows(1, 1), rows(2, 0), Close(1, NOW))
    assert box.take(0.0) == Batch((Close(1, NOW),), (rows(2, 0),))
    assert not box


def test_of_a_session_that_is_closed_before_it_has_begun_only_the_close_goes_on() -> None:
    """The stages may know it from an earlier epoch, and its Open may have been sent again."""
    box = inbox(opened(1), rows(1, 0), Close(1, NOW))
    assert box.take(0.0) == Batch((Close(1, NOW),), ())
    assert not box and box.bytes == 0


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


@pytest.mark.parametrize(("count", "cols"), [(1, 64), (256, 576), (256, 2048), (1024, 1023)])
def test_what_waits_is_within_what_a_node_promises_for_it(count: int, cols: int) -> None:
    box, put = Inbox(NOW, count, count, enough=enough_bytes(count, cols)), 0
    hidden = np.zeros((count, cols), np.float32)
    while not box.full:
        box.put(replace(rows(put % 7, put, count), hidden=hidden), 0.0)
        put += 1
    assert put * hidden.nbytes < box.bytes <= most_bytes(count, cols) <= MAX_BYTES + 50_000
    assert put >= (4 if hidden.nbytes < 1 << 20 else 1)


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


# Calls of the previous stage.


def passed(session: int, first: int, count: int = 1, *, more: bool = False) -> Step:
    """Rows as a later stage receives them. Those of a prompt want nothing."""
    want = Want.TOKEN if count == 1 else Want.NOTHING
    return Step(session, NOW, first, (1,) * count, want, np.zeros((count, 4), np.float32), more)


def test_rows_computed_together_stay_together() -> None:
    box = inbox(passed(1, 5, more=True), passed(2, 7, more=True), passed(3, 9), passed(4, 1), passed(5, 2))
    assert taken(box) == [(1, 5), (2, 7), (3, 9)]
    assert taken(box) == [(4, 1)]
    assert taken(box) == [(5, 2)]
    assert box.take(0.0) is None


def test_rows_wait_for_the_others_of_their_call_but_not_for_ever() -> None:
    box = inbox(passed(1, 5, more=True))
    assert box.take(0.001) == WHOLE_SECONDS
    box.put(passed(2, 7, more=True), 0.9)  # over a slow link
    assert box.take(1.0) == 0.9 + WHOLE_SECONDS
    box.put(passed(3, 7), 1.5)
    assert taken(box) == [(1, 5), (2, 7), (3, 7)]
    box.put(passed(1, 6, more=True), 3.0)
    assert isinstance(box.take(3.0), float)
    late = box.take(3.0 + WHOLE_SECONDS)
    assert isinstance(late, Batch) and [step.session for step in late.steps] == [1]
    box.put(passed(2, 8), 5.0)
    assert taken(box) == [(2, 8)]


def test_a_row_behind_its_sessions_open_or_another_step_ends_its_call() -> None:
    box = inbox(passed(1, 5, more=True), opened(2), passed(2, 0))
    assert box.take(0.0) == Batch((opened(2),), (passed(1, 5, more=True), passed(2, 0)))
    box = inbox(passed(2, 0, 3), passed(1, 5, more=True), passed(2, 3))
    assert taken(box) == [(1, 5), (2, 0)]
    assert taken(box) == [(2, 3)]


def test_a_session_that_ends_is_missing_from_its_call_alone() -> None:
    box = inbox(passed(1, 5, more=True), passed(2, 7, more=True), passed(3, 9))
    box.put(Close(2, NOW), 0.0)
    assert box.take(0.0) == Batch((Close(2, NOW),), (passed(1, 5, more=True), passed(3, 9)))
    box = inbox(passed(1, 5), passed(2, 7))
    box.put(Close(1, NOW), 0.0)
    assert [step.session for step in take(box).steps] == [2]


def test_a_call_with_more_rows_than_a_batch_may_have_goes_in_parts() -> None:
    steps = [passed(session, 1, more=session < 40) for session in range(41)]
    box = Inbox(NOW, 256, 256)
    for step in steps:
        box.put(step, 0.0)
    assert [len(take(box).steps), len(take(box).steps)] == [MAX_STEPS, 41 - MAX_STEPS]
    assert box.take(0.0) is None


def test_calls_that_wait_are_joined_up_to_the_rows_of_a_group() -> None:
    box = Inbox(NOW, 256, 256, (Grouping(1),) * 3 + (Grouping(2),))
    for session in (1, 2, 3, 4):
        box.put(passed(session, 5), 0.0)
    assert taken(box) == [(1, 5), (2, 5)]
    assert taken(box) == [(3, 5), (4, 5)]
    for steps in ([passed(1, 6)], [passed(2, 6, more=True), passed(3, 6)], [passed(4, 6)]):
        for step in steps:
            box.put(step, 0.0)
    assert [taken(box) for _ in range(3)] == [[(1, 6)], [(2, 6), (3, 6)], [(4, 6)]]
    box.put(passed(1, 7), 0.0)
    box.put(passed(2, 7, more=True), 0.0)  # not whole
    assert taken(box) == [(1, 7)]


def test_rows_of_prompts_do_not_hold_up_rows_that_decode() -> None:
    box = inbox(passed(1, 5, more=True), passed(2, 5), passed(50, 0, 3))
    assert taken(box) == [(1, 5), (2, 5), (50, 0)]
    box = inbox(passed(50, 0, 3), passed(1, 5, more=True))
    assert box.take(0.001) == WHOLE_SECONDS


# Rows of prompts beside sequences that decode. A call takes 5 ms and 0.48 ms a row.


def costly(loads: Sequence[Load], pause: float) -> float:
    return 0.005 + 0.00048 * sum(count for count, _, _ in loads)


ROW = 0.00548
"""Seconds of a call of one row."""


def busy(away: float = 0.003, grouping: Grouping = ALONE, later: bool = False) -> tuple[Inbox, float]:
    """An inbox with a sequence that decodes, whose rows are away for so long after their calls, and the time
    at which the last one of them ended."""
    box, now = Inbox(NOW, 256, 64, (grouping,) * 8, costly), 1.0
    for at in range(9):
        now = lap(box, at, now + away, later)
    return box, now


def lap(box: Inbox, at: int, now: float, later: bool = False) -> float:
    """Lets the row of that position arrive and be computed; returns the end of the call."""
    box.put(passed(0, at) if later else rows(0, at), now)
    return ended(box, take(box, now), now)


def ended(box: Inbox, batch: Batch, now: float) -> float:
    end = now + costly([load(step) for step in batch.steps], 0.0)
    box.ran(batch, now, end)
    return end


def parts(batch: Batch | float | None) -> list[tuple[int, int, int]]:
    assert isinstance(batch, Batch)
    return [(step.session, step.first, step.rows) for step in batch.steps]


@pytest.mark.parametrize("later", [False, True])
def test_a_prompt_is_divided_so_that_tokens_stay_within_the_stretch(later: bool) -> None:
    box, now = busy(later=later)
    period = 0.003 + ROW
    for at in (9, 10, 11):
        if at == 9:
            box.put(passed(50, 0, 64) if later else prompt(50, 0, 64), now)
        before, now = now, lap(box, at, now + 0.003, later)
        # Another row, 0.48 ms, would be too many.
        assert STRETCH * period - 0.00048 < now - before <= STRETCH * period + 1e-9


@pytest.mark.parametrize("away", [0.003, 0.030])
def test_a_row_that_is_late_has_the_room_of_its_own_call(away: float) -> None:
    """The more of it, the less time is left for slices without such rows."""
    for late in (0.020, 0.050):
        box, now = busy(away)
        box.put(prompt(50, 0, 64), now)
        start = now + STRETCH * (away + ROW) + late
        box.put(rows(0, 9), start)
        least = (LEAST_STRETCH + BUSY_STRETCH * ROW / (away + ROW)) * ROW
        # Another row would be too many.
        assert least - 0.00048 < ended(box, take(box, start), start) - start <= least + 1e-9


def test_a_slice_that_is_not_worth_a_call_waits_for_a_row_that_is_due() -> None:
    box, now = busy()
    box.put(prompt(50, 0, 256), now)
    for at in range(9, 21):
        now = lap(box, at, now + 0.012)  # other stages compute prompts as well
    batch = take(box, now)
    assert [step.session for step in batch.steps] == [50]
    end = ended(box, batch, now)  # the time of the row that is away is over
    until = box.take(end)
    assert isinstance(until, float) and until > now + 0.012
    box.put(rows(0, 21), now + 0.012)
    assert [step.session for step in take(box, now + 0.012).steps] == [0, 50]


def two(later: bool = False) -> tuple[Inbox, float]:
    """An inbox with two sequences that decode in groups of their own, and when the last call ended."""
    box, now = Inbox(NOW, 256, 64, (Grouping(2),) * 8, costly), 1.0
    for at in range(9):
        for session, away in ((0, 0.008), (1, 0.0)):
            now += away
            box.put(passed(session, at) if later else rows(session, at), now)
            now = ended(box, take(box, now), now)
    return box, now


@pytest.mark.parametrize("later", [False, True])
def test_beside_prompts_all_sequences_share_a_call(later: bool) -> None:
    """Else each group would read all weights in every lap, while the prompt keeps the stages busy."""
    for some, expected in (([], [(0, 9, 1)]), ([50], [(0, 9, 1), (1, 9, 1)])):
        box, now = two(later)
        for session in some:
            box.put(passed(session, 0, 64) if later else prompt(session, 0, 64), now)
        for session in (0, 1):
            box.put(passed(session, 9) if later else rows(session, 9), now + 0.01)
        assert [part for part in parts(take(box, now + 0.01)) if part[0] != 50] == expected


def test_while_a_row_waits_for_another_sequence_rows_of_a_prompt_are_computed() -> None:
    box, now = two()
    box.put(rows(0, 9), now + 0.001)
    box.put(prompt(50, 0, 64), now + 0.001)
    batch = take(box, now + 0.001)
    assert [step.session for step in batch.steps] == [50]
    # After it the row that waits still ends in time.
    assert ended(box, batch, now + 0.001) + ROW <= now - ROW + STRETCH * (0.008 + 2 * ROW)


def test_the_last_part_of_a_divided_prompt_wants_the_token() -> None:
    box, now = busy()
    box.put(prompt(50, 0, 16, want=Want.TOKEN), now)
    box.put(rows(0, 9), now + 0.003)
    first = take(box, now + 0.003)
    now = ended(box, first, now + 0.003)
    box.put(rows(0, 10), now + 0.003)
    one, other = first.steps[1], take(box, now + 0.003).steps[1]
    assert (one.want, one.tokens + other.tokens) == (Want.NOTHING, tuple(range(16)))
    assert (other.want, other.first) == (Want.TOKEN, len(one.tokens))


def test_a_prompt_waits_for_rows_that_are_due_soon_and_fills_a_longer_gap() -> None:
    box, now = busy(away=0.001)
    box.put(prompt(50, 0, 64), now)
    until = box.take(now)
    assert isinstance(until, float) and now + 0.001 < until < now + 0.002
    box, now = busy(away=0.030)
    box.put(prompt(50, 0, 64), now)
    batch = take(box, now)
    assert [step.session for step in batch.steps] == [50]
    # After it the row that is due can still end in time.
    period = 0.030 + ROW
    assert ended(box, batch, now) + ROW <= now + STRETCH * period


def test_what_was_divided_is_joined_while_it_waits() -> None:
    box, now = busy(away=0.030, later=True)
    for first in range(0, 24, 3):
        box.put(passed(50, first, 3), now)
    box.put(passed(50, 30, 3), now)  # does not follow
    assert parts(take(box, now)) == [(50, 0, 24)]
    assert parts(take(box, now)) == [(50, 30, 3)]
    box.put(prompt(51, 0, 3), now)
    box.put(prompt(51, 3, 3, want=Want.TOKEN), now)
    box.put(prompt(51, 6, 3), now)  # of the next answer
    assert [(step.first, step.want) for step in take(box, now).steps] == [(0, Want.TOKEN)]


def test_rows_of_another_part_are_not_joined() -> None:
    box, now = busy(away=0.030, later=True)
    for at, part in enumerate([(0, 4), (0, 4), (0, 5), None]):
        box.put(replace(passed(50, 3 * at, 3), part=part), now)
    assert parts(take(box, now)) == [(50, 0, 6)]
    assert parts(take(box, now)) == [(50, 6, 3)]
    assert parts(take(box, now)) == [(50, 9, 3)]


def test_joined_rows_keep_their_values_and_their_bytes() -> None:
    box, now = busy(later=True)
    before = box._bytes
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    for at in range(6):
        box.put(Step(50, NOW, at, (at,), Want.NOTHING, values[at : at + 1]), now)
    box.put(passed(0, 9), now + 0.003)
    (_, step) = take(box, now + 0.003).steps
    assert step.tokens == tuple(range(6))
    assert np.array_equal(step.hidden if step.hidden is not None else [], values)
    assert box._bytes == before


def test_prompts_share_what_a_call_may_take_in_turn() -> None:
    box, now = busy(away=0.030)
    for session in (50, 51, 52, 53, 54):
        box.put(prompt(session, 0, 20), now)
    first = parts(take(box, now))
    assert [session for session, _, _ in first] == [50, 51, 52, 53]
    assert [count for _, _, count in first[:3]] == [20, 20, 20] and first[3][2] == 4
    assert parts(take(box, now))[0] == (54, 0, 20)


def test_slices_stay_within_those_of_the_grouping_and_shrink_with_the_position() -> None:
    for first, count in ((0, 12), (1000, 6), (100_000, 1)):
        box, now = busy(away=0.050, grouping=Grouping(1, 0.0, 12, 0.001))
        box.put(prompt(50, first, 64), now)
        assert parts(take(box, now)) == [(50, first, count)]


def test_prompts_are_not_divided_while_nothing_decodes_or_no_costs_are_known() -> None:
    box = Inbox(NOW, 256, 64, (), costly)
    box.put(prompt(50, 0, 64), 0.0)
    box.put(prompt(50, 64, 64), 0.0)
    assert parts(box.take(0.0)) == [(50, 0, 64)]
    box = Inbox(NOW, 256, 64)
    box.put(prompt(50, 0, 64), 0.0)
    box.put(rows(0, 9), 0.0)
    assert parts(box.take(0.0)) == [(0, 9, 1), (50, 0, 64)]


def test_a_prompt_goes_on_row_by_row_where_even_one_row_takes_too_long() -> None:
    def deep(loads: Sequence[Load], pause: float) -> float:
        return 0.001 * sum(count * (1 + first / 10) for count, first, _ in loads)

    box, now = Inbox(NOW, 256, 64, (), deep), 0.0
    for at in range(5):
        now = lap(box, at, now + 0.002)
    box.put(prompt(50, 1000, 64), now)
    box.put(rows(0, 9), now + 0.010)
    assert parts(box.take(now + 0.010)) == [(0, 9, 1)]
    assert parts(box.take(now + 0.1)) == [(50, 1000, 1)]


def test_a_prompt_goes_on_where_not_one_row_fits_beside_the_rows_that_are_due() -> None:
    """At such a depth attention to one row takes longer than all calls of the sequence together may."""

    def deep(loads: Sequence[Load], pause: float) -> float:
        return 0.001 * sum(count * (1 + first / 10) for count, first, _ in loads)

    box, now, done = Inbox(NOW, 256, 64, (), deep), 0.0, list[int]()

    def ran(batch: Batch) -> float:
        end = now + deep([load(step) for step in batch.steps], 0.0)
        box.ran(batch, now, end)
        done.extend(step.first for step in batch.steps if step.session == 50)
        return end

    for at in range(20):
        if at == 5:
            box.put(prompt(50, 1000, 64), now)
        if isinstance(batch := box.take(now), Batch):
            now = ran(batch)
        now += 0.002
        box.put(rows(0, at), now)
        now = ran(take(box, now))
    assert done[:3] == [1000, 1001, 1002]


def test_what_is_left_of_a_divided_step_counts_for_its_bytes() -> None:
    box, now = busy()
    box.put(prompt(50, 0, 64), now)
    box.put(rows(0, 9), now + 0.003)
    before = box._bytes
    count = len(take(box, now + 0.003).steps[1].tokens)
    assert before - box._bytes == held_bytes(rows(0, 9)) + count * 40
    box.put(Close(50, NOW), now)
    take(box, now)
    assert (box._bytes, bool(box)) == (0, False)


def test_a_session_begins_with_positions_of_another_before_that_one_ends_or_goes_back() -> None:
    fork = replace(opened(2), source=1, positions=64)
    later = replace(opened(3), source=2, positions=64)
    box = inbox(rows(1, 70), fork, later, Close(1, NOW), rows(2, 64))
    assert box.take(0.0) == Batch((fork, later, Close(1, NOW)), (rows(2, 64),))
    box = inbox(rows(1, 70), fork, prompt(1, 3, 4))
    assert box.take(0.0) == Batch((fork,), (rows(1, 70),))
    assert take(box).steps == (prompt(1, 3, 4),)


def test_a_fork_that_is_closed_before_it_has_begun_leaves_nothing() -> None:
    fork = replace(opened(2), source=1, positions=64)
    box = inbox(fork, rows(2, 64), Close(2, NOW), Close(1, NOW))
    assert box.take(0.0) == Batch((Close(2, NOW), Close(1, NOW)), ())
    assert not box and box.bytes == 0


def test_a_notice_behind_rows_waits_for_them_and_others_do_not() -> None:
    """An Open that is sent again may come after rows that the stage before had kept."""
    box = inbox(prompt(1, 0, 8), prompt(1, 8, 8), opened(1), opened(2))
    assert box.take(0.0) == Batch((opened(2),), (prompt(1, 0, 8),))
    assert box.take(0.0) == Batch((), (prompt(1, 8, 8),))
    assert box.take(0.0) == Batch((opened(1),), ())
    assert not box and box.bytes == 0
