"""The requests of bench/conformance.py: what programs ask of such a server, rightly and wrongly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

FRANCE = "What is the capital of France?"
_CHAT, _TEXT, _ANSWER = "/v1/chat/completions", "/v1/completions", "/v1/responses"
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"where": {"type": "string"}}, "required": ["where"]},
    },
}


@dataclass(frozen=True, slots=True)
class Request:
    """A request; `body` is JSON, or bytes as they are."""

    name: str
    path: str
    body: Any = None
    method: str = "POST"


def requests(model: str) -> list[Request]:
    """All of them, for servers that call their model so."""
    return [*_gets(model), *_chats(), *_wrong_chats(), *_texts(), *_others()]


def _gets(model: str) -> Iterator[Request]:
    yield Request("health", "/health", method="GET")
    yield Request("models", "/v1/models", method="GET")
    yield Request("one model", f"/v1/models/{model}", method="GET")
    yield Request("no such path", "/v1/nothing", method="GET")
    yield Request("chat by GET", _CHAT, method="GET")


def _chat(*said: str, **more: Any) -> dict[str, Any]:
    """A chat in which the user speaks first, with a short answer that is not drawn."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said or (FRANCE,))]
    return {"messages": turns, "temperature": 0, "max_tokens": 12, **more}


def _chats() -> Iterator[Request]:
    def one(name: str, **more: Any) -> Request:
        return Request(f"chat: {name}", _CHAT, _chat(**more))

    ask = {"role": "user", "content": FRANCE}
    yield one("plain")
    yield Request("chat: three turns", _CHAT, _chat("Hi.", "Hello.", FRANCE))
    yield one("system message", messages=[{"role": "system", "content": "Be brief."}, ask])
    yield one("developer message", messages=[{"role": "developer", "content": "Be brief."}, ask])
    yield one("text in parts", messages=[{"role": "user", "content": [{"type": "text", "text": FRANCE}]}])
    yield one("stream", stream=True)
    yield one("stream with usage", stream=True, stream_options={"include_usage": True})
    yield one("stop string", stop=" is")
    yield one("stop strings", stop=["zebra", " is"])
    yield one("n = 2", n=2)
    yield one("seed", temperature=1, seed=7)
    yield one("top_p, min_p, top_k", temperature=1, top_p=0.9, min_p=0.1, top_k=20)
    yield one("penalties", presence_penalty=0.5, frequency_penalty=0.5)
    yield one("logprobs", logprobs=True, top_logprobs=3)
    yield one("stream of logprobs", logprobs=True, top_logprobs=2, stream=True)
    yield one("logit_bias", logit_bias={"7042": -100})
    yield one("max_completion_tokens", max_tokens=None, max_completion_tokens=5)
    yield one("until its end", max_tokens=None, logit_bias={"2": 100})
    yield one("JSON object", response_format={"type": "json_object"}, max_tokens=60)
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": _SCHEMA}}
    yield one("JSON schema", response_format=schema, max_tokens=60)
    yield one("tools, tool_choice none", tools=[_TOOL], tool_choice="none")
    yield one("unknown field", colour="blue")
    yield one("chat_template_kwargs", chat_template_kwargs={"enable_thinking": False})
    yield one("stream_options without stream", stream_options={"include_usage": True})


def _wrong_chats() -> Iterator[Request]:
    def one(name: str, **more: Any) -> Request:
        return Request(f"chat: {name}", _CHAT, _chat(**more))

    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "colour"}}}
    yield one("no messages", messages=[])
    yield Request("chat: messages missing", _CHAT, {"max_tokens": 5})
    yield one("messages is a text", messages="Hello")
    yield one("unknown role", messages=[{"role": "wizard", "content": "Hi"}])
    yield one("content missing", messages=[{"role": "user"}])
    yield one("a picture", messages=[{"role": "user", "content": [picture]}])
    yield one("another model", model="gpt-4o")
    yield one("temperature is a text", temperature="hot")
    yield one("n = 0", n=0)
    yield one("top_logprobs without logprobs", top_logprobs=3)
    yield one("a schema that is none", response_format=bad)
    yield one("response_format unknown", response_format={"type": "xml"})
    yield one("tool_choice of no tool", tool_choice="required")
    yield one("too long", messages=[{"role": "user", "content": "word " * 3000}])
    yield Request("broken JSON", _CHAT, b'{"messages": [')
    yield Request("body is a list", _CHAT, [1, 2])
    yield Request("empty body", _CHAT, b"")
    yield Request(
        "a name twice",
        _CHAT,
        b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "max_tokens": 3}',
    )


def _texts() -> Iterator[Request]:
    def one(name: str, prompt: Any = "The sea is", **more: Any) -> Request:
        return Request(f"text: {name}", _TEXT, {"prompt": prompt, "temperature": 0, "max_tokens": 5} | more)

    yield one("plain")
    yield one("stream", stream=True, stream_options={"include_usage": True})
    yield one("token ids", [504, 3426, 314])
    yield one("two prompts", ["The sea is", "Bread is made of"])
    yield one("logprobs", logprobs=2)
    yield one("echo", echo=True)
    yield one("echo of logprobs", echo=True, logprobs=1, max_tokens=1)
    yield one("no prompt", None)


def _others() -> Iterator[Request]:
    asked = {"temperature": 0, "max_output_tokens": 12}
    yield Request("response: plain", _ANSWER, {"input": FRANCE, **asked})
    yield Request("response: stream", _ANSWER, {"input": FRANCE, "stream": True, **asked})
    yield Request("embeddings", "/v1/embeddings", {"input": ["A boat", "Butter"]})
    yield Request("tokenize", "/tokenize", {"content": "The sea is"})
    yield Request("detokenize", "/detokenize", {"tokens": [504, 3426, 314]})
