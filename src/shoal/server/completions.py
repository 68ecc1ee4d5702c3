"""`/v1/completions`: texts that go on, and texts that are scored (`echo`)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import chain

from ..engine.batch import Logprobs, Result, Want
from ..engine.generate import check_text
from ..results import Completion
from .asking import Piece, read
from .bodies import CompletionBody, Wanted, completion_body
from .replies import Head, Template, completion_logprobs, reason, usage
from .served import Call, Chunk, Event, Flow, Part, Reply, Served

_COMPLETION = ("cmpl", "text_completion")


@dataclass(frozen=True, slots=True)
class _Echo:
    """A prompt that an answer repeats."""

    text: str = ""
    tokens: Sequence[int] = ()
    found: Sequence[Logprobs | None] | None = None


async def completions(served: Served, call: Call) -> AsyncGenerator[Part, None]:
    """POST /v1/completions."""
    asked = completion_body(call.body)
    wanted = asked.wanted
    served.check_model(wanted.model)
    async with served.turn(call, len(asked.prompts) * wanted.n):
        prompts = [await served.tokens(prompt) for prompt in asked.prompts]
        async with aclosing(_answered(served, call, asked, prompts)) as parts:
            async for part in parts:
                yield part


async def _answered(
    served: Served, call: Call, asked: CompletionBody, prompts: Sequence[list[int]]
) -> AsyncGenerator[Part, None]:
    wanted = asked.wanted
    each = [await served.questions(prompt, wanted, asked.schema) for prompt in prompts]
    questions = list(chain.from_iterable(each))
    if asked.echo and wanted.max_tokens == 1 and wanted.report is not None:
        # Who scores a text asks so, and counts on one token more than the text has, if only an end token.
        questions = [replace(one, settings=replace(one.settings, end=())) for one in questions]
    head = Head(_COMPLETION, served.named(wanted.model), served.fingerprint)
    echoes = [_Echo()] * len(prompts)
    if asked.echo:
        for prompt in prompts:
            check_text(prompt, served.context, served.model.config.vocab)
        echoes = await _echoes(served, asked.prompts, prompts, wanted.report)
        if wanted.max_tokens == 0:
            choices = [_echoed(served, i, echoes[i // wanted.n]) for i in range(len(prompts) * wanted.n)]
            count = sum(map(len, prompts))
            call.tokens.append((count, 0))
            yield Reply(head.part(choices, usage=usage((), 1, count)))
            return
    async with served.answers(call, questions) as each_piece:
        if wanted.stream:
            stream = _Stream(served, head, wanted, echoes)
            for part in stream.first():
                yield part
            yield Flow(each_piece, stream.parts)
            for part in stream.last():
                yield part
            return
        found: dict[int, Completion] = {}

        def take(piece: Piece) -> None:
            if piece.made is not None:
                found[piece.index] = piece.made

        await each_piece(take)
        made = [found[i] for i in range(len(questions))]
        choices = [_choice(served, i, one, echoes[i // wanted.n], wanted) for i, one in enumerate(made)]
        yield Reply(head.part(choices, usage=usage(made, len(prompts))))


async def _echoes(
    served: Served,
    given: Sequence[str | list[int]],
    prompts: Sequence[list[int]],
    report: int | None,
) -> list[_Echo]:
    texts = [one if isinstance(one, str) else await served.text(one) for one in given]
    if report is None:
        return [_Echo(text) for text in texts]
    served.model.check_generates()

    def scores(results: list[Result]) -> list[Logprobs]:
        return list(chain.from_iterable(result.logprobs for result in results))

    readings = [(prompt, 0) for prompt in prompts if len(prompt) > 1]
    asked = served.engine, readings, Want.SCORES, served.context
    found = await read(*asked, scores, served.patiently, report)
    read_ones = iter(found)
    return [
        _Echo(text, prompt, [None, *(next(read_ones) if len(prompt) > 1 else ())])
        for text, prompt in zip(texts, prompts, strict=True)
    ]


def _echoed(served: Served, index: int, echo: _Echo) -> Chunk:
    found = None
    if echo.found is not None:
        found = completion_logprobs(served.token_bytes, echo.tokens, echo.found, 0)
    return {"text": echo.text, "index": index, "logprobs": found, "finish_reason": "length"}


def _choice(served: Served, index: int, made: Completion, echo: _Echo, wanted: Wanted) -> Chunk:
    found = None
    if wanted.report is not None:
        tokens = [*echo.tokens, *made.tokens]
        found = completion_logprobs(
            served.token_bytes, tokens, [*(echo.found or ()), *(made.logprobs or ())], 0
        )
    return {
        "text": echo.text + made.text,
        "index": index,
        "logprobs": found,
        "finish_reason": reason(made),
    }


class _Stream:
    """The parts of a stream."""

    def __init__(self, served: Served, head: Head, wanted: Wanted, echoes: Sequence[_Echo]) -> None:
        self._served, self._head, self._wanted, self._echoes = served, head, wanted, echoes
        self._more = {"usage": None} if wanted.usage else {}
        count = len(echoes) * wanted.n
        self._templates = [Template(self._part(i, Template.place)) for i in range(count)]
        self._lengths = [0] * count
        """The lengths of the texts so far."""
        self._made: dict[int, Completion] = {}

    def _part(self, index: int, text: str, found: Chunk | None = None, end: str | None = None) -> Chunk:
        choice = {"text": text, "index": index, "logprobs": found, "finish_reason": end}
        return self._head.part([choice], **self._more)

    def first(self) -> Iterator[Chunk]:
        """The chunks before the answers."""
        for i in range(len(self._lengths)):
            echo = self._echoes[i // self._wanted.n]
            if echo.text:
                self._lengths[i] = len(echo.text)
                choice = {**_echoed(self._served, i, echo), "finish_reason": None}
                yield self._head.part([choice], **self._more)

    def parts(self, piece: Piece) -> Iterator[Chunk | Event]:
        """The chunks of a piece of an answer."""
        found, i = None, piece.index
        if self._wanted.report is not None:
            known, at = self._served.token_bytes, self._lengths[i]
            found = completion_logprobs(known, piece.tokens, piece.logprobs, at)
        self._lengths[i] += len(piece.text)
        end = None if piece.made is None else reason(piece.made)
        if piece.text and found is None and end is None:
            yield Event(None, self._templates[i].filled(piece.text))
            return
        if piece.made is not None:
            self._made[i] = piece.made
        if piece.text or end or (found and piece.tokens):
            yield self._part(i, piece.text, found, end)

    def last(self) -> Iterator[Chunk]:
        """The chunks after the answers."""
        if self._wanted.usage:
            made = [self._made[i] for i in sorted(self._made)]
            yield self._head.part([], usage=usage(made, len(self._echoes)))
