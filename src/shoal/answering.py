"""What answers: an engine in this process, or on nodes (nodes.py). Tokens in, tokens out; `llm` makes text
of them.

This module imports no event loop, since an answer of this process needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from .engine.batch import ReadRequest, Sampling
from .engine.batcher import Batcher, BatchSession, PutResult
from .engine.request_scheduler import Report
from .engine.sampler import Allow
from .engine.stage import Stage


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
    allow: Allow | None = None
    """See engine.sampler.Allow."""


class Session(Protocol):
    """A source of tokens. Its sequence stays open from answer to answer, so that each answer computes only
    what its prompt does not share with the previous prompt and answer."""

    def answer(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        end: Collection[int],
        report: Report | None = None,
    ) -> Generator[int, None, None]:
        """Token ids that follow a prompt, as from engine.generate. Closing the generator ends the answer."""

    def stop(self) -> None:
        """Ends the answer under way, if there is one, in any thread. Its generator ends."""

    def close(self) -> None:
        """Frees the sequence's state."""


Put = Callable[[int | Exception | None], None]
"""Receives the tokens of an answer, then None, or the exception that has ended it, in any thread. It must not
block."""


class Stop(Protocol):
    """Ends an answer early."""

    def __call__(self, *, wait: bool = True, keep: bool = False) -> None:
        """Waits for the answer's end, when its state has been freed, unless told not to. With `keep` the
        state stays for later requests, as that of a complete answer."""


class Engine(Protocol):
    """Answers, in this process or on nodes. Thread-safe."""

    def session(self, settings: Settings) -> Session:
        """A new session, with a sequence of its own."""

    def begin(
        self, prompt: Sequence[int], settings: Settings, put: Put, report: Report | None = None
    ) -> Stop:
        """Begins an answer without waiting; the returned function ends it early. Answers that were begun
        together are computed together. ContextError: the prompt does not fit."""

    def read(self, request: ReadRequest, put: PutResult) -> Stop:
        """Begins to read a text, together with answers and other texts: see Batcher.read."""


class LocalEngine:
    """An engine in this process: a stage with all units of a model, whose answers run together."""

    def __init__(self, stage: Stage, *, share_prefixes: bool = True) -> None:
        self.stage, self._batcher = stage, Batcher(stage, share_prefixes=share_prefixes)

    def session(self, settings: Settings) -> BatchSession:
        """See Engine."""
        return self._batcher.session(settings.sampling, context=settings.context, allow=settings.allow)

    def begin(
        self, prompt: Sequence[int], settings: Settings, put: Put, report: Report | None = None
    ) -> Stop:
        """See Engine."""
        return self._batcher.begin_alone(
            prompt,
            settings.sampling,
            put,
            context=settings.context,
            max_tokens=most_tokens(prompt, settings),
            end=settings.end,
            report=report,
            allow=settings.allow,
        )

    def read(self, request: ReadRequest, put: PutResult) -> Stop:
        """See Engine."""
        return self._batcher.read(request, put)

    def close(self) -> None:
        """Ends all answers. The stage stays open."""
        self._batcher.close()


def most_tokens(prompt: Sequence[int], settings: Settings) -> int:
    """The most tokens that an answer may have."""
    return settings.context - len(prompt) if settings.max_tokens is None else settings.max_tokens


def stop_all(stops: Sequence[Stop]) -> None:
    """Ends answers together, so that a call which computes nothing else ends at once."""
    for stop in stops:
        stop(wait=False)
    for stop in stops:
        stop()
