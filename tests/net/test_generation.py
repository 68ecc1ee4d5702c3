"""An answer's bookkeeping: what is sent, what is due back, where it ends, and how it begins again."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from shoal.engine.batch import Sampling, Want
from shoal.engine.errors import ContextError
from shoal.net import tags
from shoal.net.errors import RemoteProtocolError
from shoal.net.generation import Drawn, Fill, Flow, Generation
from shoal.net.messages import Close, Epoch, Mask, Open, Refill, Result, SetSampling, Step, Tokens

FIRST, SECOND = Flow(Epoch(9, 1), 4, 3), Flow(Epoch(9, 2), 8, 2)


def generation(
    prompt: int = 10, max_tokens: int = 5, end: tuple[int, ...] = (), context: int = 50
) -> Generation:
    g = Generation(3, Sampling(), context, 100)
    g.ask(list(range(prompt)), max_tokens, end)
    return g


def spans(steps: Sequence[Step | Refill | Mask]) -> list[tuple[int, int, bool]]:
    rows = [step for step in steps if isinstance(step, Step)]
    assert len(rows) == len(steps)
    return [(step.first, step.rows, step.want is Want.TOKEN) for step in rows]


def answer(step: Step, token: int | None) -> Result:
    return Result(step.session, step.epoch, step.first, step.rows, token)


def take(g: Generation, result: Result, *, fill: bool = False) -> int | None:
    """The token that a result adds to the answer."""
    found = g.take(result, fill=fill)
    assert found is None or isinstance(found, Drawn)
    return None if found is None else found.token


def test_a_prompt_goes_in_chunks_within_the_window_and_the_last_wants_a_token() -> None:
    g = generation(14)
    assert g.start(FIRST) == Open(3, FIRST.epoch, 50)
    first = g.due()
    assert spans(first) == [(0, 4, False), (4, 4, False), (8, 4, False)]
    assert g.due() == []
    assert take(g, answer(first[0], None)) is None
    (last,) = g.due()
    assert (spans([last]), last.tokens) == ([(12, 2, True)], (12, 13))
    for step in first[1:]:
        assert take(g, answer(step, None)) is None
    assert g.due() == []
    assert take(g, answer(last, 77)) == 77
    (decode,) = g.due()
    assert (decode.first, decode.tokens, decode.want) == (14, (77,), Want.TOKEN)


def test_a_stage_may_divide_a_step_and_each_part_is_answered() -> None:
    g = generation(6)
    g.start(FIRST)
    first, last = g.due()
    assert take(g, replace(answer(first, None), rows=1)) is None
    assert g.due() == []
    for wrong in (
        answer(first, None),
        Result(3, FIRST.epoch, 1, 6, None),
        Result(3, FIRST.epoch, 2, 2, None),
        Result(3, FIRST.epoch, 1, 2, 7),
    ):
        with pytest.raises(RemoteProtocolError, match="was not due"):
            take(g, wrong)
    assert take(g, Result(3, FIRST.epoch, 1, 3, None)) is None
    assert take(g, Result(3, FIRST.epoch, 4, 1, None)) is None
    with pytest.raises(RemoteProtocolError, match="was not due"):
        take(g, Result(3, FIRST.epoch, 5, 1, None))
    assert take(g, Result(3, FIRST.epoch, 5, 1, 77)) == 77
    assert last.want is Want.TOKEN


def test_a_stage_may_join_rows_that_follow_each_other() -> None:
    g = generation(12)
    g.start(FIRST)
    assert spans(g.due()) == [(0, 4, False), (4, 4, False), (8, 4, True)]
    assert take(g, Result(3, FIRST.epoch, 0, 6, None)) is None
    for wrong in (
        Result(3, FIRST.epoch, 6, 6, None),  # with all rows there is a token
        Result(3, FIRST.epoch, 6, 5, 7),  # and without all there is none
        Result(3, FIRST.epoch, 6, 7, 7),
        Result(3, FIRST.epoch, 4, 2, None),
    ):
        with pytest.raises(RemoteProtocolError, match="was not due"):
            take(g, wrong)
    assert take(g, Result(3, FIRST.epoch, 6, 6, 7)) == 7
    assert spans(g.due()) == [(12, 1, True)]


def test_rows_of_an_answer_that_was_left_may_be_joined_with_those_of_the_next() -> None:
    g = generation(8)
    g.start(FIRST)
    g.due()
    g.ask([*range(8), 50, 51], 3)
    assert spans(g.due()) == [(8, 2, True)]
    assert take(g, Result(3, FIRST.epoch, 0, 8, 9)) is None
    assert take(g, Result(3, FIRST.epoch, 8, 2, 11)) == 11


def test_parts_of_an_answer_that_was_left_are_passed_over() -> None:
    g = generation(8)
    g.start(FIRST)
    old = g.due()
    g.ask([5, 6], 3)
    (new,) = g.due()
    assert take(g, replace(answer(old[0], None), rows=3)) is None
    assert take(g, Result(3, FIRST.epoch, 3, 1, None)) is None
    assert take(g, answer(old[1], 9)) is None
    assert take(g, answer(new, 11)) == 11


def drive(g: Generation, tokens: list[int]) -> list[int]:
    """Answers whatever is due with the tokens in turn; returns those that became part of the answer."""
    got, waiting = [], list[Step]()
    while not g.finished:
        waiting += g.due()
        step = waiting.pop(0)
        token = take(g, answer(step, tokens.pop(0) if step.want is Want.TOKEN else None))
        got += [] if token is None else [token]
    return got


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"max_tokens": 3}, [5, 6, 7]),
        ({"max_tokens": 1}, [5]),
        ({"max_tokens": 0}, []),
        ({"end": (7, 8)}, [5, 6]),
        ({"end": (5,)}, []),
        ({"max_tokens": 9, "context": 12}, [5, 6, 7]),
        ({"max_tokens": 9, "context": 11}, [5, 6]),
    ],
)
def test_where_an_answer_ends(how: dict[str, int], expected: list[int]) -> None:
    g = generation(**how)  # type: ignore[arg-type]
    g.start(FIRST)
    assert drive(g, [5, 6, 7, 8, 9]) == expected
    assert g.due() == []


@pytest.mark.parametrize("after", range(7))
def test_a_new_epoch_sends_all_that_is_known_and_goes_on(after: int) -> None:
    g = generation(6, max_tokens=4)
    g.start(FIRST)
    waiting, drawn = list[Step](), iter([50, 51, 52, 53])
    got = []
    for _ in range(after):
        waiting += g.due()
        if g.finished:
            break
        step = waiting.pop(0)
        token = take(g, answer(step, next(drawn) if step.want is Want.TOKEN else None))
        got += [] if token is None else [token]
    if not g.finished:
        assert g.start(SECOND).epoch == SECOND.epoch
        again = g.due()
        assert [token for step in again for token in step.tokens] == [*range(6), *got][: 8 * len(again)]
        assert all(step.epoch == SECOND.epoch for step in again)
        g.start(SECOND)
    got += drive(g, list(drawn))
    assert got == [50, 51, 52, 53]


def test_answers_that_were_not_due_are_the_nodes_fault() -> None:
    g = generation(3)
    g.start(FIRST)
    (step,) = g.due()
    good = answer(step, 5)
    for change in ({"first": 1}, {"rows": 2}, {"token": None}, {"token": 100}):
        g.start(FIRST)
        g.due()
        with pytest.raises(RemoteProtocolError):
            take(g, replace(good, **change))  # type: ignore[arg-type]
    g.start(FIRST)
    with pytest.raises(RemoteProtocolError):
        take(g, good)


def test_close_ends_it_under_the_epoch_that_it_runs_in() -> None:
    g = generation()
    assert g.close() is None
    g = generation()
    g.start(SECOND)
    assert g.close() == Close(3, SECOND.epoch)
    assert g.finished and g.due() == []


@pytest.mark.parametrize(("prompt", "context"), [(0, 50), (50, 50), (51, 50)])
def test_a_prompt_that_leaves_no_room_is_refused(prompt: int, context: int) -> None:
    with pytest.raises(ContextError, match=f"{prompt} tokens and the context holds {context}"):
        generation(prompt, context=context)


def test_a_prompt_with_a_foreign_token_is_refused() -> None:
    with pytest.raises(ValueError, match="token id 100"):
        Generation(1, Sampling(), 50, 100).ask([1, 100], 5)


def sent(steps: list[Step]) -> list[tuple[int, tuple[int, ...]]]:
    return [(step.first, step.tokens) for step in steps]


def test_the_next_prompt_is_sent_from_where_it_parts_from_what_the_chain_holds() -> None:
    g = generation(6, max_tokens=3)
    g.start(FIRST)
    assert drive(g, [50, 51, 52]) == [50, 51, 52]
    # The chain has the prompt and all of the answer but its last token, which was never sent.
    g.ask([*range(6), 50, 51, 52, 9, 8], 2)
    assert sent(g.due()) == [(8, (52, 9, 8))]


@pytest.mark.parametrize(
    ("prompt", "first"),
    [
        ([0, 1, 2, 7, 8, 9, 10], 3),  # another question in its place
        ([0, 1, 2], 2),  # shorter: the last row draws, so it is computed again
        ([0, 1, 2, 3, 4, 5], 5),  # the same
        ([0, 1, 2, 3, 4, 5, 50, 51, 52], 8),
        ([0, 1, 2, 3, 4, 5, 50, 51], 7),
        ([0], 0),
        ([9], 0),
    ],
)
def test_how_much_of_a_prompt_is_new(prompt: list[int], first: int) -> None:
    g = generation(6, max_tokens=3)
    g.start(FIRST)
    drive(g, [50, 51, 52])
    g.ask(prompt, 5)
    assert g.carried and g.cached is None
    steps = g.due()
    assert g.cached == first
    assert [t for step in steps for t in step.tokens] == prompt[first:]
    assert steps[0].first == first and steps[-1].want is Want.TOKEN


def test_a_token_that_ended_the_answer_is_no_part_of_what_the_chain_holds() -> None:
    g = generation(4, max_tokens=5, end=(60,))
    g.start(FIRST)
    assert drive(g, [50, 60]) == [50]
    g.ask([0, 1, 2, 3, 50, 60, 9], 5)
    assert sent(g.due()) == [(5, (60, 9))]


def test_answers_to_steps_of_an_answer_that_was_left_are_passed_over() -> None:
    g = generation(10, max_tokens=5)
    g.start(FIRST)
    left = g.due()  # all three are in flight when the answer is left
    g.ask([*range(8), 70, 71], 5)
    assert g.due() == []  # the window is full of old Steps
    assert [take(g, answer(step, 66 if step.want is Want.TOKEN else None)) for step in left] == [None] * 3
    (step,) = g.due()
    assert (step.first, step.tokens, step.want) == (8, (70, 71), Want.TOKEN)
    assert take(g, answer(step, 5)) == 5
    assert g.known == [*range(8), 70, 71, 5]


def test_a_new_epoch_between_answers_sends_everything_again() -> None:
    g = generation(5, max_tokens=2)
    g.start(FIRST)
    drive(g, [50, 51])
    g.ask([*range(5), 50, 51, 7], 2)
    assert g.start(SECOND).epoch == SECOND.epoch
    assert not g.carried
    assert sent(g.due()) == [(0, (0, 1, 2, 3, 4, 50, 51, 7))]


def test_a_session_that_left_the_chain_begins_with_nothing_there() -> None:
    g = generation(5, max_tokens=2)
    g.start(FIRST)
    drive(g, [50, 51])
    assert g.leave() == Close(3, FIRST.epoch)
    assert g.leave() is None
    g.ask([*range(5), 50], 2)
    assert not g.carried
    g.session = 4
    assert g.start(FIRST).session == 4
    assert sent(g.due()) == [(0, (0, 1, 2, 3)), (4, (4, 50))]


def test_a_prompt_that_does_not_fit_leaves_the_session_as_it_was() -> None:
    g = generation(5, max_tokens=2)
    g.start(FIRST)
    drive(g, [50, 51])
    with pytest.raises(ContextError):
        g.ask([1] * 50, 2)
    g.ask([*range(5), 50, 9], 2)
    assert sent(g.due()) == [(6, (9,))]


# Transitions between epochs.


def rounds(g: Generation, count: int) -> None:
    """Answers that many Steps, those that want a token with 50, 51 …"""
    for token in range(50, 50 + count):
        step = g.due()[0]
        assert isinstance(step, Step)
        take(g, answer(step, token if step.want is Want.TOKEN else None))


def test_a_carried_answer_goes_on_where_it_was() -> None:
    g = generation(3, max_tokens=5)
    g.start(FIRST)
    rounds(g, 2)
    assert (g.in_flight, g.held) == (0, 4)
    assert g.carry(SECOND) is None
    assert (g.held, g.filling, g.carried) == (4, False, True)
    (step,) = g.due()
    assert step == Step(3, SECOND.epoch, 4, (51,), Want.TOKEN)
    assert g.leave() == Close(3, SECOND.epoch)


def test_a_prompt_is_carried_in_its_middle() -> None:
    g = generation(20)
    g.start(FIRST)
    for step in g.due():
        assert isinstance(step, Step)
        take(g, answer(step, None))
    assert g.held == 12
    g.carry(SECOND)
    assert sent(g.due()) == [(12, tuple(range(12, 20)))]


@pytest.mark.parametrize(
    ("results", "held"),
    [((), 0), ((4,), 4), ((2,), 2), ((4, 4), 8), ((6,), 6), ((4, 4, 4), 12), ((4, 4, 3), 11)],
)
def test_after_a_loss_only_positions_count_whose_results_have_arrived(
    results: tuple[int, ...], held: int
) -> None:
    g = generation(20)
    g.start(FIRST)
    g.due()
    first = 0
    for rows in results:
        take(g, Result(3, FIRST.epoch, first, rows, None))
        first += rows
    assert g.held == held


def test_the_token_that_was_on_its_way_is_drawn_again() -> None:
    g = generation(3, max_tokens=3)
    g.start(FIRST)
    rounds(g, 1)
    g.due()
    assert (g.held, g.in_flight) == (3, 1)
    g.carry(SECOND)
    (step,) = g.due()
    assert step == Step(3, SECOND.epoch, 3, (50,), Want.TOKEN)


def test_positions_of_a_prompt_that_was_replaced_are_not_held() -> None:
    """The chain holds the old prompt's rows until it has run those of the new one."""
    g = generation(12)
    g.start(FIRST)
    old = g.due()
    for step in old[:2]:
        assert isinstance(step, Step)
        take(g, answer(step, None))
    assert g.held == 8
    g.ask([*range(6), 90, 91, 92], 3)  # parts from the old one at 6
    assert g.held == 6
    g.due()
    take(g, Result(3, FIRST.epoch, 8, 4, 70))  # the old one's last rows, and a token that nobody wants
    assert g.held == 6
    g.ask([*range(3), 80], 3)
    assert g.held == 3
    g.due()
    take(g, Result(3, FIRST.epoch, 6, 3, 70))
    assert g.held == 3
    take(g, Result(3, FIRST.epoch, 3, 1, 71))
    assert g.held == 4 and g.known[-1] == 71


