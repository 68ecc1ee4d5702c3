"""Answers as text: tokens drawn here or on nodes, given out as characters, and timed.

Used by `shoal run` and `shoal demo`. Where tokens come from is a `Session`: of this process
(engine.generate), or of nodes (distributed). Imports no event loop: an answer of this process needs none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol

from .engine.batch import Sampling
from .engine.generate import Session as LocalSession
from .engine.generate import TextStream, check_prompt
from .engine.stage import Stage
from .engine.tokenizer import Tokenizer


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
    interrupted: bool = False

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


class Session(Protocol):
    """Where tokens come from; its sequence stays open from answer to answer, so that each computes only what
    its prompt does not share with the prompt and answer before."""

    def answer(
        self, prompt: Sequence[int], *, max_tokens: int, end: Collection[int]
    ) -> Generator[int, None, None]:
        """Token ids that follow a prompt, as engine.generate gives them; closing it ends the answer."""

    def close(self) -> None:
        """Frees the sequence's state."""


class Engine(Protocol):
    """What opens sessions: this process, or nodes."""

    def session(self, settings: Settings) -> Session:
        """A sequence of its own."""


class LocalEngine:
    """A stage of this process that holds all units of a model, as Engine. It opens one session at a time."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def session(self, settings: Settings) -> LocalSession:
        """See Engine."""
        return LocalSession(self.stage, settings.sampling, context=settings.context)


def answer(
    session: Session,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    settings: Settings,
    show: Callable[[str], None] = lambda text: None,
    *,
    interruptible: bool = False,
) -> Answer:
    """The answer to a prompt; `show` gets the text piece by piece. With `interruptible`, KeyboardInterrupt
    ends the answer, of which the part so far is returned. ContextError, UnsupportedModelError: see
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
