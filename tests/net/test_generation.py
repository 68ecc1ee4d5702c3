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
    return Generation(3, list(range(prompt)), Sampling(seed=1), max_tokens, end, context, 100)


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
        Generation(1, [1, 100], Sampling(), 5, (), 50, 100)