def test_a_session_between_answers_is_carried() -> None:
    g = generation(5, max_tokens=2)
    g.start(FIRST)
    drive(g, [50, 51])
    g.carry(SECOND)
    assert g.due() == [] and g.held == 6
    g.ask([*range(5), 50, 51, 7], 2)
    assert sent(g.due()) == [(6, (51, 7))]


def test_an_answer_that_begins_before_the_next_epoch_does_holds_what_it_shares() -> None:
    g = generation(5, max_tokens=2)
    g.start(FIRST)
    drive(g, [50, 51])
    g.ask([0, 1, 2, 9, 9], 2)
    g.carry(SECOND)
    assert sent(g.due()) == [(3, (9, 9))]


def parts(messages: list[Step | Refill]) -> list[tuple[int, int, tuple[int, int] | None]]:
    return [(m.first, len(m.tokens), m.part) for m in messages if isinstance(m, Step)]


def lost(prompt: int, fill: Fill, flow: Flow = SECOND) -> Generation:
    """An answer whose first token has arrived, in an epoch in which units have lost what they held."""
    g = generation(prompt)
    g.start(FIRST)
    while g.held < prompt:
        for step in g.due():
            assert isinstance(step, Step)
            take(g, answer(step, 77 if step.want is Want.TOKEN else None))
    assert g.carry(flow, fill) == Open(3, flow.epoch, 50)
    return g


