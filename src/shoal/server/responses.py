"""`/v1/responses`: chats in the form of OpenAI's newer API. Nothing is kept between requests: a client sends
the turns before with each."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ..results import Completion
from .bodies import ChatBody, Fields, chat_body
from .chats import Said, answers
from .replies import chat_logprobs, new_id
from .served import Call, Chunk, Reply, Served
from .tools import ToolCall

_SAME = ("model", "temperature", "top_p", "stream", "parallel_tool_calls")
"""Fields that mean what they mean in a chat."""
_ITEMS = 10_000
_LOGPROBS = "message.output_text.logprobs"


async def responses(served: Served, call: Call) -> AsyncGenerator[Chunk | Reply, None]:
    """POST /v1/responses."""
    asked = chat_body(Fields(chat_fields(call.body)))
    response = _Response(served.named(asked.wanted.model), call.body)
    async with answers(served, call, asked) as parts:
        if asked.wanted.stream:
            async with aclosing(_stream(served, asked, response, parts)) as events:
                async for event in events:
                    yield event
            return
        text, calls, made = "", list[ToolCall](), None
        found: list[Chunk] = []
        async for said in parts:
            text, calls, made = text + said.text, [*calls, *said.calls], said.made
            found += _logprobs(served, asked, said)
        yield Reply(response.whole(response.items(_content(text, found), calls), made))


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


async def _stream(
    served: Served, asked: ChatBody, response: _Response, parts: AsyncIterator[Said]
) -> AsyncGenerator[Chunk, None]:
    yield response.event("created", response=response.whole((), None))
    yield response.event("in_progress", response=response.whole((), None))
    place = {"item_id": response.message_id, "output_index": 0, "content_index": 0}
    text, calls, made = "", list[ToolCall](), None
    begun, found, told = False, list[Chunk](), 0
    async for said in parts:
        calls, made = [*calls, *said.calls], said.made
        found += _logprobs(served, asked, said)
        if not begun and (said.text or (made is not None and not calls)):
            begun = True
            yield response.event("output_item.added", output_index=0, item=response.message(None))
            yield response.event("content_part.added", **place, part=_content("", ()))
        if said.text:
            text += said.text
            yield response.event("output_text.delta", **place, delta=said.text, logprobs=found[told:])
            told = len(found)
    whole_text = _content(text, found)
    if begun:
        yield response.event("output_text.done", **place, text=text, logprobs=found)
        yield response.event("content_part.done", **place, part=whole_text)
        yield response.event("output_item.done", output_index=0, item=response.message(whole_text))
    for i, item in enumerate(map(_called, calls), int(begun)):
        where = {"item_id": item["id"], "output_index": i}
        waits = {**item, "arguments": "", "status": "in_progress"}
        yield response.event("output_item.added", output_index=i, item=waits)
        yield response.event("function_call_arguments.delta", **where, delta=item["arguments"])
        done = {"name": item["name"], "arguments": item["arguments"]}
        yield response.event("function_call_arguments.done", **where, **done)
        yield response.event("output_item.done", output_index=i, item=item)
    whole = response.whole(response.items(whole_text, calls), made)
    yield response.event(whole["status"], response=whole)


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
