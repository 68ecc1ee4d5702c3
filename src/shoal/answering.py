"""Answers as text: tokens drawn here or on nodes, given out as characters, and timed.

Used by `shoal run` and `shoal demo`; where the tokens come from is behind `Engine`. Imports no event loop: an
answer of this process needs none.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from .engine.batch import Sampling
from .engine.generate import TextStream, check_prompt, generate
from .engine.stage import Stage
from .engine.tokenizer import Tokenizer

T = TypeVar("T")


async def _go_on() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are made. `max_tokens` None: until the context is full."""

    context: int
    sampling: Sampling
    max_tokens: int | None = None
    end: Collection[int] = ()
    stops: Sequence[str] = ()
    vocab: int | None = None
    """Tokens that the model knows, if prompts are to be checked for others."""


@dataclass(slots=True)
class Answer:
    """One answer and its times, in seconds since the prompt was handed over."""

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    first_s: float = 0.0
    last_s: float = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """Decode speed: tokens after the first one; None when there are too few."""
        if len(self.tokens) < 2:
            return None
        return (len(self.tokens) - 1) / max(self.last_s - self.first_s, 1e-9)

    def summary(self) -> str:
        """One line for a person."""
        speed = "" if self.tokens_per_s is None else f", {self.tokens_per_s:.1f} tokens/s"
        return (
            f"{self.prompt_tokens} tokens of prompt, the first token after {self.first_s:.2f} s, "
            f"{len(self.tokens)} tokens{speed}"
        )


class Engine(Protocol):
    """Where tokens come from: this process, or nodes."""

    def answer(
        self, prompt: Sequence[int], settings: Settings, max_tokens: int
    ) -> AbstractAsyncContextManager[AsyncIterator[int]]: ...


class LocalEngine:
    """All units in this process. Within an event loop `pause`, called after each token, gives the others
    their turn."""

    def __init__(self, stage: Stage, pause: Callable[[], Awaitable[None]] = _go_on) -> None:
        self.stage, self._pause = stage, pause

    @asynccontextmanager
    async def answer(
        self, prompt: Sequence[int], settings: Settings, max_tokens: int
    ) -> AsyncIterator[AsyncIterator[int]]:
        """See Engine."""
        tokens = generate(
            self.stage,
            prompt,
            settings.sampling,
            max_tokens=max_tokens,
            end=settings.end,
            context=settings.context,
        )

        async def one_by_one() -> AsyncIterator[int]:
            for token in tokens:
                yield token
                await self._pause()

        try:
            yield one_by_one()
        finally:
            tokens.close()


async def answer(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    settings: Settings,
    show: Callable[[str], None] = lambda text: None,
) -> Answer:
    """The answer to a prompt; `show` gets the text piece by piece. ContextError, UnsupportedModelError: see
    check_prompt."""
    check_prompt(prompt, settings.context, settings.vocab)
    stream, made = TextStream(tokenizer, settings.stops), Answer(len(prompt))
    room = settings.context - len(prompt)
    max_tokens = room if settings.max_tokens is None else settings.max_tokens
    start = time.perf_counter()

    def give(text: str) -> None:
        made.text += text
        if text:
            show(text)

    async with engine.answer(prompt, settings, max_tokens) as tokens:
        async for token in tokens:
            made.last_s = time.perf_counter() - start
            if not made.tokens:
                made.first_s = made.last_s
            made.tokens.append(token)
            give(stream.push(token))
            if stream.stopped:
                break
    give(stream.flush())
    return made


def finish(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits, without an event loop. RuntimeError: it waited."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    work.close()
    raise RuntimeError("it waited for something: run it in an event loop")