def test_lost_units_are_filled_and_the_answer_goes_on_behind() -> None:
    g = lost(20, Fill(4), FIRST)
    assert (g.filling, g.held) == (True, 0)
    first = g.due()
    assert parts(first) == [(0, 4, (0, 4)), (4, 4, (0, 4)), (8, 4, (0, 4))]  # within the window
    assert all(isinstance(step, Step) and step.want is Want.NOTHING for step in first)
    assert take(g, Result(3, FIRST.epoch, 0, 8, None), fill=True) is None
    assert parts(g.due()) == [(12, 4, (0, 4)), (16, 4, (0, 4))]
    assert g.due() == [] and g.held == 0
    take(g, Result(3, FIRST.epoch, 8, 4, None), fill=True)
    assert g.due() == [Step(3, FIRST.epoch, 20, (77,), Want.TOKEN)]  # it goes the same way
    assert g.reads and not g.decodes and g.held == 0
    take(g, Result(3, FIRST.epoch, 12, 8, None), fill=True)
    assert (g.filling, g.held) == (False, 20)
    assert take(g, Result(3, FIRST.epoch, 20, 1, 78)) == 78
    assert g.due() == [Step(3, FIRST.epoch, 21, (78,), Want.TOKEN)]


def test_results_of_the_answer_may_arrive_before_those_of_the_rows_that_fill() -> None:
    """Two members send them."""
    g = lost(6, Fill(4))
    assert parts(g.due()) == [(0, 6, (0, 4)), (6, 1, None)]
    assert take(g, Result(3, SECOND.epoch, 6, 1, 78)) == 78
    assert (g.filling, g.held) == (True, 0)
    assert g.due() == [Step(3, SECOND.epoch, 7, (78,), Want.TOKEN)]
    with pytest.raises(RemoteProtocolError, match="was not due"):
        take(g, Result(3, SECOND.epoch, 0, 6, None))
    take(g, Result(3, SECOND.epoch, 0, 6, None), fill=True)
    assert (g.filling, g.held) == (False, 7)


