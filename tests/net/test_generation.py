"""An answer's bookkeeping: what is sent, what is due back, where it ends, and how it begins again."""

from dataclasses import replace

import pytest

from shoal.engine.batch import Sampling, Want
from shoal.engine.errors import ContextError
from shoal.net.errors import RemoteProtocolError
from shoal.net.generation import Flow, Generation
from shoal.net.messages import Close, Epoch, Open, Result, Step

FIRST, SECOND = Flow(Epoch(9, 1), 4, 3), Flow(Epoch(9, 2), 8, 2)


def generation(
    prompt: int = 10, max_tokens: int = 5, end: tuple[int, ...] = (), context: int = 50
) -> Generation:
    g = Generation(3, Sampling(seed=1), context, 100)
    g.ask(list(range(prompt)), max_tokens, end)
    return g


def spans(steps: list[Step]) -> list[tuple[int, int, bool]]:
    return [(step.first, len(step.tokens), step.want is Want.TOKEN) for step in steps]


def answer(step: Step, token: int | None) -> Result:
    return Result(step.session, step.epoch, step.first, len(step.tokens), token)


def test_a_prompt_goes_in_chunks_within_the_window_and_the_last_wants_a_token() -> None:
    g = generation(14)
    assert g.start(FIRST) == Open(3, FIRST.epoch, Sampling(seed=1), 50)
    first = g.due()
    assert spans(first) == [(0, 4, False), (4, 4, False), (8, 4, False)]
    assert g.due() == []
    assert g.take(answer(first[0], None)) is None
    (last,) = g.due()
    assert (spans([last]), last.tokens) == ([(12, 2, True)], (12, 13))
    for step in first[1:]:
        assert g.take(answer(step, None)) is None
    assert g.due() == []
    assert g.take(answer(last, 77)) == 77
    (decode,) = g.due()
    assert (decode.first, decode.tokens, decode.want) == (14, (77,), Want.TOKEN)


def test_a_stage_may_divide_a_step_and_each_part_is_answered() -> None:
    g = generation(6)
    g.start(FIRST)
    first, last = g.due()
    assert g.take(replace(answer(first, None), rows=1)) is None
    assert g.due() == []
    for wrong in (
        answer(first, None),
        Result(3, FIRST.epoch, 1, 6, None),
        Result(3, FIRST.epoch, 2, 2, None),
        Result(3, FIRST.epoch, 1, 2, 7),
    ):
        with pytest.raises(RemoteProtocolError, match="was not due"):
            g.take(wrong)
    assert g.take(Result(3, FIRST.epoch, 1, 3, None)) is None
    assert g.take(Result(3, FIRST.epoch, 4, 1, None)) is None
    with pytest.raises(RemoteProtocolError, match="was not due"):
        g.take(Result(3, FIRST.epoch, 5, 1, None))
    assert g.take(Result(3, FIRST.epoch, 5, 1, 77)) == 77
    assert last.want is Want.TOKEN


def test_a_stage_may_join_rows_that_follow_each_other() -> None:
    g = generation(12)
    g.start(FIRST)
    assert spans(g.due()) == [(0, 4, False), (4, 4, False), (8, 4, True)]
    assert g.take(Result(3, FIRST.epoch, 0, 6, None)) is None
    for wrong in (
        Result(3, FIRST.epoch, 6, 6, None),  # with all rows there is a token
        Result(3, FIRST.epoch, 6, 5, 7),  # and without all there is none
        Result(3, FIRST.epoch, 6, 7, 7),
        Result(3, FIRST.epoch, 4, 2, None),
    ):
        with pytest.raises(RemoteProtocolError, match="was not due"):
            g.take(wrong)
    assert g.take(Result(3, FIRST.epoch, 6, 6, 7)) == 7
    assert spans(g.due()) == [(12, 1, True)]


def test_rows_of_an_answer_that_was_left_may_be_joined_with_those_of_the_next() -> None:
    g = generation(8)
    g.start(FIRST)
    g.due()
    g.ask([*range(8), 50, 51], 3)
    assert spans(g.due()) == [(8, 2, True)]
    assert g.take(Result(3, FIRST.epoch, 0, 8, 9)) is None
    assert g.take(Result(3, FIRST.epoch, 8, 2, 11)) == 11


def test_parts_of_an_answer_that_was_left_are_passed_over() -> None:
    g = generation(8)
    g.start(FIRST)
    old = g.due()
    g.ask([5, 6], 3)
    (new,) = g.due()
    assert g.take(replace(answer(old[0], None), rows=3)) is None
    assert g.take(Result(3, FIRST.epoch, 3, 1, None)) is None
    assert g.take(answer(old[1], 9)) is None
    assert g.take(answer(new, 11)) == 11


def drive(g: Generation, tokens: list[int]) -> list[int]:
    """Answers whatever is due with the tokens in turn; returns those that became part of the answer."""
    got, waiting = [], list[Step]()
    while not g.finished:
        waiting += g.due()
        step = waiting.pop(0)
        token = g.take(answer(step, tokens.pop(0) if step.want is Want.TOKEN else None))
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
        token = g.take(answer(step, next(drawn) if step.want is Want.TOKEN else None))
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
            g.take(replace(good, **change))  # type: ignore[arg-type]
    g.start(FIRST)
    with pytest.raises(RemoteProtocolError):
        g.take(good)


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
    assert g.carried
    steps = g.due()
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
    assert [g.take(answer(step, 66 if step.want is Want.TOKEN else None)) for step in left] == [None] * 3
    (step,) = g.due()
    assert (step.first, step.tokens, step.want) == (8, (70, 71), Want.TOKEN)
    assert g.take(answer(step, 5)) == 5
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
