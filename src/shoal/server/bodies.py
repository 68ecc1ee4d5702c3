"""The JSON bodies of requests, checked, as dataclasses. Fields that are not named here are ignored, as other
servers do; one that would change the answer and cannot be honoured is an error."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ..engine.batch import MOST_BIASES, MOST_REPORTED, Sampling
from .errors import ApiError

MOST_CHOICES = 32
MOST_PROMPTS = 256
MOST_STOPS = 16
MOST_LOGPROBS = 20
_DEPTH = 64
"""How deep objects and lists of a body may be nested, and those in the arguments of a call."""
_MISSING: Any = object()
_COMPLETION_TOKENS = 16
"""The `max_tokens` of a completion that names none, as in OpenAI's API."""


class Fields:
    """An object of a request. Each method takes one field; null is as good as no field."""

    def __init__(self, values: Any, path: str = "") -> None:
        self._path = path
        if not isinstance(values, dict):
            raise ApiError(400, f"{path or 'the body'} must be an object", param=path or None)
        self._values = values

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def wrong(self, name: str, what: str, code: str | None = None) -> NoReturn:
        """Refuses the request for the value of a field."""
        raise ApiError(400, f"{self._path}{name} {what}", param=f"{self._path}{name}", code=code)

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it is."""
        found = self._values.get(name)
        return default if found is None else found

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        found = self.get(name, default)
        if not isinstance(found, bool):
            self.wrong(name, "must be true or false")
        return found

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A finite number in a range."""
        found = self.get(name, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not least <= found <= most:
            self.wrong(name, f"must be a number from {least:g} to {most:g}")
        return float(found)

    def whole(self, name: str, default: Any, least: int, most: int) -> Any:
        """A whole number in a range, or the default."""
        found = self.get(name, _MISSING)
        if found is _MISSING:
            return default
        if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= most:
            self.wrong(name, f"must be a whole number from {least} to {most}")
        return found

    def text(self, name: str, default: Any = _MISSING) -> Any:
        """A string, or the default; without a default it must be there."""
        found = self.get(name, default)
        if found is not default and not isinstance(found, str):
            self.wrong(name, "must be a string")
        if found is _MISSING:
            self.wrong(name, "is missing")
        return found

    def fields(self, name: str) -> Fields | None:
        """An object, or None."""
        return Fields(self._values[name], f"{self._path}{name}.") if name in self else None

    def list(self, name: str, most: int) -> list[Any]:
        """A list with at least one item."""
        found = self.get(name, _MISSING)
        if not isinstance(found, list) or not 1 <= len(found) <= most:
            self.wrong(name, f"must be a list of 1 to {most} items")
        return found


@dataclass(frozen=True, slots=True)
class Wanted:
    """What all requests for answers have. `report` as in Settings; `max_tokens` None: until the context is
    full."""

    model: str | None
    sampling: Sampling
    max_tokens: int | None
    stops: tuple[str, ...]
    n: int
    stream: bool
    usage: bool
    """Whether a stream ends with the usage."""
    report: int | None


@dataclass(frozen=True, slots=True)
class ChatBody:
    """`/v1/chat/completions`. `messages` and `tools` are as a template takes them. `schema`: what the answer
    must be, as JSON schema; None: anything."""

    wanted: Wanted
    messages: Sequence[Mapping[str, Any]]
    schema: Mapping[str, Any] | None
    tools: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any]
    """Further inputs of the template (`chat_template_kwargs`), such as `enable_thinking`."""
    tool_choice: str
    """`auto`, `none`, `required`, or the name of a tool after "="."""
    parallel: bool
    """Whether there may be several calls."""


@dataclass(frozen=True, slots=True)
class CompletionBody:
    """`/v1/completions`. Each prompt is a text or token ids."""

    wanted: Wanted
    prompts: Sequence[str | list[int]]
    echo: bool
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingBody:
    """`/v1/embeddings`."""

    model: str | None
    inputs: Sequence[str | list[int]]
    base64: bool


def parse(data: bytes) -> Fields:
    """The object of a body. Refused are bodies that two readers could understand differently: a name twice in
    an object, numbers that are none in JSON, text that is not Unicode."""
    try:
        return Fields(_value(data.decode("utf-8")))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON that can be read: {error}") from None


def _value(text: str) -> Any:
    """The value of a JSON text. ValueError, RecursionError: see `parse`."""
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")  # lone surrogates, 1e999
    _check_depth(value, _DEPTH)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("an object has a name twice")
    return made


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _check_depth(value: Any, left: int) -> None:
    if isinstance(value, dict | list):
        if not left:
            raise ValueError(f"it is nested deeper than {_DEPTH}")
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, left - 1)