@pytest.mark.parametrize("kept", [20, 25])
def test_kept_rows_are_sent_by_the_stage_that_has_them(kept: int) -> None:
    g = lost(20, Fill(4, enter=2, kept=kept))
    assert g.due() == [Refill(3, SECOND.epoch, 0, 20, 2, 4)]
    assert g.due() == []
    take(g, Result(3, SECOND.epoch, 0, 7, None), fill=True)
    assert g.due() == [] and g.in_flight == 1
    take(g, Result(3, SECOND.epoch, 7, 13, None), fill=True)
    assert g.due() == [Step(3, SECOND.epoch, 20, (77,), Want.TOKEN)]


def test_rows_that_were_not_kept_follow_the_kept_ones() -> None:
    g = lost(20, Fill(4, enter=2, kept=6))
    assert g.due() == [Refill(3, SECOND.epoch, 0, 6, 2, 4)]
    assert take(g, Result(3, SECOND.epoch, 0, 3, None), fill=True) is None
    assert g.due() == []  # Steps could overtake the rest
    take(g, Result(3, SECOND.epoch, 3, 3, None), fill=True)
    assert parts(g.due()) == [(6, 8, (0, 4)), (14, 6, (0, 4))]
    take(g, Result(3, SECOND.epoch, 6, 14, None), fill=True)
    assert parts(g.due()) == [(20, 1, None)]


