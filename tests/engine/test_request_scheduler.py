"""What the scheduler decides: who begins with what, who waits for whose rows, and what is dropped."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.engine.batch import Sampling, Want
from shoal.engine.request_scheduler import BESIDE_ROWS, BatchSequence, Job, Reading, RequestScheduler, Start
from shoal.engine.sharing import LEAST

A, B = [1] * 100, [2] * 100


def job(known: Sequence[int], *, owned: bool = False, reading: Reading | None = None) -> Job:
    sequence = BatchSequence(Sampling(), 1000, owned)
    return Job(sequence, list(known), len(known) + 9, (), lambda item: None, reading=reading)


def arrive(scheduler: RequestScheduler, *jobs: Job) -> list[Job]:
    """Jobs that begin when these arrive."""
    scheduler.waiting.extend(jobs)
    scheduler.admit()
    return begin(scheduler)


def begin(scheduler: RequestScheduler) -> list[Job]:
    begun = []
    for one, start in scheduler.starts():
        held = [] if start.source is None else start.source.tokens[: start.positions]
        one.sequence.number, one.sequence.tokens = len(begun), held
        one.begun, one.sent = True, len(held)
        begun.append(one)
    return begun


def ran(one: Job, rows: int) -> None:
    one.sequence.tokens += one.known[one.sent : one.sent + rows]
    one.sent += rows


def start_of(scheduler: RequestScheduler, one: Job) -> Start:
    scheduler.waiting.append(one)
    scheduler.admit()
    (start,) = [start for found, start in scheduler.starts() if found is one]
    return start


def test_the_younger_waits_for_rows_of_the_older() -> None:
    scheduler = RequestScheduler(8, share=True)
    first, second, other = job([*A, 3]), job([*A, 4]), job([*B, 3])
    assert arrive(scheduler, first, second, other) == [first, other]
    assert second.ahead == (first, 100)
    assert [one for one, _ in scheduler.chosen(500, 32)] == [first, other]
    ran(first, 99)
    assert begin(scheduler) == []
    ran(first, 1)
    assert begin(scheduler) == [second]
    assert second.sent == 100


def test_one_that_waits_may_be_waited_for() -> None:
    scheduler = RequestScheduler(8, share=True)
    first, second, third = job([*A, 3]), job([*A, *B, 4]), job([*A, *B, 5])
    assert arrive(scheduler, first, second, third) == [first]
    assert third.ahead == (second, 200)
    scheduler.ended(first)
    assert begin(scheduler) == [second]
    ran(second, 200)
    assert begin(scheduler) == [third]


def test_few_positions_are_computed_anew() -> None:
    scheduler = RequestScheduler(8, share=True)
    first, second = job([*A[: LEAST - 1], 3]), job([*A[: LEAST - 1], 4])
    assert arrive(scheduler, first, second) == [first, second]
    ran(first, LEAST)
    assert start_of(scheduler, job([*A[: LEAST - 1], 3, 5])) == Start(first.sequence, LEAST)


def test_a_row_of_its_own_remains() -> None:
    scheduler = RequestScheduler(8, share=True)
    first = job(A)
    arrive(scheduler, first)
    ran(first, 100)
    assert start_of(scheduler, job(A)) == Start(first.sequence, 99)
    read = job(A, reading=Reading(Want.SCORES, 40))
    assert start_of(scheduler, read) == Start(first.sequence, 40)


def test_a_session_keeps_its_own_unless_others_hold_more() -> None:
    scheduler = RequestScheduler(8, share=True)
    session, longer = BatchSequence(Sampling(), 1000, True, 7, [*A, *B[:50]]), job([*A, *B])
    scheduler.rest(session)
    arrive(scheduler, longer)
    assert longer.sent == 150
    turn = job([*A, *B[:50], 9])
    turn.sequence = session
    assert start_of(scheduler, turn) == Start(session, 150)
    assert session not in scheduler.idle
    scheduler.ended(turn)
    scheduler.rest(session)
    ran(longer, 50)
    turn = job([*A, *B, 9])
    turn.sequence = session
    assert start_of(scheduler, turn) == Start(longer.sequence, 200)


def test_without_sharing_there_is_only_ones_own() -> None:
    scheduler = RequestScheduler(8, share=False)
    first, second = job(A), job(A)
    assert arrive(scheduler, first, second) == [first, second]
    scheduler.ended(first)
    scheduler.rest(first.sequence)
    assert start_of(scheduler, job(A)) == Start(None, 0)


def test_places_and_who_is_set_aside() -> None:
    scheduler = RequestScheduler(3, share=True)
    jobs = [job([i] * 30) for i in range(5)]
    assert arrive(scheduler, *jobs) == jobs[:3]
    assert scheduler.set_aside() is jobs[2]
    scheduler.admit()
    assert (scheduler.running, list(scheduler.waiting)) == (jobs[:2], jobs[2:])
    scheduler.ended(jobs[0])
    scheduler.admit()
    assert scheduler.running == [jobs[1], jobs[2], jobs[3]]
    for _ in range(2):
        assert scheduler.set_aside() is not None
    assert scheduler.set_aside() is None


def test_the_longest_idle_is_dropped_and_a_source_is_not_idle() -> None:
    scheduler = RequestScheduler(2, share=True)
    idle = [BatchSequence(Sampling(), 1000, i == 0, i, [i] * 50) for i in range(4)]
    for sequence in idle[:3]:
        scheduler.rest(sequence)
    assert scheduler.surplus(crowded=False) is None
    assert scheduler.surplus(crowded=True) is idle[1]  # the first one is a session's
    scheduler.rest(idle[3])
    scheduler.used(idle[1])
    assert scheduler.surplus(crowded=False) is idle[2]
    scheduler.remove(idle[2])
    assert start_of(scheduler, job([2] * 50)) == Start(None, 0)
    assert sorted(scheduler.numbers) == [0, 1, 3]


def test_what_another_holds_too_is_covered() -> None:
    scheduler = RequestScheduler(8, share=True)
    held = [[1] * 40, [1] * 39 + [2], [1] * 50, [1] * 30]
    idle = [BatchSequence(Sampling(), 1000, i == 3, i, tokens) for i, tokens in enumerate(held)]
    for sequence in idle:
        scheduler.rest(sequence)
    assert scheduler.covered(idle[2]) == [idle[0]]  # not the session's
    assert scheduler.covered(idle[0]) == []


def test_rows_of_a_call() -> None:
    scheduler = RequestScheduler(8, share=True)
    prompt, reading = job([*A, 3]), job(B, reading=Reading(Want.SCORES, 10))
    arrive(scheduler, prompt, reading)
    assert scheduler.chosen(70, 8) == [(prompt, 70)]
    assert scheduler.chosen(500, 8) == [(prompt, 101), (reading, 10)]
    ran(reading, 10)
    assert scheduler.chosen(500, 8) == [(prompt, 101), (reading, 7)]
    ran(prompt, 101)
    prompt.known.append(4)
    assert scheduler.chosen(500, 80) == [(prompt, 1), (reading, BESIDE_ROWS)]


def test_rows_of_the_final_norm_need_no_logits() -> None:
    scheduler = RequestScheduler(8, share=True)
    first, second = job(A, reading=Reading(Want.ROWS, 0)), job(B, reading=Reading(Want.ROWS, 10))
    arrive(scheduler, first, second)
    assert scheduler.chosen(500, 8) == [(first, len(A)), (second, 10)]
    ran(second, 10)
    assert scheduler.chosen(500, 8) == [(first, len(A)), (second, len(B) - 10)]
    assert scheduler.chosen(len(A) + 7, 8) == [(first, len(A)), (second, 7)]
