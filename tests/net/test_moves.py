"""Records of transitions: their lines, and the tokens/s before and after."""

from __future__ import annotations

import pytest

from shoal.engine.batch import Sampling
from shoal.net.events import Moved, Shift
from shoal.net.generation import Flow, Generation
from shoal.net.messages import Epoch, Result
from shoal.net.moves import MEASURED_SECONDS, Move, MoveLog, Rate, usage_of
from shoal.net.placement import Outcome, Placement, Proposal, Usage

EPOCH = Epoch(9, 2)
HOT = Moved(
    EPOCH, "a is 2.5 times slower", (Shift(3, 5, "a", "b"), Shift(7, 8, "b", "c")), seconds=1.25, held=0.5,
    sent=3_200_000,
)  # fmt: skip
PROPOSAL = Proposal(Placement(()), "a is 2.5 times slower", 1 / 40, 1 / 50, 0.1, 3_000_000)


@pytest.mark.parametrize(
    ("move", "line"),
    [
        (
            Move(HOT, 9, 0.021),
            (
                "moved layers 3-4 from a to b, layer 7 from b to c (a is 2.5 times slower): 3.2 MB sent in "
                "1.2 s, 21 ms without steps"
            ),
        ),
        (
            Move(HOT, 9, 0.021, PROPOSAL, 39.0, 51.26),
            (
                "moved layers 3-4 from a to b, layer 7 from b to c (a is 2.5 times slower): 3.2 MB sent in "
                "1.2 s, 21 ms without steps; predicted 40.0 -> 50.0 tokens/s; measured 39.0 -> 51.3 tokens/s"
            ),
        ),
        (
            Move(Moved(EPOCH, "d has joined", (Shift(0, 1, "a", "d"),), seconds=0.5, sent=900), 9, after=8.0),
            (
                "moved embedding from a to d (d has joined): 0.9 kB sent in 0.5 s, 0 ms without steps; "
                "measured 8.0 tokens/s"
            ),
        ),
        (
            Move(Moved(EPOCH, "b is lost", (), (2, 5), True, 0.3, 0.1), 9, 0.1),
            ("filled layers 2-4 again (b is lost): 0.0 kB sent in 0.3 s, 100 ms without steps"),
        ),
        (
            Move(Moved(EPOCH, "b is lost", (Shift(1, 2, "a", "c"),), (2, 3), True, 0.3, 0.1), 9, 0.1),
            (
                "moved layer 1 from a to c and filled layer 2 again (b is lost): 0.0 kB sent in 0.3 s, "
                "100 ms without steps"
            ),
        ),
        (
            Move(Moved(EPOCH, "a is back"), 9),
            "changed no layers (a is back): 0.0 kB sent in 0.0 s, 0 ms without steps",
        ),
        (
            Move(Moved(EPOCH, "a is back", failure="the chain is changing already"), 9),
            "gave up a change of the plan (a is back): the chain is changing already",
        ),
        (
            Move(Moved(EPOCH, "a is hot", (Shift(3, 5, "a", "b"),), failure="b could not prepare"), 9),
            "gave up the move of layers 3-4 from a to b (a is hot): b could not prepare",
        ),
    ],
)
def test_a_move_is_told_in_one_line(move: Move, line: str) -> None:
    assert move.line() == line


def test_tokens_per_second_count_the_time_in_which_results_are_due() -> None:
    rate = Rate()
    assert rate.tokens_per_s is None
    rate.tick(10.0, 100, due=True)
    assert rate.tokens_per_s is None
    rate.tick(10.5, 110, due=True)
    assert rate.tokens_per_s == 20.0
    rate.tick(60.0, 110, due=False)
    rate.tick(60.5, 130, due=True)
    assert (rate.tokens_per_s, rate.seconds) == (30.0, 1.0)


def test_only_the_last_seconds_count() -> None:
    rate, now, tokens = Rate(), 0.0, 0
    for each in (1, 5):
        for _ in range(40):
            now, tokens = now + 0.25, tokens + each
            rate.tick(now, tokens, due=True)
    assert rate.seconds == MEASURED_SECONDS
    assert rate.tokens_per_s == 20.0


def test_how_fast_answers_come_now_is_told_by_the_last_three_seconds() -> None:
    rate, now, tokens = Rate(), 0.0, 0
    assert rate.recent(now) is None
    for each in (1, 5):
        for _ in range(12):
            now, tokens = now + 0.25, tokens + each
            rate.tick(now, tokens, due=True)
    assert rate.recent(now) == 20.0
    assert rate.recent(now + 2.9) == 20.0
    assert rate.recent(now + 3.0) is None
    rate.tick(now + 60.0, tokens, due=False)
    rate.tick(now + 60.5, tokens + 1, due=True)
    assert rate.recent(now + 60.5) == 2.0


def run(log: MoveLog, start: float, per_tick: int, tokens: int, ticks: int = 40) -> int:
    for i in range(1, ticks + 1):
        log.tick(start + i / 4, tokens + i * per_tick, due=True)
    return tokens + ticks * per_tick


def test_what_came_of_a_move_is_told_when_answers_have_run_for_long_enough() -> None:
    said: list[str] = []
    log = MoveLog(said.append, 9)
    tokens = run(log, 0.0, 10, 0)
    log.proposed(PROPOSAL)
    assert log.outcome() is None
    log.ended(HOT, 0.021)
    assert log.outcome() == Outcome(True, 1.25, 0.021)
    assert log.outcome() is None
    (move,) = log.moves
    assert (move.before, move.after, move.proposal) == (40.0, None, PROPOSAL)
    tokens = run(log, 10.0, 12, tokens, 19)
    assert move.after is None
    run(log, 14.75, 12, tokens)
    assert move.after == pytest.approx(48.0)
    assert said == [
        move.line().partition("; measured")[0],
        f"{move.what()}: measured 40.0 -> 48.0 tokens/s",
    ]


def test_moves_that_were_given_up_are_recorded_and_the_rebalancer_is_told() -> None:
    said: list[str] = []
    log = MoveLog(said.append, 9)
    run(log, 0.0, 10, 0)
    log.proposed(PROPOSAL)
    log.ended(Moved(EPOCH, "a is hot", seconds=2.0, failure="b could not prepare"), 9.0)
    assert log.outcome() == Outcome(False, 2.0, 0.0)
    log.ended(Moved(EPOCH, "c has joined"), 0.0)  # nobody proposed it
    assert log.outcome() is None
    assert [move.aborted for move in log.moves] == [True, False]
    assert [move.proposal for move in log.moves] == [PROPOSAL, None]
    assert len(said) == 1


def answer(prompt: int, made: int, most: int) -> Generation:
    g = Generation(0, Sampling(), 10_000, 100)
    g.ask([1] * prompt, most)
    g.start(Flow(EPOCH, 10_000, 2))
    for token in range(made):
        step = g.due()[-1]
        g.take(Result(0, EPOCH, step.first, prompt if not token else 1, 5))
    return g


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([], Usage(tokens=7)),
        ([(10, 2, 20)], Usage(1, 12, 18.0, 7)),
        ([(10, 0, 20)], Usage(1, 10, 20.0, 7, reading=True)),
        ([(10, 0, 20), (30, 100, 1000)], Usage(2, 70, 120.0, 7, reading=True)),
    ],
)
def test_what_a_chain_is_used_for(answers: list[tuple[int, int, int]], expected: Usage) -> None:
    assert usage_of([answer(*each) for each in answers], 7) == expected