def test_lost_units_of_a_session_that_waits_are_filled_with_its_next_answer() -> None:
    g = lost(6, Fill(4))
    g.stop()
    assert g.due() == [] and (g.filling, g.held) == (True, 0)
    g.ask([*range(5), 9, 9], 2)
    assert parts(g.due()) == [(0, 5, (0, 4)), (5, 2, None)]  # no more than the new prompt shares


def test_a_prompt_that_shares_nothing_needs_no_filling() -> None:
    g = lost(6, Fill(4))
    g.stop()
    g.ask([9, 9], 2)
    assert not g.filling
    assert g.due() == [Step(3, SECOND.epoch, 0, (9, 9), Want.TOKEN)]


def test_an_answer_that_is_replaced_while_lost_units_are_filled() -> None:
    g = lost(20, Fill(4))
    g.due()  # 16 rows are in flight
    g.ask([0, 1, 2, 80], 2)
    assert g.due() == [] and g.held == 0
    take(g, Result(3, SECOND.epoch, 0, 8, None), fill=True)
    assert sent(g.due()) == [(3, (80,))]
    take(g, Result(3, SECOND.epoch, 8, 8, None), fill=True)
    assert not g.filling and g.held == 3
    assert take(g, Result(3, SECOND.epoch, 3, 1, 70)) == 70


