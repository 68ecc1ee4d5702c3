"""An answer as text: it grows with its tokens, and `Stream` gives it piece by piece."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from .answering import Settings, Stop, most_tokens
from .engine.errors import ShoalError
from .engine.generate import TextStream
from .engine.request_scheduler import Report
from .engine.tokenizer import Tokenizer
from .results import Completion, FinishReason, Timings, Usage

Item = int | Exception | None
"""What arrives of an answer: a token, its end, or the exception that has ended it (answering.Put)."""


class AnswerText:
    """An answer that grows: tokens in, text out."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        settings: Settings,
        report: Report,
    ) -> None:
        self.prompt, self.report = prompt, report
        self._most = min(most_tokens(prompt, settings), settings.context + 1 - len(prompt))
        self.finished = False
        self._stream = TextStream(tokenizer, settings.stops)
        self.tokens: list[int] = []
        self._texted = 0
        """How many of the tokens have become text."""
        self._pieces: list[str] = []
        self.cancelled = self._flushed = False
        self._start = self._first = self._last = time.perf_counter()

    def take(self, item: Item) -> str:
        """Takes a token, or the end; returns the text that has become final. Raises an exception."""
        if isinstance(item, Exception):
            self.finished = True
            raise item
        if item is None:
            self.finished = True
            return ""
        self.note(item)
        text = self._text()
        self._pieces.append(text)
        self.finished = self._stream.stopped
        return text

    def note(self, token: int) -> None:
        """Takes a token whose text nobody needs yet: `rest` has it. For an answer without stop strings, and
        quick enough for the engine's thread."""
        self._last = time.perf_counter()
        if not self.tokens:
            self._first = self._last
        self.tokens.append(token)

    def _text(self) -> str:
        """The text of the tokens that have none yet, as far as it is final."""
        text = "".join(map(self._stream.push, self.tokens[self._texted :]))
        self._texted = len(self.tokens)
        return text

    def rest(self) -> str:
        """The text that was held back or not asked for, once."""
        if self._flushed:
            return ""
        self._flushed = True
        text = self._text() + self._stream.flush()
        self._pieces.append(text)
        return text

    def cancel(self) -> None:
        """Ends the answer, unless it has ended."""
        if not self.finished:
            self.cancelled = self.finished = True

    def completion(self) -> Completion:
        """The answer so far."""
        reason: FinishReason = "stop"
        if self.cancelled:
            reason = "cancelled"
        elif not self._stream.stopped and len(self.tokens) >= self._most:
            reason = "length"
        return Completion(
            "".join(self._pieces),
            tuple(self.tokens),
            reason,
            Usage(len(self.prompt), len(self.tokens), self.report.cached or 0),
            Timings(self._first - self._start, self._last - self._start),
            None if self.report.count is None else tuple(self.report.found[: len(self.tokens)]),
        )


class _Items:
    """What arrives of a stream's answer. It does not refer to the stream, which ends when nobody does."""

    def __init__(self) -> None:
        self.queue = SimpleQueue[Item]()
        self.wake: Callable[[], object] = _nothing
        """Called in any thread when an item has arrived."""

    def put(self, item: Item) -> None:
        self.queue.put(item)
        self.wake()


class Stream:
    """The text of an answer, piece by piece; an iterator. Closing it, or leaving its `with` block, ends the
    answer and frees its state. `completion` is the answer so far, and the whole one after the end."""

    def __init__(self, begin: Callable[[Callable[[Item], None]], Stop], answer: AnswerText) -> None:
        self._items, self._process = _Items(), os.getpid()
        self._stop = begin(self._items.put)
        self._answer = answer

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        """The next piece of text. ContextError or another ShoalError: the answer cannot go on."""
        if self._process != os.getpid():
            raise ShoalError("this stream belongs to the parent process: ask again in this one")
        while not self._answer.finished:
            text = self._answer.take(self._items.queue.get())
            if self._answer.finished:
                self._stop(keep=True)
            if text:
                return text
        if text := self._answer.rest():
            return text
        raise StopIteration

    def close(self) -> None:
        """Ends the answer."""
        self._answer.cancel()
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        answer = getattr(self, "_answer", None)  # None: the answer could not be begun
        if answer is not None and not answer.finished:
            self.close()

    @property
    def completion(self) -> Completion:
        """The answer."""
        return self._answer.completion()


def _nothing() -> None:
    """Does nothing."""
