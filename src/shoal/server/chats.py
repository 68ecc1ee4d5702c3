"""`/v1/chat/completions`: chats, with tools where the model's template has them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import trio

from ..engine.errors import MissingDependencyError, ShoalError
from ..results import Completion
from .asking import Piece
from .bodies import ChatBody, chat_body
from .errors import ApiError
from .replies import Head, Template, chat_logprobs, reason, usage
from .served import Call, Chunk, Each, Event, Flow, Part, Reply, Served
from .tools import CallReader, ToolCall, grammar

_CHAT = ("chatcmpl", "chat.completion")


@dataclass(frozen=True, slots=True)
class Said:
    """A part of answer number `index`: text that is said, and in its last part the calls."""

    index: int
    text: str
    calls: Sequence[ToolCall]
    piece: Piece

    @property
    def made(self) -> Completion | None:
        """The whole answer, in its last part."""
        return self.piece.made

    @property
    def reason(self) -> str | None:
        """Why the answer has ended."""
        if self.made is None:
            return None
        return "tool_calls" if self.calls else reason(self.made)


async def chat(served: Served, call: Call) -> AsyncGenerator[Part, None]:
    """POST /v1/chat/completions."""
    asked = chat_body(call.body)
    head = Head(_CHAT, served.named(asked.wanted.model), served.fingerprint)
    async with answers(served, call, asked) as (each, said):
        if asked.wanted.stream:
            stream = _Stream(served, head, asked)
            for part in stream.first():
                yield part
            yield Flow(each, lambda piece: stream.parts(said(piece)))
            for part in stream.last():
                yield part
            return
        texts = [""] * asked.wanted.n
        ends: dict[int, Said] = {}

        def take(piece: Piece) -> None:
            one = said(piece)
            texts[one.index] += one.text
            ends[one.index] = one

        await each(take)
        choices = [_choice(served, asked, texts[i], ends[i]) for i in range(asked.wanted.n)]
        made = [one.made for _, one in sorted(ends.items()) if one.made is not None]
        yield Reply(head.part(choices, usage=usage(made, 1)))


@asynccontextmanager
async def answers(
    served: Served, call: Call, asked: ChatBody
) -> AsyncIterator[tuple[Each, Callable[[Piece], Said]]]:
    """The pieces of the answers to a chat, when it is their turn, and what is said in each."""
    served.check_model(asked.wanted.model)
    reads = bool(asked.tools) and asked.tool_choice != "none"
    if reads and served.calls is None:
        raise ApiError(400, "the chat template of this model takes no tools", param="tools")
    async with served.turn(call, asked.wanted.n):
        prompt = await _prompt(served, asked)
        made = _grammar(served, asked) if reads and asked.tool_choice != "auto" else None
        questions = await served.questions(prompt, asked.wanted, asked.schema, made)
        readers = [CallReader(served.calls) if reads and served.calls else None for _ in questions]
        async with served.answers(call, questions) as each:
            yield each, partial(_said, readers, asked.parallel)


def _said(readers: Sequence[CallReader | None], parallel: bool, piece: Piece) -> Said:
    """What is said in a piece, without the calls, which come last."""
    reader = readers[piece.index]
    if reader is None:
        return Said(piece.index, piece.text, (), piece)
    text, calls = reader.push(piece.text), list[ToolCall]()
    if piece.made is not None:
        more, calls = reader.end()
        text += more
    return Said(piece.index, text, calls if parallel else calls[:1], piece)


async def _prompt(served: Served, asked: ChatBody) -> list[int]:
    if not served.template.has_template:
        raise ApiError(400, "the model has no chat template: use /v1/completions", param="model")
    variables: dict[str, Any] = dict(asked.variables)
    if asked.tools and asked.tool_choice != "none":
        variables["tools"] = asked.tools
    encode = partial(served.template.encode, asked.messages, **variables)
    try:
        return await trio.to_thread.run_sync(encode)
    except MissingDependencyError:
        raise
    except ShoalError as error:  # the template refuses the messages
        raise ApiError(400, str(error), param="messages") from None


def _grammar(served: Served, asked: ChatBody) -> str:
    """The grammar of a call that the request demands."""
    assert served.calls is not None, "it was checked"
    named = [tool for tool in asked.tools if asked.tool_choice == f"={tool['function']['name']}"]
    tools = named or asked.tools
    return grammar(served.calls, tools)


def _choice(served: Served, asked: ChatBody, text: str, said: Said) -> Chunk:
    assert said.made is not None, "it is the last part"
    found = None
    if asked.wanted.report is not None:
        tokens, values = said.made.tokens, said.made.logprobs or ()
        found = chat_logprobs(served.token_bytes, tokens, values, asked.wanted.report)
    message: Chunk = {"role": "assistant", "content": text or (None if said.calls else ""), "refusal": None}
    if said.calls:
        message["tool_calls"] = [one.shown() for one in said.calls]
    return {"index": said.index, "message": message, "logprobs": found, "finish_reason": said.reason}


class _Stream:
    """The parts of a stream."""

    def __init__(self, served: Served, head: Head, asked: ChatBody) -> None:
        self._head = replace(head, kind=(head.kind[0], f"{head.kind[1]}.chunk"))
        self._token_bytes, self._wanted = served.token_bytes, asked.wanted
        self._more = {"usage": None} if asked.wanted.usage else {}
        self._templates = [
            Template(self._part(i, {"content": Template.place})) for i in range(asked.wanted.n)
        ]
        self._made: list[Completion] = []

    def _part(self, index: int, delta: Chunk, found: Chunk | None = None, end: str | None = None) -> Chunk:
        choice = {"index": index, "delta": delta, "logprobs": found, "finish_reason": end}
        return self._head.part([choice], **self._more)

    def first(self) -> Iterator[Chunk]:
        """The chunks before the answers."""
        for i in range(self._wanted.n):
            yield self._part(i, {"role": "assistant", "content": "", "refusal": None})

    def parts(self, said: Said) -> Iterator[Chunk | Event]:
        """The chunks of a piece of an answer."""
        found, report = None, self._wanted.report
        if report is not None:
            found = chat_logprobs(self._token_bytes, said.piece.tokens, said.piece.logprobs, report)
        if found and (said.text or said.piece.tokens):
            yield self._part(said.index, {"content": said.text}, found)
        elif said.text:
            yield Event(None, self._templates[said.index].filled(said.text))
        for i, one in enumerate(said.calls):
            yield self._part(said.index, {"tool_calls": [{"index": i, **one.shown()}]})
        if said.made is not None:
            self._made.append(said.made)
            yield self._part(said.index, {}, end=said.reason)

    def last(self) -> Iterator[Chunk]:
        """The chunks after the answers."""
        if self._wanted.usage:
            yield self._head.part([], usage=usage(self._made, 1))
