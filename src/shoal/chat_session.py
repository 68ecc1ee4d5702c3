"""A chat whose keys and values are kept from turn to turn."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .answer_text import AnswerText
from .answering import Settings, most_tokens
from .engine.chat import Message
from .engine.generate import check_prompt
from .engine.request_scheduler import Report
from .results import Completion

if TYPE_CHECKING:
    from .llm import LLM


class ChatSession:
    """A chat: `send` adds a message and returns the answer, which joins the chat. Closing it, or leaving its
    `with` block, frees its keys and values."""

    def __init__(self, llm: LLM, system: str | None, settings: Settings, raw: bool = False) -> None:
        self.messages: list[Message] = [] if system is None else [Message("system", system)]
        self._llm, self._settings, self._raw = llm, settings, raw
        self._session = llm._engine.session(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    @property
    def context(self) -> int:
        """The context length in tokens: the most that the chat and its next answer have together."""
        return self._settings.context

    def close(self) -> None:
        """Frees the chat's keys and values."""
        self._session.close()

    def send(self, text: str) -> Completion:
        """The answer to a message. ContextError: the chat does not fit any more; it is as before then."""
        return self._send(text, self._answer(text))

    def stream(self, text: str) -> Iterator[str]:
        """The answer to a message, piece by piece. It joins the chat when it has ended, also if the iterator
        is closed early."""
        yield from self._stream(text, self._answer(text))

    def _send(self, text: str, made: AnswerText) -> Completion:
        for _ in self._pieces(made):
            pass
        return made.completion() if made.cancelled else self._join(text, made)

    def _stream(self, text: str, made: AnswerText) -> Generator[str, None, None]:
        try:
            yield from self._pieces(made)
        except GeneratorExit:
            made.cancel()
            raise
        finally:
            self._join(text, made)

    def _answer(self, text: str) -> AnswerText:
        if self._raw:
            prompt = self._llm.tokenize(text)
        else:
            prompt = self._llm.template.encode([*self.messages, Message("user", text)])
        check_prompt(prompt, self._settings.context, self._settings.vocab)
        return AnswerText(self._llm.tokenizer, prompt, self._settings, Report())

    def _pieces(self, made: AnswerText) -> Iterator[str]:
        prompt, settings = made.prompt, self._settings
        tokens = self._session.answer(
            prompt, max_tokens=most_tokens(prompt, settings), end=settings.end, report=made.report
        )
        try:
            while not made.finished:  # it may be, if it was stopped just now
                if text := made.take(next(tokens, None)):
                    yield text
        finally:
            tokens.close()
            self._session.stop()  # for a generator that was never begun
        if text := made.rest():
            yield text

    def _stop(self, made: AnswerText) -> None:
        """Ends an answer in any thread."""
        made.cancel()
        self._session.stop()

    def _join(self, text: str, made: AnswerText) -> Completion:
        made.rest()  # of an answer that was ended early
        completion = made.completion()
        self.messages += [Message("user", text), Message("assistant", completion.text)]
        return completion
