"""Calls of tools: what is read from an answer, and what a request demands."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.server.tools import BARE, LISTED, MARKED, CallReader, Form, form_of

from .conftest import Serving
from .test_api import events

ONE = {"name": "weather", "arguments": {"where": 'Øre<>[]{}"\\'}}
TWO = {"name": "time", "arguments": {}}
BARE_ONE = {"name": "weather", "parameters": ONE["arguments"]}


def marked(*calls: Any) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


CASES: list[tuple[Form, str, str, list[Any]]] = [
    (MARKED, "Just text, 1 < 2.", "Just text, 1 < 2.", []),
    (MARKED, marked(ONE), "", [ONE]),
    (MARKED, f"I look.{marked(ONE, TWO)}", "I look.", [ONE, TWO]),
    (MARKED, f"<tool_call>{json.dumps(TWO)}", "", [TWO]),  # the end is missing
    (MARKED, "See <tool_call>not JSON</tool_call>", "See <tool_call>not JSON</tool_call>", []),
    (MARKED, '<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
    (LISTED, json.dumps([ONE, TWO]), "", [ONE, TWO]),
    (LISTED, "[TOOL_CALLS]" + json.dumps([TWO]), "", [TWO]),
    (LISTED, "[1] is a note", "[1] is a note", []),
    (BARE, "  " + json.dumps(BARE_ONE), "", [ONE]),
    (BARE, '{"a": 1}', '{"a": 1}', []),
    (BARE, "Hello {", "Hello {", []),
]


@given(st.sampled_from(CASES), st.lists(st.integers(0, 200), max_size=8))
def test_calls_are_read_wherever_the_pieces_end(
    case: tuple[Form, str, str, list[Any]], cuts: list[int]
) -> None:
    form, text, said, calls = case
    reader = CallReader(form)
    at = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    shown = "".join(reader.push(text[a:b]) for a, b in pairwise(at))
    rest, found = reader.end()
    assert shown + rest == said
    assert [{"name": one.name, "arguments": json.loads(one.arguments)} for one in found] == calls
    assert len({one.id for one in found}) == len(calls)


@pytest.mark.parametrize("value", ["NaN", "1e999", '{"a":' * 1000 + "1" + "}" * 1000])
def test_a_call_whose_arguments_are_no_json_is_text(value: str) -> None:
    text = f'<tool_call>{{"name": "weather", "arguments": {{"where": {value}}}}}</tool_call>'
    reader = CallReader(MARKED)
    assert (reader.push(text) + reader.end()[0], reader.end()[1]) == (text, [])


def test_text_that_cannot_be_a_call_is_shown_at_once() -> None:
    assert CallReader(MARKED).push("The sea ") == "The sea "
    assert CallReader(BARE).push("The sea ") == "The sea "
    assert [form_of(text) for text in ("", "tools <tool_call>", "tools [TOOL_CALLS]", "tools")] == [
        None, MARKED, LISTED, BARE,
    ]  # fmt: skip


PARAMETERS = {
    "type": "object",
    "properties": {"where": {"$ref": "#/$defs/place"}},
    "required": ["where"],
    "additionalProperties": False,
    "$defs": {"place": {"enum": ["here", "there"]}},
}
TOOL_LIST = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "time", "description": "now"}},
]
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOL_LIST, "seed": 1}


def test_a_call_that_is_demanded_is_made(tooled: Serving) -> None:
    path, named = "/v1/chat/completions", {"type": "function", "function": {"name": "weather"}}
    made = tooled.made(path, tool_choice=named, n=3, **ASKED)
    for choice in made["choices"]:
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"])["where"] in ("here", "there")
    parts = events(tooled.post(path, tool_choice=named, n=3, stream=True, **ASKED).text)
    deltas = [part["choices"][0] for part in parts if "tool_calls" in part["choices"][0]["delta"]]
    streamed = {one["index"]: one["delta"]["tool_calls"][0]["function"] for one in deltas}
    assert streamed == {
        choice["index"]: choice["message"]["tool_calls"][0]["function"] for choice in made["choices"]
    }
    some = tooled.made(path, tool_choice="required", **ASKED)["choices"][0]["message"]["tool_calls"]
    assert some[0]["function"]["name"] in ("weather", "time")
    answer = {"role": "tool", "tool_call_id": call["id"], "content": "42"}
    turns = [*ASKED["messages"], choice["message"], answer]
    assert tooled.made(path, messages=turns, tools=TOOL_LIST, max_tokens=2)["choices"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "fish"}}}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "fish"}}}]},
            "tools",
        ),
    ],
)
def test_tools_that_cannot_be_used_are_refused(tooled: Serving, change: Any, param: str) -> None:
    reply = tooled.post("/v1/chat/completions", **{**ASKED, "tool_choice": "required", **change})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("value", ["NaN", "1e999", "[" * 65 + "]" * 65, '"\\ud800"', '0, "where": 1'])
def test_arguments_are_json_as_strict_as_the_body(tooled: Serving, value: str) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": f'{{"where": {value}}}'}}
    turns = [*ASKED["messages"], {"role": "assistant", "tool_calls": [call]}]
    answer = tooled.post("/v1/chat/completions", messages=turns, max_tokens=1)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[1].tool_calls[0].function.arguments"


def test_a_template_without_tools_says_so(served: Serving) -> None:
    reply = served.post("/v1/chat/completions", **ASKED)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tools")


def test_a_response_is_the_chat_that_asks_the_same(tooled: Serving) -> None:
    options: dict[str, Any] = {"temperature": 0.0}
    chat = tooled.made(
        "/v1/chat/completions",
        messages=[{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}],
        max_tokens=8,
        **options,
    )
    turns = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]
    asked = {"instructions": "Short.", "input": turns, "max_output_tokens": 8, **options}
    made = tooled.made("/v1/responses", **asked)
    (message,) = made["output"]
    assert message["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert made["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]
    cut = chat["choices"][0]["finish_reason"] == "length"
    assert made["status"] == ("incomplete" if cut else "completed")
    reply = tooled.post("/v1/responses", stream=True, **asked)
    kinds, parts = zip(*map(named_event, reply.text.split("\n\n")[:-2]), strict=True)
    assert list(kinds) == [part["type"] for part in parts]
    assert [part["sequence_number"] for part in parts] == list(range(len(parts)))
    deltas = [part["delta"] for part in parts if part["type"] == "response.output_text.delta"]
    assert "".join(deltas) == message["content"][0]["text"]
    assert parts[-1]["response"]["output"][0]["content"] == message["content"]


def test_a_response_has_the_log_probabilities_of_the_chat(tooled: Serving) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "top_logprobs": 2}
    hi = [{"role": "user", "content": "Hi"}]
    chat = tooled.made("/v1/chat/completions", messages=hi, max_tokens=8, logprobs=True, **options)
    wanted = chat["choices"][0]["logprobs"]["content"]
    made = tooled.made("/v1/responses", input="Hi", max_output_tokens=8, **options)
    assert made["output"][0]["content"][0]["logprobs"] == wanted
    reply = tooled.post("/v1/responses", input="Hi", max_output_tokens=8, stream=True, **options)
    parts = [part for _, part in map(named_event, reply.text.split("\n\n")[:-2])]
    by_kind = {part["type"].removeprefix("response."): part for part in parts}
    assert by_kind["output_text.done"]["logprobs"] == wanted
    deltas = [token for part in parts if part["type"].endswith("text.delta") for token in part["logprobs"]]
    assert deltas and deltas == wanted[: len(deltas)]
    included = {"include": ["message.output_text.logprobs"], "max_output_tokens": 8, "temperature": 0.0}
    drawn = tooled.made("/v1/responses", input="Hi", **included)["output"][0]["content"][0]["logprobs"]
    assert drawn == [{**one, "top_logprobs": []} for one in wanted]


def named_event(text: str) -> tuple[str, Any]:
    kind, data = text.split("\n")
    return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_a_response_calls_tools_and_goes_on(tooled: Serving) -> None:
    tools = [{"type": "function", **tool["function"]} for tool in TOOL_LIST]
    asked: dict[str, Any] = {"tools": tools, "tool_choice": {"type": "function", "name": "weather"}}
    made = tooled.made("/v1/responses", input="Hi", **asked)
    (call,) = made["output"]
    assert (call["type"], call["name"]) == ("function_call", "weather")
    assert json.loads(call["arguments"])["where"] in ("here", "there")
    reply = tooled.post("/v1/responses", input="Hi", stream=True, **asked)
    done = [
        part for kind, part in map(named_event, reply.text.split("\n\n")[:-2]) if kind.endswith("item.done")
    ]
    assert done[0]["item"]["name"] == "weather"
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "42"}
    turns = [{"role": "user", "content": "Hi"}, call, result]
    after = tooled.made("/v1/responses", input=turns, max_output_tokens=2)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [called(call)]}]
    chat.append({"role": "tool", "tool_call_id": call["call_id"], "content": "42"})
    same = tooled.made("/v1/chat/completions", messages=chat, max_tokens=2)
    assert after["usage"]["input_tokens"] == same["usage"]["prompt_tokens"]
    refused = tooled.post("/v1/responses", input="Hi", previous_response_id="resp_1")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "previous_response_id")


def called(call: Any) -> Any:
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {"id": call["call_id"], "type": "function", "function": function}
