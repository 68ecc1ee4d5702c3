"""Calls of tools, as the model's template writes them: a grammar for calls that a request demands, and a
reader of what the model has written.

    marked   <tool_call>{"name": …, "arguments": {…}}</tool_call>: many models
    listed   [TOOL_CALLS][{"name": …, "arguments": {…}}, …], whose mark is a special token and no text
    bare     {"name": …, "parameters": {…}}"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.tokenizer import StopBuffer
from .replies import new_id

_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as models write it in a call."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool. `arguments`: JSON."""

    name: str
    arguments: str
    id: str

    def shown(self) -> dict[str, Any]:
        """The call in a message."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(frozen=True, slots=True)
class Form:
    """How a template writes calls. `open`: the text before each of them, `close` that after it. Without them,
    an answer that has calls is nothing else, and begins with `first`."""

    first: str
    open: str = ""
    close: str = ""
    arguments: str = "arguments"


MARKED = Form("<", "<tool_call>", "</tool_call>")
LISTED = Form("[")
BARE = Form("{", arguments="parameters")
_LIST_MARK = "[TOOL_CALLS]"


def form_of(template: str) -> Form | None:
    """How the calls of a template look; None: it takes no tools."""
    if "tools" not in template:
        return None
    if MARKED.open in template:
        return MARKED
    return LISTED if _LIST_MARK in template else BARE


def grammar(form: Form, tools: Sequence[Mapping[str, Any]]) -> str:
    """A grammar of llguidance for one call of one of the tools."""
    calls = " | ".join(f"call_{i}" for i in range(len(tools)))
    before, after = (f"{form.open}\n", f"\n{form.close}") if form.open else ("[", "]")
    whole = calls if form is BARE else f"{json.dumps(before)} ({calls}) {json.dumps(after)}"
    lines = [f"start: {whole}"]
    for i, tool in enumerate(tools):
        function = tool["function"]
        opening = f'{{"name": {json.dumps(function["name"])}, "{form.arguments}": '
        schema = {**function["parameters"], "x-guidance": _SPACING}
        lines.append(f'call_{i}: {json.dumps(opening)} arguments_{i} "}}"')
        lines.append(f"arguments_{i}: %json {json.dumps(schema)}")
    return "\n".join(lines)


class CallReader:
    """Splits the text of an answer, as it grows, into what is said and the calls, which come at the end."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._before = StopBuffer([form.open])
        self._whole = ""
        self._shown = 0

    def push(self, text: str) -> str:
        """Adds text; returns what is certainly said."""
        self._whole += text
        if self._form.open:
            said = self._before.push(text)
        elif self._whole.lstrip()[:1] in ("", self._form.first):  # it may become a call
            said = ""
        else:
            said = self._whole[self._shown :]
        self._shown += len(said)
        return said

    def end(self) -> tuple[str, list[ToolCall]]:
        """What is said beyond that, and the calls. Text that begins as a call and is none is said."""
        rest = self._whole[self._shown :]
        calls = read_calls(self._form, rest)
        return ("" if calls else rest), calls


def read_calls(form: Form, text: str) -> list[ToolCall]:
    """The calls in a text that begins with them; none if one of them is not a call."""
    found: list[ToolCall] = []
    decoder = json.JSONDecoder()
    left = text.strip().removeprefix(_LIST_MARK).lstrip()
    while left:
        if not left.startswith(form.open):
            return []
        left = left[len(form.open) :].lstrip()
        try:
            value, at = decoder.raw_decode(left)
            calls = [_call(form, one) for one in (value if isinstance(value, list) else [value])]
        except (ValueError, RecursionError):
            return []
        found += calls
        left = left[at:].lstrip().removeprefix(form.close).lstrip().removeprefix(";").lstrip()
    return found


def _call(form: Form, value: Any) -> ToolCall:
    """ValueError, RecursionError: the value is no call."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError
    arguments = value.get(form.arguments, value.get("arguments"))
    if not isinstance(arguments, dict):
        raise ValueError
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return ToolCall(value["name"], text, new_id("call"))
