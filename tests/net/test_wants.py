"""What is wanted of rows, in the queue of a stage and at the coordinator: masks that come late, calls that
have room for so many rows, and results that do not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shoal.engine.batch import Logprobs, Sampling, Want
from shoal.engine.batch import Result as Read
from shoal.net.errors import RemoteProtocolError
from shoal.net.generation import Flow, Generation
from shoal.net.inbox import MOST_TOLD, Batch, Inbox, held_bytes
from shoal.net.messages import (
    MOST_WANTED,
    Close,
    Draw,
    Epoch,
    Mask,
    Open,
    Result,
    Rows,
    SetSampling,
    Step,
    Tokens,
)
from shoal.net.sampling_updates import Told

NOW, OLD = Epoch(1, 2), Epoch(1, 1)
BITS = b"\x07\x01"


def opened(session: int) -> Open:
    return Open(session, NOW, 100)


def masked(session: int, first: int, mask: int, count: int = 1, **changes: Any) -> Step:
    return replace(Step(session, NOW, first, (1,) * count, Want.TOKEN, told=mask, masked=mask > 0), **changes)


def mask(session: int, number: int, epoch: Epoch = NOW) -> Mask:
    return Mask(session, epoch, number, BITS)


def inbox(*items: Open | Close | Step | Told, last: bool = True) -> Inbox:
    box = Inbox(NOW, 64, 64, last=last)
    for item in items:
        if isinstance(item, SetSampling | Tokens | Mask):
            box.tell(item, 0.0)
        else:
            box.put(item, 0.0)
    return box


def bits(step: Step) -> bytes | None:
    allowed = None if step.draw is None else step.draw.allowed
    return None if allowed is None else allowed.tobytes()


def taken(box: Inbox) -> list[tuple[int, int, bytes | None]]:
    """The Steps of the next call: session, first position, and the bits of its mask."""
    batch = box.take(0.0)
    steps = batch.steps if isinstance(batch, Batch) else ()
    return [(s.session, s.first, bits(s)) for s in steps]


def test_a_step_waits_for_its_mask_and_others_do_not() -> None:
    box = inbox(opened(1), masked(1, 0, 1), opened(2), masked(2, 0, 0))
    assert box.bytes == sum(map(held_bytes, (opened(1), opened(2), masked(1, 0, 1), masked(2, 0, 0))))
    assert taken(box) == [(2, 0, None)]
    assert taken(box) == []
    box.tell(mask(1, 1, OLD), 0.0)
    assert taken(box) == []
    box.tell(mask(1, 1), 0.0)
    assert taken(box) == [(1, 0, BITS)]
    assert box.bytes == 0 and not box
    box.tell(mask(1, 2), 0.0)  # before its Step, as usual
    box.put(masked(1, 1, 2), 0.0)
    assert taken(box) == [(1, 1, BITS)]


def test_what_follows_a_step_without_its_mask_waits_too() -> None:
    box = inbox(opened(1), Step(1, NOW, 0, (1, 2), Want.NOTHING), masked(1, 2, 1), masked(1, 3, 2))
    assert taken(box) == [(1, 0, None)]
    assert taken(box) == []
    box.tell(mask(1, 1), 0.0)
    assert taken(box) == [(1, 2, BITS)]
    assert taken(box) == []
    box.tell(mask(1, 2), 0.0)
    assert taken(box) == [(1, 3, BITS)]


def test_a_step_of_an_answer_that_was_left_needs_no_mask() -> None:
    box = inbox(opened(1), mask(1, 1), mask(1, 2))  # the answer was left when its last Step was on its way
    box.put(masked(1, 4, 1), 0.0)
    box.put(masked(1, 4, 2), 0.0)
    assert [taken(box), taken(box)] == [[(1, 4, None)], [(1, 4, BITS)]]
    late = inbox(opened(1), masked(1, 4, 1), masked(1, 4, 2), mask(1, 2))
    assert [taken(late), taken(late)] == [[(1, 4, None)], [(1, 4, BITS)]]


def test_a_close_drops_a_step_that_waits() -> None:
    box = inbox(opened(1), masked(1, 0, 1), masked(1, 1, 2), Close(1, NOW))
    batch = box.take(0.0)
    assert isinstance(batch, Batch) and not batch.steps and Close(1, NOW) in batch.notices
    assert box.bytes == 0
    box.tell(mask(1, 1), 0.0)  # nobody waits for it
    assert taken(box) == []


def test_what_is_told_is_kept_until_the_coordinator_says_that_the_session_ends() -> None:
    box = inbox(opened(1), mask(1, 1), Close(1, NOW))  # which may come before what it told earlier
    taken(box)
    assert taken(inbox_with(box, masked(1, 0, 1))) == [(1, 0, BITS)]
    box.tell(Close(1, NOW), 0.0)
    assert taken(inbox_with(box, masked(1, 1, 1))) == []
    for session in range(2, MOST_TOLD + 2):
        box.tell(mask(session, 1), 0.0)
    with pytest.raises(RemoteProtocolError, match="more than 512 sessions"):
        box.tell(mask(1, 1), 0.0)
    box.tell(mask(2, 2), 0.0)


def inbox_with(box: Inbox, step: Step) -> Inbox:
    box.put(step, 0.0)
    return box


PENALISED = Sampling(repetition_penalty=1.5)


def told_tokens(number: int, first: int, *tokens: int) -> Tokens:
    return Tokens(1, NOW, number, first, tokens)


def histories(box: Inbox) -> list[tuple[int, list[int] | None, Sampling]]:
    """The Steps of the next call: first position, history, and parameters."""
    batch, found = box.take(0.0), []
    for step in batch.steps if isinstance(batch, Batch) else ():
        assert step.draw is not None
        history = step.draw.history
        found.append((step.first, None if history is None else history.tolist(), step.draw.sampling))
    return found


def test_a_step_waits_for_the_tokens_that_it_penalises() -> None:
    box = inbox(
        opened(1), masked(1, 2, 0, told=3), SetSampling(1, NOW, 1, PENALISED), told_tokens(2, 0, 7, 8)
    )
    assert histories(box) == []
    box.tell(told_tokens(3, 2, 9), 0.0)
    assert histories(box) == [(2, [7, 8, 9], PENALISED)]
    late = inbox(opened(1), told_tokens(1, 0, 7, 8), masked(1, 1, 0, told=1))  # without a penalty none count
    assert histories(late) == [(1, None, Sampling())]


def test_a_step_of_an_answer_that_was_left_finds_other_tokens_and_does_not_wait() -> None:
    box = inbox(opened(1), SetSampling(1, NOW, 1, PENALISED), told_tokens(2, 0, 1, 2, 3, 4))
    box.tell(told_tokens(3, 1, 9), 0.0)  # of the next answer, whose Step follows
    left, following = masked(1, 3, 0, told=2), masked(1, 1, 0, told=3)
    assert histories(inbox_with(box, left)) == [(3, [1, 9, 3, 4], PENALISED)]
    assert histories(inbox_with(box, following)) == [(1, [1, 9], PENALISED)]


def test_what_waits_counts_with_its_rows_and_what_was_told() -> None:
    hidden = np.zeros((3, 1000), np.float32)
    step = Step(1, NOW, 0, (), Want.TOKEN, hidden)
    assert held_bytes(step) > 12_000
    assert held_bytes(replace(step, draw=Draw(history=np.zeros(500, np.int32)))) == held_bytes(step) + 2000


@pytest.mark.parametrize(
    ("notice", "words"),
    [
        (told_tokens(2, 1, 5), "told number 2 of session 1 after 2"),
        (told_tokens(3, 3, 5), "from position 3 on, after those of 2"),
    ],
)
def test_what_is_told_follows_what_was_told_before(notice: Tokens, words: str) -> None:
    box = inbox(opened(1), told_tokens(2, 0, 1, 2))
    with pytest.raises(RemoteProtocolError, match=words):
        box.tell(notice, 0.0)


def test_stages_before_the_last_pass_masked_steps_on() -> None:
    box = inbox(opened(1), masked(1, 0, 1), last=False)
    assert taken(box) == [(1, 0, None)]


def test_rows_of_a_call_do_not_wait_for_one_without_its_mask() -> None:
    hidden = np.zeros((1, 4), np.float32)
    box = inbox(
        opened(1), opened(2), masked(1, 3, 0, hidden=hidden, more=True), masked(2, 3, 1, hidden=hidden)
    )
    assert taken(box) == [(1, 3, None)]
    box.tell(mask(2, 1), 0.0)
    assert taken(box) == [(2, 3, BITS)]


def scored(session: int, count: int, want: Want = Want.SCORES) -> Step:
    return Step(session, NOW, 0, tuple(range(count)), want, report=3, told=1)


@pytest.mark.parametrize("want", [Want.SCORES, Want.TOKENS])
def test_a_call_has_room_for_so_many_rows_of_which_something_is_wanted(want: Want) -> None:
    told = [Tokens(session, NOW, 1, 0, tuple(range(21))) for session in range(3)]
    steps = [scored(session, 20, want) for session in range(3)]
    box = inbox(*told, *steps, masked(7, 0, 0), masked(8, 5, 0, 6))
    rows: dict[int, list[Step]] = {}
    for _ in range(9):
        batch = box.take(0.0)
        if not isinstance(batch, Batch):
            break
        wanted = [s.rows if s.want.every_row else int(s.want is Want.TOKEN) for s in batch.steps]
        assert sum(wanted) <= MOST_WANTED
        for step in batch.steps:
            rows.setdefault(step.session, []).append(step)
    assert not box and box.bytes == 0
    for session in range(3):
        at = 0
        for step in rows[session]:
            assert (step.first, step.want, step.report) == (at, want, 3)
            at += step.rows
            assert step.draw is not None
            history = None if step.draw.history is None else step.draw.history.tolist()
            assert history == (list(range(21)) if want is Want.SCORES else None)
        assert at == 20
    assert max(len(steps) for steps in rows.values()) > 1  # some were divided


def test_rows_that_want_nothing_are_not_joined_with_those_that_want_something() -> None:
    first = Step(1, NOW, 0, (1, 2), Want.NOTHING)
    box = Inbox(NOW, 64, 64, expect=lambda loads, idle: 0.001)
    box.tell(told_tokens(1, 0, *range(8)), 0.0)
    for item in (masked(9, 0, 0), first, replace(first, first=2), replace(scored(1, 3), first=4)):
        box.put(item, 0.0)
    found = []
    while isinstance(batch := box.take(0.0), Batch):
        found += [(s.first, s.rows, s.want) for s in batch.steps if s.session == 1]
        box.ran(batch, 0.0, 0.001)
    assert found[-1] == (4, 3, Want.SCORES)
    assert sum(count for _, count, _ in found) == 7


FLOW = Flow(Epoch(1, 1), 64, 3)
TOLD = Logprobs(-1.0, ((5, -0.5), (6, -2.0)))


def reading(want: Want, report: int | None = 2) -> tuple[Generation, Step]:
    """A session that reads, and its Step in flight."""
    g = Generation(3, Sampling(), 50, 100, report)
    g.read([1, 2, 3, 4, 5], 2, want)
    g.start(FLOW)
    first, *told, step = g.due()
    assert isinstance(first, Step) and isinstance(step, Step)
    assert told == ([Tokens(3, FLOW.epoch, 1, 0, (1, 2, 3, 4, 5))] if want is Want.SCORES else [])
    assert step.told == len(told)
    assert (first.tokens, first.want, step.first, step.want) == ((1, 2), Want.NOTHING, 2, want)
    assert g.take(Result(3, FLOW.epoch, 0, 2, None)) is None
    return g, step


def test_results_of_rows_may_come_in_parts() -> None:
    g, step = reading(Want.SCORES)
    assert (step.tokens, step.report) == ((3, 4), 2)
    assert not g.decodes and g.reads and not g.finished
    read = g.take(Result(3, FLOW.epoch, 2, 1, None, scores=(-1.0,), logprobs=(TOLD,)))
    assert read == Read(3, 2, 1, scores=(-1.0,), logprobs=(TOLD,))
    assert g.held == 3 and g.skippable == [1, 2, 3, 4]
    g.start(FLOW)  # what has arrived is replayed and wants nothing
    again = g.due()
    assert [(s.first, s.tokens, s.want) for s in again if isinstance(s, Step)] == [
        (0, (1, 2, 3), Want.NOTHING),
        (3, (4,), Want.SCORES),
    ]
    assert g.take(Result(3, FLOW.epoch, 0, 3, None)) is None
    assert g.take(Result(3, FLOW.epoch, 3, 1, None, scores=(-2.0,), logprobs=(TOLD,))) is not None
    assert g.finished and g.due() == []


OUTPUT = np.zeros((2, 4), np.float32)
FOUND = {"scores": (-1.0, -1.0), "logprobs": (TOLD, TOLD)}
WRONG: dict[str, tuple[Want, int | None, Result | Rows]] = {
    "no scores": (Want.SCORES, None, Result(3, FLOW.epoch, 2, 2, None)),
    "too few scores": (Want.SCORES, None, Result(3, FLOW.epoch, 2, 2, None, scores=(-1.0,))),
    "too many rows": (Want.SCORES, None, Result(3, FLOW.epoch, 2, 3, None, scores=(-1.0,) * 3)),
    "another position": (Want.SCORES, None, Result(3, FLOW.epoch, 3, 1, None, scores=(-1.0,))),
    "a token": (Want.SCORES, None, Result(3, FLOW.epoch, 2, 2, 7)),
    "tokens for scores": (Want.SCORES, None, Result(3, FLOW.epoch, 2, 2, None, tokens=(1, 2))),
    "scores for tokens": (Want.TOKENS, None, Result(3, FLOW.epoch, 2, 2, None, scores=(-1.0, -1.0))),
    "scores for rows": (Want.ROWS, None, Result(3, FLOW.epoch, 2, 2, None, scores=(-1.0, -1.0))),
    "nothing for rows": (Want.ROWS, None, Result(3, FLOW.epoch, 2, 2, None)),
    "rows for scores": (Want.SCORES, None, Rows(3, FLOW.epoch, 2, OUTPUT)),
    "tokens beyond the vocabulary": (
        Want.TOKENS,
        None,
        Result(3, FLOW.epoch, 2, 2, None, tokens=(1, 100)),
    ),
    "log-probabilities that are not wanted": (
        Want.SCORES,
        None,
        Result(3, FLOW.epoch, 2, 2, None, **FOUND),  # type: ignore[arg-type]
    ),
    "log-probabilities that are missing": (
        Want.SCORES,
        2,
        Result(3, FLOW.epoch, 2, 2, None, scores=(-1.0, -1.0)),
    ),
    "other numbers of the likeliest": (
        Want.SCORES,
        1,
        Result(3, FLOW.epoch, 2, 2, None, **FOUND),  # type: ignore[arg-type]
    ),
    "a likeliest token beyond the vocabulary": (
        Want.SCORES,
        1,
        Result(
            *(3, FLOW.epoch, 2, 2, None),
            scores=(-1.0, -1.0),
            logprobs=(Logprobs(-1.0, ((100, -1.0),)), Logprobs(-1.0, ((1, -1.0),))),
        ),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_results_that_were_not_due_are_the_nodes_fault(name: str) -> None:
    want, report, result = WRONG[name]
    g, _ = reading(want, report)
    with pytest.raises(RemoteProtocolError, match=r"which (was|is) not"):
        g.take(result)


@pytest.mark.parametrize(
    "result",
    [
        Result(3, FLOW.epoch, 0, 2, 7, scores=(-1.0,)),
        Result(3, FLOW.epoch, 0, 2, 7, tokens=(1, 2)),
        Result(3, FLOW.epoch, 0, 2, 7, logprobs=(TOLD,)),
        Rows(3, FLOW.epoch, 0, OUTPUT),
    ],
)
def test_a_token_comes_alone(result: Result | Rows) -> None:
    g = Generation(3, Sampling(), 50, 100)
    g.ask([1, 2], 5)
    g.start(FLOW)
    g.due()
    with pytest.raises(RemoteProtocolError, match="was not due"):
        g.take(result)


def test_logits_are_not_read_over_a_network() -> None:
    with pytest.raises(ValueError, match="not over a network"):
        Generation(3, Sampling(), 50, 100).check_read([1], Want.LOGITS)
