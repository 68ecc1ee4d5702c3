"""Answers of an engine, awaited: tokens arrive in the engine's thread, text leaves in the task that asked.

What has arrived is taken all at once, so a client that reads slowly, or an event loop that is late, gets
fewer and longer pieces. The tokens of one step of the engine are taken in one turn of the loop, for all
answers: to wake the task of each would cost more than all else that is done for a token."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Generic, Self, TypeVar

import trio

from ..answer_text import AnswerText, Item
from ..answering import Engine, Settings, Stop
from ..engine.batch import Logprobs, ReadRequest, Result, Want
from ..engine.bursts import after_burst
from ..engine.generate import check_prompt
from ..engine.request_scheduler import Report
from ..engine.tokenizer import Tokenizer
from ..local.reconnecting import ReconnectingEngine
from ..readings import Readings
from ..results import Completion
from .limiter import Waiting

T = TypeVar("T")


def _nothing() -> None:
    """Does nothing."""


def never() -> bool:
    """False."""
    return False


FEW, PACE_SECONDS = 4, 0.01
"""While at most so many responses are sent, parts of one are so far apart: quick tokens share a part, whose
turn takes as long as that of one token. With more of them a step of the engine takes longer than this."""


class LoopWaker:
    """Wakes tasks of one event loop for items that other threads put. Putting is followed by a system call
    only if the loop has not been woken since, and at the end of a burst, so a step of many answers wakes the
    loop once."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._waiting = deque[Callable[[], None]]()
        self._called = False
        self.listeners = 0
        """Tasks that take items as they come."""

    def call_soon(self, wake: Callable[[], None]) -> None:
        """Lets the loop call `wake`; in any thread."""
        self._waiting.append(wake)
        if not self._called:
            self._called = True
            after_burst(self._wake)

    def _wake(self) -> None:
        with suppress(trio.RunFinishedError):  # nobody waits any more
            self._token.run_sync_soon(self._run)

    def _run(self) -> None:
        self._called = False  # before the rest, so that what is put from now on wakes it again
        while self._waiting:
            self._waiting.popleft()()


_waker: trio.lowlevel.RunVar[LoopWaker] = trio.lowlevel.RunVar("waker")


def _loop_waker() -> LoopWaker:
    """The waker of this event loop."""
    try:
        return _waker.get()
    except LookupError:
        waker = LoopWaker()
        _waker.set(waker)
        return waker


class Arrivals(Generic[T]):
    """Items that any thread puts, and one task takes."""

    def __init__(self) -> None:
        self._items = deque[T]()
        self._waker = _loop_waker()
        self._look: Callable[[], object] = _nothing
        self._last = False
        """Whether an item has arrived that nothing follows."""

    def put(self, item: T, *, last: bool) -> None:
        """Adds an item; in any thread. `last`: nothing follows it."""
        self._items.append(item)
        self._last |= last
        self._waker.call_soon(self._wake)

    def _wake(self) -> None:
        self._look()

    async def some(self) -> None:
        """Waits until there is an item."""
        if not self._items:
            await self._until(lambda: bool(self._items))

    def waiting(self) -> list[T]:
        """The items that nobody has taken."""
        return list(self._items)

    async def each(self, take: Callable[[list[T]], bool]) -> None:
        """Calls `take` with all items that have arrived, now and whenever there are more, until it returns
        False. Its exceptions are raised here. Where few tasks listen, items that come sooner than
        PACE_SECONDS after others wait for that time, unless nothing follows them."""
        failures: list[Exception] = []
        due, more = -math.inf, True

        def taken() -> bool:
            nonlocal due, more
            if not self._items:
                return False
            now = trio.current_time()
            if now < due and not self._last and self._waker.listeners <= FEW:
                scope.deadline = due
                return False
            due, self._last = now + PACE_SECONDS, False
            try:
                more = take([self._items.popleft() for _ in range(len(self._items))])
            except Exception as error:
                failures.append(error)
            return not more or bool(failures)

        self._waker.listeners += 1
        try:
            while more and not failures:
                with trio.CancelScope() as scope:  # until what waits is due
                    await self._until(taken)
        finally:
            self._waker.listeners -= 1
        if failures:
            raise failures.pop()

    async def _until(self, look: Callable[[], bool]) -> None:
        """Calls `look` now and whenever there is news, until it returns True."""
        ended = trio.Event()

        def again() -> None:
            if not ended.is_set() and look():
                ended.set()

        self._look = again
        try:
            again()
            await ended.wait()
        finally:
            self._look = _nothing