def chat_body(body: Fields) -> ChatBody:
    """See ChatBody."""
    shown = body.whole("top_logprobs", None, 0, MOST_LOGPROBS)
    report = (shown or 0) if body.flag("logprobs") else None
    if shown is not None and report is None:
        body.wrong("top_logprobs", "needs logprobs: true")
    most = body.whole("max_completion_tokens", None, 1, 1 << 31)
    wanted = _wanted(body, body.whole("max_tokens", None, 1, 1 << 31) if most is None else most, report)
    for name in ("audio", "prediction", "web_search_options", "functions", "function_call"):
        if name in body:
            body.wrong(name, "is not supported", "unsupported_parameter")
    messages = [_message(one, f"messages[{i}].") for i, one in enumerate(body.list("messages", 10_000))]
    tools = [
        _tool(one, f"tools[{i}].")
        for i, one in enumerate((body.get("tools") and body.list("tools", 128)) or [])
    ]
    variables = body.get("chat_template_kwargs", {})
    if not isinstance(variables, dict) or {"self", "messages", "generation_prompt"} & variables.keys():
        body.wrong("chat_template_kwargs", "must be an object of further inputs of the template")
    choice, parallel = _tool_choice(body, tools), body.flag("parallel_tool_calls", True)
    return ChatBody(wanted, messages, _schema(body), tools, variables, choice, parallel)


def completion_body(body: Fields) -> CompletionBody:
    """See CompletionBody."""
    echo = body.flag("echo")
    report = body.whole("logprobs", None, 0, MOST_REPORTED)
    least = 0 if echo else 1
    wanted = _wanted(body, body.whole("max_tokens", _COMPLETION_TOKENS, least, 1 << 31), report)
    if body.whole("best_of", wanted.n, 1, 1 << 31) != wanted.n:
        body.wrong("best_of", "must be equal to n", "unsupported_parameter")
    if body.text("suffix", ""):
        body.wrong("suffix", "is not supported", "unsupported_parameter")
    prompts = _texts(body, "prompt")
    if len(prompts) * wanted.n > MOST_PROMPTS:
        body.wrong("n", f"times the prompts is more than {MOST_PROMPTS}")
    return CompletionBody(wanted, prompts, echo, _schema(body))


def embedding_body(body: Fields) -> EmbeddingBody:
    """See EmbeddingBody."""
    form = body.text("encoding_format", "float")
    if form not in ("float", "base64"):
        body.wrong("encoding_format", "must be float or base64")
    if "dimensions" in body:
        body.wrong(
            "dimensions", "is not supported: the model's vectors cannot be cut", "unsupported_parameter"
        )
    return EmbeddingBody(body.text("model", None), _texts(body, "input"), form == "base64")


def token_ids(body: Fields, name: str, values: Any) -> list[int]:
    """Token ids."""
    if not isinstance(values, list) or not all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 31 for i in values
    ):
        body.wrong(name, "must be a list of token ids")
    return values


def _wanted(body: Fields, max_tokens: int | None, report: int | None) -> Wanted:
    stop = body.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(one, str) and 0 < len(one) <= 1000 for one in stops)
    ):
        body.wrong("stop", f"must be a string, or a list of at most {MOST_STOPS} that are not empty")
    options = body.fields("stream_options")
    stream = body.flag("stream")
    return Wanted(
        body.text("model", None),
        _sampling(body),
        max_tokens,
        tuple(stops),
        body.whole("n", 1, 1, MOST_CHOICES),
        stream,
        options is not None and options.flag("include_usage"),
        report,
    )


def _sampling(body: Fields) -> Sampling:
    temperature = body.number("temperature", 1.0, 0.0, 100.0)
    repetition = "repetition_penalty" if "repetition_penalty" in body else "repeat_penalty"
    seed = body.whole("seed", None, -(1 << 63), (1 << 64) - 1)
    try:
        return Sampling(
            temperature if temperature >= 1e-6 else 0.0,
            body.whole("top_k", 0, -1, (1 << 31) - 1) if body.get("top_k") != -1 else 0,
            max(body.number("top_p", 1.0, 0.0, 1.0), 1e-6),
            body.number("min_p", 0.0, 0.0, 1.0),
            body.number(repetition, 1.0, 0.01, 100.0),
            secrets.randbits(64) if seed is None else seed % (1 << 64),
            body.number("presence_penalty", 0.0, -100.0, 100.0),
            body.number("frequency_penalty", 0.0, -100.0, 100.0),
            _biases(body),
        )
    except ValueError as error:
        raise ApiError(400, str(error)) from None


