"""What the roster decides: who begins with what, who waits for whose rows, and what is dropped."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.engine.batch import Sampling, Want
from shoal.engine.roster import BESIDE_ROWS, BatchSequence, Job, Reading, Roster, Start
from shoal.engine.sharing import LEAST

A, B = [1] * 100, [2] * 100


def job(known: Sequence[int], *, owned: bool = False, reading: Reading | None = None) -> Job:
    sequence = BatchSequence(Sampling(), 1000, owned)
    return Job(sequence, list(known), len(known) + 9, (), lambda item: None, reading=reading)


def arrive(roster: Roster, *jobs: Job) -> list[Job]:
    """Jobs that begin when these arrive."""
    roster.waiting.extend(jobs)
    roster.admit()
    return begin(roster)


def begin(roster: Roster) -> list[Job]:
    begun = []
    for one, start in roster.starts():
        held = [] if start.source is None else start.source.tokens[: start.positions]
        one.sequence.number, one.sequence.tokens = len(begun), held
        one.begun, one.sent = True, len(held)
        begun.append(one)
    return begun


def ran(one: Job, rows: int) -> None:
    one.sequence.tokens += one.known[one.sent : one.sent + rows]
    one.sent += rows


def start_of(roster: Roster, one: Job) -> Start:
    roster.waiting.append(one)
    roster.admit()
    (start,) = [start for found, start in roster.starts() if found is one]
    return start


def test_the_younger_waits_for_rows_of_the_older() -> None:
    roster = Roster(8, share=True)
    first, second, other = job([*A, 3]), job([*A, 4]), job([*B, 3])
    assert arrive(roster, first, second, other) == [first, other]
    assert second.ahead == (first, 100)
    assert [one for one, _ in roster.chosen(500, 32)] == [first, other]
    ran(first, 99)
    assert begin(roster) == []
    ran(first, 1)
    assert begin(roster) == [second]
    assert second.sent == 100


def test_one_that_waits_may_be_waited_for() -> None:
    roster = Roster(8, share=True)
    first, second, third = job([*A, 3]), job([*A, *B, 4]), job([*A, *B, 5])
    assert arrive(roster, first, second, third) == [first]
    assert third.ahead == (second, 200)
    roster.ended(first)
    assert begin(roster) == [second]
    ran(second, 200)
    assert begin(roster) == [third]


def test_few_positions_are_computed_anew() -> None:
    roster = Roster(8, share=True)
    first, second = job([*A[: LEAST - 1], 3]), job([*A[: LEAST - 1], 4])
    assert arrive(roster, first, second) == [first, second]
    ran(first, LEAST)
    assert start_of(roster, job([*A[: LEAST - 1], 3, 5])) == Start(first.sequence, LEAST)


def test_a_row_of_its_own_remains() -> None:
    roster = Roster(8, share=True)
    first = job(A)
    arrive(roster, first)
    ran(first, 100)
    assert start_of(roster, job(A)) == Start(first.sequence, 99)
    read = job(A, reading=Reading(Want.SCORES, 40))
    assert start_of(roster, read) == Start(first.sequence, 40)


def test_a_session_keeps_its_own_unless_others_hold_more() -> None:
    roster = Roster(8, share=True)
    session, longer = BatchSequence(Sampling(), 1000, True, 7, [*A, *B[:50]]), job([*A, *B])
    roster.rest(session)
    arrive(roster, longer)
    assert longer.sent == 150
    turn = job([*A, *B[:50], 9])
    turn.sequence = session
    assert start_of(roster, turn) == Start(session, 150)
    assert session not in roster.idle
    roster.ended(turn)
    roster.rest(session)
    ran(longer, 50)
    turn = job([*A, *B, 9])
    turn.sequence = session
    assert start_of(roster, turn) == Start(longer.sequence, 200)


def test_without_sharing_there_is_only_ones_own() -> None:
    roster = Roster(8, share=False)
    first, second = job(A), job(A)
    assert arrive(roster, first, second) == [first, second]
    roster.ended(first)
    roster.rest(first.sequence)
    assert start_of(roster, job(A)) == Start(None, 0)


def test_places_and_who_is_set_aside() -> None:
    roster = Roster(3, share=True)
    jobs = [job([i] * 30) for i in range(5)]
    assert arrive(roster, *jobs) == jobs[:3]
    assert roster.set_aside() is jobs[2]
    roster.admit()
    assert (roster.running, list(roster.waiting)) == (jobs[:2], jobs[2:])
    roster.ended(jobs[0])
    roster.admit()
    assert roster.running == [jobs[1], jobs[2], jobs[3]]
    for _ in range(2):
        assert roster.set_aside() is not None
    assert roster.set_aside() is None


def test_the_longest_idle_is_dropped_and_a_source_is_not_idle() -> None:
    roster = Roster(2, share=True)
    idle = [BatchSequence(Sampling(), 1000, i == 0, i, [i] * 50) for i in range(4)]
    for sequence in idle[:3]:
        roster.rest(sequence)
    assert roster.surplus(crowded=False) is None
    assert roster.surplus(crowded=True) is idle[1]  # the first one is a session's
    roster.rest(idle[3])
    roster.used(idle[1])
    assert roster.surplus(crowded=False) is idle[2]
    roster.remove(idle[2])
    assert start_of(roster, job([2] * 50)) == Start(None, 0)
    assert sorted(roster.numbers) == [0, 1, 3]


def test_what_another_holds_too_is_covered() -> None:
    roster = Roster(8, share=True)
    held = [[1] * 40, [1] * 39 + [2], [1] * 50, [1] * 30]
    idle = [BatchSequence(Sampling(), 1000, i == 3, i, tokens) for i, tokens in enumerate(held)]
    for sequence in idle:
        roster.rest(sequence)
    assert roster.covered(idle[2]) == [idle[0]]  # not the session's
    assert roster.covered(idle[0]) == []


def test_rows_of_a_call() -> None:
    roster = Roster(8, share=True)
    prompt, reading = job([*A, 3]), job(B, reading=Reading(Want.SCORES, 10))
    arrive(roster, prompt, reading)
    assert roster.chosen(70, 8) == [(prompt, 70)]
    assert roster.chosen(500, 8) == [(prompt, 101), (reading, 10)]
    ran(reading, 10)
    assert roster.chosen(500, 8) == [(prompt, 101), (reading, 7)]
    ran(prompt, 101)
    prompt.known.append(4)
    assert roster.chosen(500, 80) == [(prompt, 1), (reading, BESIDE_ROWS)]


def test_rows_of_the_final_norm_need_no_logits() -> None:
    roster = Roster(8, share=True)
    first, second = job(A, reading=Reading(Want.ROWS, 0)), job(B, reading=Reading(Want.ROWS, 10))
    arrive(roster, first, second)
    assert roster.chosen(500, 8) == [(first, len(A)), (second, 10)]
    ran(second, 10)
    assert roster.chosen(500, 8) == [(first, len(A)), (second, len(B) - 10)]
    assert roster.chosen(len(A) + 7, 8) == [(first, len(A)), (second, 7)]