def test_an_answer_that_is_replaced_while_kept_rows_are_on_their_way_waits_for_them() -> None:
    g = lost(20, Fill(4, enter=2, kept=20))
    g.due()
    g.ask([0, 1, 2, 80], 2)
    assert g.due() == [] and g.filling
    take(g, Result(3, SECOND.epoch, 0, 20, None), fill=True)
    assert sent(g.due()) == [(3, (80,))]


def test_an_answer_that_ends_while_lost_units_are_filled_leaves_them_so() -> None:
    g = lost(20, Fill(4))
    g.due()
    g.stop()
    take(g, Result(3, SECOND.epoch, 0, 16, None), fill=True)
    assert g.due() == [] and g.in_flight == 0
    assert (g.filling, g.held) == (True, 0)


def test_results_of_filled_rows_that_were_not_due_are_the_nodes_fault() -> None:
    for wrong in (
        Result(3, SECOND.epoch, 0, 20, 7),
        Result(3, SECOND.epoch, 0, 21, None),
        Result(3, SECOND.epoch, 1, 3, None),
    ):
        g = lost(20, Fill(4, enter=2, kept=20))
        g.due()
        with pytest.raises(RemoteProtocolError, match="was not due"):
            take(g, wrong)


def test_a_session_that_begins_anew_fills_nothing() -> None:
    g = lost(6, Fill(4))
    g.due()
    g.start(FIRST)
    assert not g.filling
    assert [m.part for m in g.due() if isinstance(m, Step)] == [None, None]


def test_a_text_that_is_read_is_carried_as_far_as_its_results_have_arrived() -> None:
    g = Generation(3, Sampling(), 50, 100)
    g.read(list(range(20)), 0, Want.SCORES)
    g.start(FIRST)
    steps = [step for step in g.due() if isinstance(step, Step)]
    assert g.held == 0
    for step in steps[:2]:
        g.take(Result(3, FIRST.epoch, step.first, step.rows, None, scores=(-1.0,) * step.rows))
    assert g.held == 8
    assert g.carry(SECOND) is None
    assert [(step.first, step.want) for step in g.due() if isinstance(step, Step)] == [
        (8, Want.SCORES),
        (16, Want.SCORES),
    ]


PENALISED = Sampling(repetition_penalty=1.5, seed=1)


