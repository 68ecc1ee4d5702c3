"""Answers that are computed together have the tokens of answers alone, whatever happens to the others."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import SimpleQueue

import pytest
from tests.patience import LIMIT

from shoal.engine.batch import Result, Run, Sampling
from shoal.engine.batcher import Batcher
from shoal.engine.bursts import after_burst, burst
from shoal.engine.errors import ContextError, OperatingSystemError
from shoal.engine.generate import generate
from shoal.engine.kv_page import page_bytes
from shoal.engine.model_directory import Model
from shoal.engine.request_scheduler import BESIDE_ROWS
from shoal.engine.stage import Stage, StageOptions

LIVELY = Sampling(temperature=1.5, top_p=0.95, repetition_penalty=1.3, seed=11)


@pytest.fixture
def stage(tiny_int8: Model) -> Iterator[Stage]:
    with Stage(tiny_int8, 0, tiny_int8.n_units, StageOptions(max_rows=24, max_wanted=8)) as opened:
        yield opened


class Watched:
    """The batches of a stage. While `gate` is not set, no call begins."""

    def __init__(self, stage: Stage) -> None:
        self.batches: list[list[Run]] = []
        self.gate, self.begun = threading.Event(), threading.Event()
        self.gate.set()
        self.before: Callable[[], object] = lambda: None
        self._run = stage.run
        stage.run = self.run  # type: ignore[method-assign]

    def run(self, batch: list[Run]) -> list[Result]:
        self.begun.set()
        self.before()
        assert self.gate.wait(20)
        self.batches.append(list(batch))
        return self._run(batch)


def alone(model: Model, prompt: list[int], sampling: Sampling, tokens: int) -> list[int]:
    with Stage(model, 0, model.n_units, StageOptions(threads=1)) as stage:
        return list(generate(stage, prompt, sampling, max_tokens=tokens, end=()))


def prompts(count: int) -> list[list[int]]:
    return [[(7 * i + j) % 90 + 1 for j in range(3 + 5 * i)] for i in range(count)]


class Ask:
    """An answer that was begun."""

    def __init__(
        self,
        batcher: Batcher,
        prompt: list[int],
        sampling: Sampling = LIVELY,
        tokens: int = 12,
        *,
        context: int = 400,
    ) -> None:
        self.items: SimpleQueue[int | Exception | None] = SimpleQueue()
        self.stop = batcher.begin_alone(
            prompt, sampling, self.items.put, context=context, max_tokens=tokens, end=()
        )

    def tokens(self) -> list[int]:
        found = []
        while isinstance(item := self.items.get(timeout=LIMIT), int):
            found.append(item)
        if item is not None:
            raise item
        return found


def test_many_answers_share_calls_and_have_their_own_tokens(stage: Stage, tiny_int8: Model) -> None:
    watched = Watched(stage)
    watched.gate.clear()
    with Batcher(stage) as batcher:
        asked = [Ask(batcher, prompt) for prompt in prompts(12)]  # more than the eight places
        watched.gate.set()
        found = [ask.tokens() for ask in asked]
    assert found == [alone(tiny_int8, prompt, LIVELY, 12) for prompt in prompts(12)]
    assert max(len(batch) for batch in watched.batches) == 8
    assert len(watched.batches) < 12 * 12 / 3
    assert stage.kv_bytes == 0


def test_rows_of_prompts_beside_answers_are_bounded(tiny_int8: Model) -> None:
    with Stage(tiny_int8, 0, tiny_int8.n_units) as stage, Batcher(stage) as batcher:
        watched = Watched(stage)
        later: list[Ask] = []
        watched.before = lambda: later or later.append(Ask(batcher, [5] * 300, tokens=2))  # type: ignore[func-returns-value]
        first = Ask(batcher, [1, 2, 3], tokens=40)
        first.tokens()
        later[0].tokens()
    beside = [
        sum(len(run.tokens) for run in batch if len(run.tokens) > 1)
        for batch in watched.batches
        if any(len(run.tokens) == 1 for run in batch)
    ]
    assert max(beside) == BESIDE_ROWS


def test_an_answer_that_is_stopped_frees_its_pages_and_leaves_the_others(
    stage: Stage, tiny_int8: Model
) -> None:
    with Batcher(stage, share_prefixes=False) as batcher:
        kept, ended = (Ask(batcher, prompt, tokens=60) for prompt in prompts(2))
        assert isinstance(ended.items.get(timeout=LIMIT), int)
        ended.stop()
        ended.stop()
        assert kept.tokens() == alone(tiny_int8, prompts(1)[0], LIVELY, 60)
        assert stage.kv_bytes == 0
        assert Ask(batcher, [3], tokens=2).tokens() == alone(tiny_int8, [3], LIVELY, 2)


def test_stopping_an_answer_that_waits(stage: Stage) -> None:
    watched = Watched(stage)
    with Batcher(stage, slots=1) as batcher:
        watched.gate.clear()
        first = Ask(batcher, [1, 2], tokens=3)
        assert watched.begun.wait(20)
        second = Ask(batcher, [1, 2], tokens=3)
        stopping = threading.Thread(target=second.stop)
        stopping.start()
        watched.gate.set()
        stopping.join(20)
        assert not stopping.is_alive()
        assert second.tokens() == []
        assert len(first.tokens()) == 3


def test_a_bad_answer_fails_alone(stage: Stage, tiny_int8: Model) -> None:
    watched = Watched(stage)
    with Batcher(stage) as batcher:
        watched.gate.clear()
        good, bad = Ask(batcher, [1, 2, 3]), Ask(batcher, [10**6])
        watched.gate.set()
        with pytest.raises(ValueError, match="a token id is not in"):
            bad.tokens()
        assert good.tokens() == alone(tiny_int8, [1, 2, 3], LIVELY, 12)
        with pytest.raises(ContextError, match="empty"):
            Ask(batcher, [])
        with pytest.raises(ContextError, match="context of 9999 tokens"):
            list(batcher.session(context=9999).answer([1], max_tokens=2, end=()))
        assert good.items.empty()


@pytest.mark.parametrize("error", [ValueError("no such word"), SystemExit(2)])
def test_what_allow_raises_ends_its_answer_alone(
    stage: Stage, tiny_int8: Model, error: BaseException
) -> None:
    def allow(answer: Sequence[int]) -> None:
        raise error

    with Batcher(stage) as batcher:
        good = Ask(batcher, [1, 2, 3])
        items: SimpleQueue[int | Exception | None] = SimpleQueue()
        batcher.begin_alone([4], LIVELY, items.put, context=400, max_tokens=3, end=(), allow=allow)
        told = items.get(timeout=LIMIT)
        assert isinstance(told, Exception) and error in (told, told.__cause__)
        assert good.tokens() == alone(tiny_int8, [1, 2, 3], LIVELY, 12)


def test_an_answer_that_is_set_aside_for_another_one_that_fails_goes_on(
    stage: Stage, tiny_int8: Model
) -> None:
    """Of three answers in a call, the first is at fault, and alone the second has no room."""
    watched = Watched(stage)
    watched.gate.clear()
    failures = [ValueError("a run does not fit"), ValueError("at fault"), ContextError("no room")]

    def fail() -> None:
        if watched.gate.is_set() and failures:
            raise failures.pop(0)

    with Batcher(stage, share_prefixes=False) as batcher:
        Ask(batcher, [9], tokens=1)  # while its call waits, the others arrive
        assert watched.begun.wait(20)
        first, *others = [Ask(batcher, prompt) for prompt in ([1, 2], [3, 4], [5, 6])]
        watched.before = fail
        watched.gate.set()
        with pytest.raises(ValueError, match="at fault"):
            first.tokens()
        assert [ask.tokens() for ask in others] == [
            alone(tiny_int8, prompt, LIVELY, 12) for prompt in ([3, 4], [5, 6])
        ]
    assert not failures


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_answers_beyond_the_cap_of_keys_and_values_are_set_aside(tiny_int8: Model, pages: int) -> None:
    states = [state for unit in tiny_int8.program.units for state in unit.states]
    # The pages of later positions are cut from huge pages, whose rest counts.
    limit = pages * sum(page_bytes(state, tiny_int8.kv_dtype) for state in states)
    options = StageOptions(max_rows=64, kv_bytes=limit)
    with Stage(tiny_int8, 0, tiny_int8.n_units, options) as stage, Batcher(stage) as batcher:
        session = batcher.session(LIVELY, context=300)
        first = list(session.answer([1, 2, 3], max_tokens=4, end=()))  # idle from here on
        asked = [Ask(batcher, prompt, tokens=30) for prompt in prompts(5)]
        found = [ask.tokens() for ask in asked]
        again = list(session.answer([1, 2, 3, *first, 4], max_tokens=4, end=()))
        session.close()
        if pages == 1:
            with pytest.raises(ContextError, match="promised"):
                Ask(batcher, [5] * 257, tokens=2).tokens()
    assert found == [alone(tiny_int8, prompt, LIVELY, 30) for prompt in prompts(5)]
    assert again == alone(tiny_int8, [1, 2, 3, *first, 4], LIVELY, 4)


def test_a_session_computes_what_is_new(stage: Stage, tiny_int8: Model) -> None:
    watched = Watched(stage)
    with Batcher(stage) as batcher:
        session = batcher.session(LIVELY)
        first = list(session.answer([*range(1, 20)], max_tokens=5, end=()))
        watched.batches.clear()
        prompt = [*range(1, 20), *first, 7, 8]
        second = list(session.answer(prompt, max_tokens=5, end=()))
        assert second == alone(tiny_int8, prompt, LIVELY, 5)
        assert sum(len(run.tokens) for batch in watched.batches for run in batch) == 3 + 4
        watched.gate.clear()
        tokens = session.answer(prompt, max_tokens=50, end=())
        with pytest.raises(ValueError, match="one answer at a time"):
            session.answer(prompt, max_tokens=5, end=())
        watched.gate.set()
        next(tokens)
        tokens.close()
        assert list(session.answer(prompt, max_tokens=5, end=())) == second
        session.close()
    assert stage.kv_bytes == 0


def test_answers_end_when_the_batcher_is_closed(stage: Stage) -> None:
    batcher = Batcher(stage)
    asked = [Ask(batcher, prompt, tokens=300) for prompt in prompts(3)]
    assert isinstance(asked[0].items.get(timeout=LIMIT), int)
    batcher.close()
    for ask in asked:
        with pytest.raises(ValueError, match="has been closed"):
            ask.tokens()
        ask.stop()
    with pytest.raises(ValueError, match="has been closed"):
        Ask(batcher, [1])
    assert stage.kv_bytes == 0


def test_a_stage_that_fails_ends_all_answers_with_its_error(stage: Stage) -> None:
    def failing(batch: list[Run]) -> list[Result]:
        raise RuntimeError("no such thing")

    stage.run = failing  # type: ignore[method-assign,assignment]
    with Batcher(stage) as batcher, pytest.raises(RuntimeError, match="no such thing"):
        Ask(batcher, [1, 2]).tokens()


def test_an_answer_without_memory_ends_alone(stage: Stage, tiny_int8: Model) -> None:
    """The system has memory for two sequences at a time, and for one of the prompts never."""
    expected, run = alone(tiny_int8, [1, 2, 3], LIVELY, 6), stage.run

    def short(batch: list[Run]) -> list[Result]:
        if len(batch) > 2 or any(list(run.tokens) == [1, 9] for run in batch):
            raise MemoryError
        return run(batch)

    stage.run = short  # type: ignore[method-assign,assignment]
    with Batcher(stage, share_prefixes=False) as batcher:
        asked = [Ask(batcher, [1, 2, 3], LIVELY, tokens=6) for _ in range(4)]
        hopeless = Ask(batcher, [1, 9], LIVELY, tokens=6)
        assert [ask.tokens() for ask in asked] == [expected] * 4
        with pytest.raises(OperatingSystemError, match="Cannot allocate memory"):
            hopeless.tokens()
        assert Ask(batcher, [1, 2, 3], LIVELY, tokens=6).tokens() == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_asks_anew(stage: Stage, tiny_int8: Model) -> None:
    expected = alone(tiny_int8, [1, 2, 3], LIVELY, 6)
    with Batcher(stage) as batcher:
        under_way = batcher.session(LIVELY).answer([1, 2, 3], max_tokens=200, end=())
        assert next(under_way) == expected[0]
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                right = Ask(batcher, [1, 2, 3], tokens=6).tokens() == expected
                try:
                    next(under_way)
                except RuntimeError as error:
                    code = 0 if right and "parent process" in str(error) else 2
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        under_way.close()


def test_a_stage_without_all_units_is_refused(tiny_int8: Model) -> None:
    with (
        Stage(tiny_int8, 0, 2) as stage,
        pytest.raises(ValueError, match="an answer needs all"),
    ):
        Batcher(stage)


def test_the_results_of_a_call_are_a_burst(stage: Stage) -> None:
    """Who is woken for one of them is woken when all are there."""
    log, run, ended = list[str](), stage.run, threading.Semaphore(0)

    def noted(batch: list[Run]) -> list[Result]:
        log.append("call")
        return run(batch)

    def put(item: int | Exception | None) -> None:
        log.append("item")
        after_burst(lambda: log.append("woken"))
        if item is None:
            ended.release()

    stage.run = noted  # type: ignore[method-assign,assignment]
    with Batcher(stage) as batcher:
        for prompt in prompts(3):
            batcher.begin_alone(prompt, LIVELY, put, context=400, max_tokens=9, end=())
        assert all(ended.acquire(timeout=LIMIT) for _ in range(3))
    calls = [call.split() for call in " ".join(log).split("call")]
    assert max(call.count("item") for call in calls) >= 3
    assert all(call == sorted(call) for call in calls)
    with suppress(ValueError), burst():
        after_burst(lambda: log.append("late"))
        raise ValueError
    assert log[-1] == "late"
