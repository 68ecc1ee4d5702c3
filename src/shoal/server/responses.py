"""`/v1/responses`: chats in the form of OpenAI's newer API. Nothing is kept between requests: a client sends
the turns before with each."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..results import Completion
from .bodies import ChatBody, Fields, chat_body
from .chats import Said, answers
from .replies import chat_logprobs, new_id
from .served import Call, Chunk, Flow, Part, Reply, Served
from .tools import ToolCall

_SAME = ("model", "temperature", "top_p", "stream", "parallel_tool_calls")
"""Fields that mean what they mean in a chat."""
_ITEMS = 10_000
_LOGPROBS = "message.output_text.logprobs"


async def responses(served: Served, call: Call) -> AsyncGenerator[Part, None]:
    """POST /v1/responses."""
    asked = chat_body(Fields(chat_fields(call.body)))
    response = _Response(served.named(asked.wanted.model), call.body)
    async with answers(served, call, asked) as (each, said):
        stream = _Stream(served, asked, response)
        if not asked.wanted.stream:
            await each(lambda piece: stream.take(said(piece)))
            yield Reply(stream.whole())
            return
        for event in stream.first():
            yield event
        yield Flow(each, lambda piece: stream.events(said(piece)))
        for event in stream.last():
            yield event


def chat_fields(body: Fields) -> dict[str, Any]:
    """The body of a chat that asks the same. ApiError: something is asked that this server cannot do."""
    for name in ("previous_response_id", "conversation", "prompt", "background"):
        if body.get(name):
            body.wrong(name, "is not supported: nothing is kept between requests", "unsupported_parameter")
    made: dict[str, Any] = {name: body.get(name) for name in _SAME if name in body}
    given = body.get("input")
    turns: list[Any] = []
    if body.text("instructions", ""):
        turns.append({"role": "system", "content": body.text("instructions")})
    if isinstance(given, str):
        turns.append({"role": "user", "content": given})
    else:
        for i, item in enumerate(body.list("input", _ITEMS)):
            _add_turn(turns, Fields(item, f"input[{i}]."))
    made["messages"] = turns
    if "max_output_tokens" in body:
        made["max_completion_tokens"] = body.whole("max_output_tokens", None, 1, 1 << 31)
    form = body.fields("text")
    form = None if form is None else form.fields("format")
    if form is not None and form.text("type") == "json_schema":
        named = {"name": form.text("name", "answer"), "schema": form.get("schema")}
        made["response_format"] = {"type": "json_schema", "json_schema": named}
    elif form is not None:
        made["response_format"] = {"type": form.text("type")}
    if body.get("top_logprobs") or (body.get("include") and _LOGPROBS in body.list("include", _ITEMS)):
        made["logprobs"] = True
        made["top_logprobs"] = body.get("top_logprobs", 0)
    if body.get("tools"):
        made["tools"] = [
            _tool(Fields(tool, f"tools[{i}].")) for i, tool in enumerate(body.list("tools", 128))
        ]
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": Fields(choice, "tool_choice.").text("name")}}
    return made | ({} if choice is None else {"tool_choice": choice})


def _add_turn(turns: list[Any], item: Fields) -> None:
    """Adds an item of the input to the messages of a chat."""
    match item.text("type", "message"):
        case "message":
            turns.append({"role": item.text("role"), "content": item.get("content")})
        case "function_call":
            function = {"name": item.text("name"), "arguments": item.text("arguments")}
            one = {"id": item.text("call_id"), "type": "function", "function": function}
            if turns and turns[-1].get("tool_calls"):  # calls of one answer are one message
                turns[-1]["tool_calls"].append(one)
            else:
                turns.append({"role": "assistant", "tool_calls": [one]})
        case "function_call_output":
            output = {"tool_call_id": item.text("call_id"), "content": item.get("output")}
            turns.append({"role": "tool", **output})
        case "reasoning":  # of an earlier answer: templates leave it out
            pass
        case kind:
            item.wrong("type", f"{kind!r} is not supported", "unsupported_parameter")


def _tool(tool: Fields) -> dict[str, Any]:
    if tool.text("type") != "function":
        tool.wrong("type", "must be function", "unsupported_parameter")
    function = {name: tool.get(name) for name in ("name", "description", "parameters") if name in tool}
    return {"type": "function", "function": function}


@dataclass(slots=True)
class _Response:
    """The object that a response is, and its events."""

    model: str
    body: Fields
    id: str = field(default_factory=lambda: new_id("resp"))
    message_id: str = field(default_factory=lambda: new_id("msg"))
    created: int = field(default_factory=lambda: int(time.time()))
    events: int = 0

    def whole(self, output: Sequence[Chunk], made: Completion | None) -> Chunk:
        """The response: with `made`, as it has ended."""
        cut = made is not None and made.finish_reason == "length"
        status = "in_progress" if made is None else "incomplete" if cut else "completed"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": self.body.get("instructions"),
            "max_output_tokens": self.body.get("max_output_tokens"),
            "metadata": self.body.get("metadata", {}),
            "model": self.model,
            "output": list(output),
            "parallel_tool_calls": self.body.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "store": False,
            "temperature": self.body.get("temperature", 1.0),
            "text": self.body.get("text", {"format": {"type": "text"}}),
            "tool_choice": self.body.get("tool_choice", "auto"),
            "tools": self.body.get("tools", []),
            "top_logprobs": self.body.get("top_logprobs", 0),
            "top_p": self.body.get("top_p", 1.0),
            "usage": None if made is None else _usage(made),
        }

    def message(self, said: Chunk | None) -> Chunk:
        """The message of the answer, of this content; None: it has just begun."""
        content = [] if said is None else [said]
        status = "in_progress" if said is None else "completed"
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def items(self, said: Chunk, calls: Sequence[ToolCall]) -> list[Chunk]:
        """All that an answer consists of."""
        messages = [self.message(said)] if said["text"] or not calls else []
        return [*messages, *map(_called, calls)]

    def event(self, kind: str, **more: Any) -> Chunk:
        """The next event of the stream."""
        self.events += 1
        return {"type": f"response.{kind}", "sequence_number": self.events - 1, **more}


class _Stream:
    """A response as it grows, and the events of its stream."""

    def __init__(self, served: Served, asked: ChatBody, response: _Response) -> None:
        self._served, self._asked, self._response = served, asked, response
        self._place = {"item_id": response.message_id, "output_index": 0, "content_index": 0}
        self._text = ""
        self._calls: list[ToolCall] = []
        self._found: list[Chunk] = []
        self._told = 0
        """How many of them are in events."""
        self._made: Completion | None = None
        self._begun = False

    def take(self, said: Said) -> None:
        """Adds a part of the answer."""
        self._text += said.text
        self._calls += said.calls
        self._found += _logprobs(self._served, self._asked, said)
        self._made = said.made

    def whole(self) -> Chunk:
        """The response, when its answer has ended."""
        items = self._response.items(_content(self._text, self._found), self._calls)
        return self._response.whole(items, self._made)

    def first(self) -> Iterator[Chunk]:
        """The events before the answer."""
        for kind in ("created", "in_progress"):
            yield self._response.event(kind, response=self._response.whole((), None))

    def events(self, said: Said) -> Iterator[Chunk]:
        """The events of a part of the answer, which is added."""
        self.take(said)
        event, place = self._response.event, self._place
        if not self._begun and (said.text or (said.made is not None and not self._calls)):
            self._begun = True
            yield event("output_item.added", output_index=0, item=self._response.message(None))
            yield event("content_part.added", **place, part=_content("", ()))
        if said.text:
            yield event("output_text.delta", **place, delta=said.text, logprobs=self._found[self._told :])
            self._told = len(self._found)

    def last(self) -> Iterator[Chunk]:
        """The events after the answer."""
        event, place, part = self._response.event, self._place, _content(self._text, self._found)
        if self._begun:
            yield event("output_text.done", **place, text=self._text, logprobs=self._found)
            yield event("content_part.done", **place, part=part)
            yield event("output_item.done", output_index=0, item=self._response.message(part))
        for i, item in enumerate(map(_called, self._calls), int(self._begun)):
            where = {"item_id": item["id"], "output_index": i}
            waits = {**item, "arguments": "", "status": "in_progress"}
            yield event("output_item.added", output_index=i, item=waits)
            yield event("function_call_arguments.delta", **where, delta=item["arguments"])
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield event("function_call_arguments.done", **where, **done)
            yield event("output_item.done", output_index=i, item=item)
        whole = self.whole()
        yield event(whole["status"], response=whole)


def _content(text: str, found: Sequence[Chunk]) -> Chunk:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(found)}


def _logprobs(served: Served, asked: ChatBody, said: Said) -> list[Chunk]:
    """The log-probabilities of the tokens of a part, if they are asked for."""
    if asked.wanted.report is None:
        return []
    piece = said.piece
    found: list[Chunk] = chat_logprobs(served.token_bytes, piece.tokens, piece.logprobs, asked.wanted.report)[
        "content"
    ]
    return found


def _called(call: ToolCall) -> Chunk:
    return {
        "id": f"fc_{call.id.removeprefix('call_')}",
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def _usage(made: Completion) -> Chunk:
    asked, answered = made.usage.prompt_tokens, made.usage.completion_tokens
    return {
        "input_tokens": asked,
        "input_tokens_details": {"cached_tokens": made.usage.cached_tokens},
        "output_tokens": answered,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": asked + answered,
    }