def _biases(body: Fields) -> tuple[tuple[int, float], ...]:
    given = body.get("logit_bias", {})
    if not isinstance(given, dict) or len(given) > MOST_BIASES:
        body.wrong("logit_bias", f"must be an object with at most {MOST_BIASES} token ids")
    found = []
    biases = Fields(given, "logit_bias.")
    for name in given:
        if not (name.isascii() and name.isdecimal() and len(name) <= 9):
            biases.wrong(name, "is not a token id")
        found.append((int(name), biases.number(name, 0.0, -100.0, 100.0)))
    if len({token for token, _ in found}) < len(found):
        body.wrong("logit_bias", "has a token twice")
    return tuple(found)


def _texts(body: Fields, name: str) -> list[str | list[int]]:
    """A text, token ids, or a list of either."""
    given = body.get(name)
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        body.wrong(name, "must be a string, or a list of strings or of token ids")
    if all(isinstance(one, int) for one in given):
        return [token_ids(body, name, given)]
    if len(given) > MOST_PROMPTS:
        body.wrong(name, f"has more than {MOST_PROMPTS} items")
    return [one if isinstance(one, str) else token_ids(body, name, one) for one in given]


_ROLES = ("system", "developer", "user", "assistant", "tool")


def _message(given: Any, path: str) -> dict[str, Any]:
    """A message for a template: text only, with the tool calls that it has."""
    message = Fields(given, path)
    role = message.text("role")
    if role not in _ROLES:
        message.wrong("role", f"must be one of {', '.join(_ROLES)}")
    made: dict[str, Any] = {"role": "system" if role == "developer" else role}
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{path}content[{i}].") for i, part in enumerate(content))
    if not isinstance(content, str | None):
        message.wrong("content", "must be a string, or a list of parts")
    calls = message.get("tool_calls")
    if role == "assistant" and calls:
        made["tool_calls"] = [
            _call(one, f"{path}tool_calls[{i}].") for i, one in enumerate(message.list("tool_calls", 128))
        ]
    elif content is None:
        message.wrong("content", "is missing")
    made["content"] = content or ""
    for name in ("name", "tool_call_id"):
        if name in message:
            made[name] = message.text(name)
    return made


def _part(given: Any, path: str) -> str:
    part = Fields(given, path)
    kind = part.text("type")
    if kind not in ("text", "input_text", "output_text", "refusal"):
        part.wrong("type", f"{kind!r} is not supported: the model reads text", "unsupported_content")
    found: str = part.text("refusal" if kind == "refusal" else "text")
    return found


def _call(given: Any, path: str) -> dict[str, Any]:
    """A call of a tool, whose arguments the templates want as an object."""
    function = Fields(given, path).fields("function")
    if function is None:
        raise ApiError(400, f"{path}function is missing", param=f"{path}function")
    try:
        arguments = _value(function.text("arguments"))
    except (ValueError, RecursionError):
        function.wrong("arguments", "must be JSON in a string")
    called = {"name": function.text("name"), "arguments": arguments}
    return {"id": Fields(given, path).text("id", ""), "type": "function", "function": called}


def _tool(given: Any, path: str) -> dict[str, Any]:
    tool = Fields(given, path)
    function = tool.fields("function")
    if tool.text("type", "function") != "function" or function is None:
        tool.wrong("type", "must be function", "unsupported_parameter")
    if not 1 <= len(function.text("name")) <= 64:
        function.wrong("name", "must have 1 to 64 characters")
    if function.fields("parameters") is None:
        return {"type": "function", "function": {**given["function"], "parameters": {"type": "object"}}}
    return {"type": "function", "function": given["function"]}


def _tool_choice(body: Fields, tools: Sequence[Mapping[str, Any]]) -> str:
    choice = body.get("tool_choice", "auto")
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required"):
            body.wrong("tool_choice", "must be auto, none, required, or a function")
        if choice == "required" and not tools:
            body.wrong("tool_choice", "is required, and there are no tools")
        return choice
    named = Fields(choice, "tool_choice.").fields("function")
    name = None if named is None else named.text("name")
    if name not in [tool["function"]["name"] for tool in tools]:
        body.wrong("tool_choice", "names no tool of the request")
    return f"={name}"


def _schema(body: Fields) -> Mapping[str, Any] | None:
    """The schema of `response_format`."""
    form = body.fields("response_format")
    kind = "text" if form is None else form.text("type")
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        form.wrong("type", "must be text, json_object or json_schema")
    named = form.fields("json_schema")
    schema = None if named is None else named.get("schema")
    if not isinstance(schema, dict):
        form.wrong("json_schema", "must have a schema, which is an object")
    return schema
