"""`/v1/chat/completions`: chats, with tools where the model's template has them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
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
from .served import Call, Chunk, Event, Part, Reply, Served
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
    async with answers(served, call, asked) as parts:
        if asked.wanted.stream:
            async with aclosing(_stream(served, head, asked, parts)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        texts = [""] * asked.wanted.n
        last: dict[int, Said] = {}
        async for said in parts:
            texts[said.index] += said.text
            last[said.index] = said
        choices = [_choice(served, asked, texts[i], last[i]) for i in range(asked.wanted.n)]
        made = [said.made for _, said in sorted(last.items()) if said.made is not None]
        yield Reply(head.part(choices, usage=usage(made, 1)))


@asynccontextmanager
async def answers(served: Served, call: Call, asked: ChatBody) -> AsyncIterator[AsyncIterator[Said]]:
    """The parts of the answers to a chat, when it is their turn."""
    served.check_model(asked.wanted.model)
    reads = bool(asked.tools) and asked.tool_choice != "none"
    if reads and served.calls is None:
        raise ApiError(400, "the chat template of this model takes no tools", param="tools")
    async with served.turn(call, asked.wanted.n):
        prompt = await _prompt(served, asked)
        made = _grammar(served, asked) if reads and asked.tool_choice != "auto" else None
        questions = await served.questions(prompt, asked.wanted, asked.schema, made)
        async with served.answers(call, questions) as pieces:
            readers = [CallReader(served.calls) if reads and served.calls else None for _ in questions]
            async with aclosing(_said(readers, pieces, asked.parallel)) as found:
                yield found


async def _said(
    readers: Sequence[CallReader | None], pieces: AsyncIterator[Piece], parallel: bool
) -> AsyncGenerator[Said, None]:
    """What is said, without the calls, which come last."""
    async for piece in pieces:
        reader = readers[piece.index]
        if reader is None:
            yield Said(piece.index, piece.text, (), piece)
            continue
        text, calls = reader.push(piece.text), list[ToolCall]()
        if piece.made is not None:
            more, calls = reader.end()
            text += more
        yield Said(piece.index, text, calls if parallel else calls[:1], piece)


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


async def _stream(
    served: Served, head: Head, asked: ChatBody, parts: AsyncIterator[Said]
) -> AsyncGenerator[Chunk | Event, None]:
    head = replace(head, kind=(head.kind[0], f"{head.kind[1]}.chunk"))
    wanted = asked.wanted
    more = {"usage": None} if wanted.usage else {}

    def part(index: int, delta: Chunk, found: Chunk | None = None, end: str | None = None) -> Chunk:
        choice = {"index": index, "delta": delta, "logprobs": found, "finish_reason": end}
        return head.part([choice], **more)

    for i in range(wanted.n):
        yield part(i, {"role": "assistant", "content": "", "refusal": None})
    templates = [Template(part(i, {"content": Template.place})) for i in range(wanted.n)]
    made: list[Completion] = []
    async for said in parts:
        found = None
        if wanted.report is not None:
            found = chat_logprobs(served.token_bytes, said.piece.tokens, said.piece.logprobs, wanted.report)
        if found and (said.text or said.piece.tokens):
            yield part(said.index, {"content": said.text}, found)
        elif said.text:
            yield Event(None, templates[said.index].filled(said.text))
        for i, one in enumerate(said.calls):
            yield part(said.index, {"tool_calls": [{"index": i, **one.shown()}]})
        if said.made is not None:
            made.append(said.made)
            yield part(said.index, {}, end=said.reason)
    if wanted.usage:
        yield head.part([], usage=usage(made, 1))