@dataclass(frozen=True, slots=True)
class Question:
    """What one answer is asked for. `report` as in engine.request_scheduler.Report.count."""

    prompt: Sequence[int]
    settings: Settings
    report: int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of answer number `index`: text that has become final, and the tokens that have arrived. `made`:
    the whole answer, in its last piece."""

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    made: Completion | None


class Answers:
    """Answers to questions, computed together. Leaving the block ends those that have not ended."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, questions: Sequence[Question]) -> None:
        """ContextError: a prompt is empty or does not fit."""
        for question in questions:
            check_prompt(question.prompt, question.settings.context, question.settings.vocab)
        self._engine, self._tokenizer, self._questions = engine, tokenizer, questions
        self._left = len(questions)
        """Answers that have not ended."""
        self._answers: list[AnswerText] = []
        self._arrivals = Arrivals[tuple[int, Item]]()
        self._stops: list[Stop] = []

    async def __aenter__(self) -> Self:
        try:
            await begun(self._engine, self._begin)
        except BaseException:
            self._stop()
            raise
        return self

    def _begin(self) -> None:
        for i, question in enumerate(self._questions):
            put: Callable[[Item], None] = partial(self._put, i)
            report = Report(question.report)
            answer = AnswerText(self._tokenizer, question.prompt, question.settings, report)
            self._answers.append(answer)
            self._stops.append(self._engine.begin(question.prompt, question.settings, put, answer.report))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._stop()

    def _put(self, i: int, item: Item) -> None:
        self._arrivals.put((i, item), last=not isinstance(item, int))

    def _stop(self) -> None:
        while self._stops:  # each refers to an answer, and that to this object: none may stay
            self._stops.pop()(wait=False)

    async def arrived(self) -> None:
        """Waits for the first token, or the end. Raises what has ended an answer before its first token."""
        await self._arrivals.some()
        first = dict(reversed(self._arrivals.waiting()))  # the first item of each answer
        for item in first.values():
            if isinstance(item, Exception):
                raise item

    async def each(self, take: Callable[[Piece], object], full: Callable[[], bool] = never) -> bool:
        """Calls `take` with the parts of all answers, as they come, until all have ended, or until `full()`:
        then it returns False, and may be called again. `take` must be quick. ShoalError and others: an answer
        cannot go on."""
        await self._arrivals.each(partial(self._give, take, full))
        return not self._left

    def _give(
        self, take: Callable[[Piece], object], full: Callable[[], bool], arrived: Sequence[tuple[int, Item]]
    ) -> bool:
        """Makes pieces of what has arrived; returns whether more may."""
        by_answer: dict[int, list[Item]] = {}
        for i, item in arrived:
            by_answer.setdefault(i, []).append(item)
        for i, items in by_answer.items():
            if not self._answers[i].finished:
                piece = self._piece(i, items)
                self._left -= piece.made is not None
                take(piece)
        return bool(self._left) and not full()

    def _piece(self, i: int, items: Sequence[Item]) -> Piece:
        answer = self._answers[i]
        before = len(answer.tokens)
        text = ""
        for item in items:
            text += answer.take(item)
            if answer.finished:
                if item is not None:  # a stop string
                    self._stops[i](wait=False, keep=True)
                text += answer.rest()
                break
        made = answer.completion() if answer.finished else None
        tokens = tuple(answer.tokens[before:])
        found = (
            () if answer.report.count is None else tuple(answer.report.found[before : before + len(tokens)])
        )
        return Piece(i, text, tokens, found, made)


async def begun(engine: Engine, begin: Callable[[], None]) -> None:
    """Calls what begins something on an engine, in another thread if that may wait: for a connection to a
    head."""
    if isinstance(engine, ReconnectingEngine):
        await trio.to_thread.run_sync(begin)
    else:
        begin()


async def read(
    engine: Engine,
    texts: Readings,
    want: Want,
    context: int,
    each: Callable[[list[Result]], T],
    waiting: Waiting,
    report: int | None = None,
) -> list[T]:
    """What `each` makes of the results of a text, for all texts, which are read together. See Batcher.read.
    The first result is awaited by `waiting`. A task that is cancelled ends it."""
    arrivals = Arrivals[tuple[int, Result | Exception | None]]()
    parts: list[list[Result]] = [[] for _ in texts]
    found: dict[int, T] = {}
    stops: list[Stop] = []

    def put(i: int, item: Result | Exception | None) -> None:
        arrivals.put((i, item), last=not isinstance(item, Result))

    def begin() -> None:
        for i, (tokens, first) in enumerate(texts):
            stops.append(engine.read(ReadRequest(tokens, first, want, context, report), partial(put, i)))

    def take(arrived: list[tuple[int, Result | Exception | None]]) -> bool:
        for i, item in arrived:
            if isinstance(item, Exception):
                raise item
            if item is None:
                found[i] = each(parts[i])
                parts[i] = []  # rows of many texts would fill the memory
            else:
                parts[i].append(item)
        return len(found) < len(texts)

    try:
        await begun(engine, begin)
        if texts:
            await waiting(arrivals.some)
            await arrivals.each(take)
    finally:
        for stop in stops:
            stop(wait=False)
    return [found[i] for i in range(len(texts))]
