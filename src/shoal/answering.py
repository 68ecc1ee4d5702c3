"""Answers as text, with their times: tokens come from a session, and characters go to the caller piece by
piece.

A session is in this process (engine.generate) or on nodes (distributed). This module imports no event loop,
since an answer of this process needs none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol

from .engine.batch import Sampling
from .engine.batcher import Batcher, BatchSession, Report
from .engine.generate import TextStream, check_prompt
from .engine.stage import Stage
from .engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are generated. `max_tokens` None: until the context is full."""

    context: int
    sampling: Sampling
    max_tokens: int | None = None
    end: Collection[int] = ()
    stops: Sequence[str] = ()
    vocab: int | None = None
    """Size of the vocabulary. None: prompts are not checked for other token ids."""


@dataclass(slots=True)
class Answer:
    """An answer and its times, in seconds since `answer` was called."""

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    first_s: float = 0.0
    last_s: float = 0.0
    interrupted: bool = False

    @property
    def tokens_per_s(self) -> float | None:
        """Decode speed, without the first token. None: there are fewer than two tokens."""
        if len(self.tokens) < 2:
            return None
        return (len(self.tokens) - 1) / max(self.last_s - self.first_s, 1e-9)

    def summary(self) -> str:
        """The counts and times in one line."""
        speed = "" if self.tokens_per_s is None else f", {self.tokens_per_s:.1f} tokens/s"
        return (
            f"{self.prompt_tokens} tokens of prompt, first token after {self.first_s:.2f} s, "
            f"{len(self.tokens)} tokens{speed}"
        )


class Session(Protocol):
    """A source of tokens. Its sequence stays open from answer to answer, so that each answer computes only
    what its prompt does not share with the previous prompt and answer."""

    def answer(
        self, prompt: Sequence[int], *, max_tokens: int, end: Collection[int]
    ) -> Generator[int, None, None]:
        """Token ids that follow a prompt, as from engine.generate. Closing the generator ends the answer."""

    def close(self) -> None:
        """Frees the sequence's state."""


Put = Callable[[int | Exception | None], None]
"""Receives the tokens of an answer, then None, or the exception that has ended it, in any thread. It must not
block."""


class Engine(Protocol):
    """Answers, in this process or on nodes. Thread-safe."""

    def session(self, settings: Settings) -> Session:
        """A new session, with a sequence of its own."""

    def begin(
        self, prompt: Sequence[int], settings: Settings, put: Put, report: Report | None = None
    ) -> Callable[[], None]:
        """Begins an answer without waiting; the returned function ends it early, and waits for its end.
        Answers that were begun together are computed together. ContextError: the prompt does not fit.
        ShoalError: the engine does not give log-probabilities."""


class LocalEngine:
    """An engine in this process: a stage with all units of a model, whose answers run together."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self._batcher = stage, Batcher(stage)

    def session(self, settings: Settings) -> BatchSession:
        """See Engine."""
        return self._batcher.session(settings.sampling, context=settings.context)

    def begin(
        self, prompt: Sequence[int], settings: Settings, put: Put, report: Report | None = None
    ) -> Callable[[], None]:
        """See Engine."""
        return self._batcher.begin_alone(
            prompt,
            settings.sampling,
            put,
            context=settings.context,
            max_tokens=most_tokens(prompt, settings),
            end=settings.end,
            report=report,
        )

    def close(self) -> None:
        """Ends all answers. The stage stays open."""
        self._batcher.close()


def most_tokens(prompt: Sequence[int], settings: Settings) -> int:
    """The most tokens that an answer may have."""
    return settings.context - len(prompt) if settings.max_tokens is None else settings.max_tokens


def answer(
    session: Session,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    settings: Settings,
    show: Callable[[str], None] = lambda text: None,
    *,
    interruptible: bool = False,
) -> Answer:
    """The answer to a prompt; `show` is called with the text piece by piece. With `interruptible`,
    KeyboardInterrupt ends the answer, and what there is of it is returned. ContextError,
    UnsupportedModelError: as for check_prompt."""
    check_prompt(prompt, settings.context, settings.vocab)
    stream, made = TextStream(tokenizer, settings.stops), Answer(len(prompt))
    max_tokens, start = most_tokens(prompt, settings), time.perf_counter()

    def give(text: str) -> None:
        made.text += text
        if text:
            show(text)

    try:
        with closing(session.answer(prompt, max_tokens=max_tokens, end=settings.end)) as tokens:
            for token in tokens:
                made.last_s = time.perf_counter() - start
                if not made.tokens:
                    made.first_s = made.last_s
                made.tokens.append(token)
                give(stream.push(token))
                if stream.stopped:
                    break
    except KeyboardInterrupt:
        if not interruptible:
            raise
        made.interrupted = True
    give(stream.flush())
    return made