def told(messages: Sequence[object]) -> list[tuple[str, int, int, tuple[int, ...]]]:
    """What the last node is told: what, its number, and tokens from a position on; and for which Step."""
    found = list[tuple[str, int, int, tuple[int, ...]]]()
    for message in messages:
        match message:
            case SetSampling():
                found.append(("sampling", message.number, 0, ()))
            case Tokens():
                found.append(("tokens", message.number, message.first, message.tokens))
            case Step(told=number) if number:
                found.append(("step", number, message.first, message.tokens))
    return found


def test_the_last_node_is_told_what_it_penalises_and_in_a_new_epoch_again() -> None:
    g = Generation(3, PENALISED, 50, 100)
    g.ask([1, 2, 3, 4, 5], 9)
    g.start(FIRST)
    first, *rest = g.due()
    assert isinstance(first, Step) and first.told == 0  # nothing is drawn of it
    assert told(rest) == [
        ("sampling", 1, 0, ()), ("tokens", 2, 0, (1, 2, 3, 4, 5)), ("step", 2, 4, (5,)),
    ]  # fmt: skip
    take(g, Result(3, FIRST.epoch, 0, 5, 77))
    assert told(g.due()) == [("tokens", 3, 5, (77,)), ("step", 3, 5, (77,))]
    g.ask([1, 2, 9, 8], 9)  # while that Step is in flight
    assert told(g.due()) == [("tokens", 4, 2, (9, 8)), ("step", 4, 2, (9, 8))]
    take(g, Result(3, FIRST.epoch, 5, 1, 50))
    take(g, Result(3, FIRST.epoch, 2, 2, 60))
    assert g.carry(SECOND) is None
    assert told(g.due()) == [
        ("sampling", 1, 0, ()), ("tokens", 2, 0, (1, 2, 9, 8, 60)), ("step", 2, 4, (60,)),
    ]  # fmt: skip


def test_a_session_that_begins_with_positions_of_another_one_tells_their_tokens_too() -> None:
    g = Generation(3, PENALISED, 50, 100)
    g.ask([1, 2, 3, 4], 9)
    g.start(FIRST, source=1, positions=3)
    assert told(g.due()) == [
        ("sampling", 1, 0, ()), ("tokens", 2, 0, (1, 2, 3, 4)), ("step", 2, 3, (4,)),
    ]  # fmt: skip


def test_without_penalties_no_tokens_are_told() -> None:
    for sampling, expected in ((Sampling(), []), (Sampling(0.8), [("sampling", 1, 0, ())])):
        g = Generation(3, sampling, 50, 100)
        g.ask([1, 2, 3], 9)
        g.start(FIRST)
        assert [what for what in told(g.due()) if what[0] != "step"] == expected


def test_steps_have_the_tags_of_the_chunks_that_end_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tags, "CHUNK", 2)

    def of(prompt: list[int], flow: Flow = FIRST) -> list[int]:
        g = Generation(3, Sampling(), 50, 100)
        g.ask(prompt, 9)
        g.start(flow)
        steps = [step for step in g.due() if isinstance(step, Step)]
        assert [len(step.tags) for step in steps] == [
            (step.first + step.rows) // 2 - step.first // 2 for step in steps
        ]
        return [tag for step in steps for tag in step.tags]

    first, cut = of([1, 2, 3, 4, 5, 6, 7]), of([1, 2, 3, 4, 5, 6, 7], SECOND)
    assert first == cut and len(set(first)) == 3
    other = of([1, 2, 3, 9, 5, 6])
    assert other[0] == first[0] and not set(other[1:]) & set(first)  # a tag depends on all tokens before
    assert max(first).bit_length() > 32


def test_tags_are_those_of_the_tokens_that_are_known() -> None:
    known, again = list(range(200)), list[int]()
    g = Generation(3, Sampling(), 500, 1000)
    for prompt in (known, [*known[:100], 7, *known[101:]]):
        g.ask(prompt, 9)
        g.start(Flow(FIRST.epoch, 256, 9))
        (step,) = g.due()
        assert isinstance(step, Step)
        again.clear()
        tags.extend(again, prompt, len(prompt))
        assert list(step.tags) == again and len(again) == 3
