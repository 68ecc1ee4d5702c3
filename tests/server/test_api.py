"""The API over a real socket: every answer is that of `shoal.LLM`."""

from __future__ import annotations

import base64
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.engine.tokenizer import Tokenizer
from shoal.server.http import _Connection

from .conftest import Serving, until

LIVELY: dict[str, Any] = {"temperature": 1.2, "seed": 9, "max_tokens": 12}
HELLO = [{"role": "user", "content": "Hello"}]


def events(text: str) -> list[Any]:
    """The parts of a stream, which must end as it should."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_chat_is_that_of_the_library(served: Serving) -> None:
    made = served.made("/v1/chat/completions", messages=HELLO, **LIVELY)
    expected = served.llm.chat(HELLO, **LIVELY)
    (choice,) = made["choices"]
    assert choice["message"]["content"] == expected.text
    assert choice["finish_reason"] == expected.finish_reason
    assert made["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert made["usage"]["completion_tokens"] == len(expected.tokens)
    assert made["object"] == "chat.completion"
    counts = f", {expected.usage.prompt_tokens}+{len(expected.tokens)} tokens"
    until(lambda: served.log and served.log[-1].endswith(counts))
    assert served.log[-1].startswith("127.0.0.1 POST /v1/chat/completions 200, ")


def test_a_stream_has_the_same_text_and_says_its_usage(served: Serving) -> None:
    options = {**LIVELY, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = served.made("/v1/chat/completions", messages=HELLO, **options)
    reply = served.post(
        "/v1/chat/completions", messages=HELLO, stream=True, stream_options={"include_usage": True}, **options
    )
    assert reply.headers["content-type"] == "text/event-stream"
    *parts, last = events(reply.text)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert last["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    for i, choice in enumerate(whole["choices"]):
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == i]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(one["delta"].get("content", "") for one in own) == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        found = [token for one in own if one["logprobs"] for token in one["logprobs"]["content"]]
        assert found == choice["logprobs"]["content"]
        assert all(len(token["top_logprobs"]) == 2 for token in found)
    assert whole["choices"][0]["message"] != whole["choices"][1]["message"]  # seeds of their own


def test_stop_strings_biases_and_parts_of_messages(served: Serving) -> None:
    expected = served.llm.chat(HELLO, **LIVELY)
    stop = expected.text[3:5]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    made = served.made("/v1/chat/completions", messages=parts, stop=[stop], **LIVELY)
    assert made["choices"][0]["message"]["content"] == expected.text[: expected.text.index(stop)]
    assert made["choices"][0]["finish_reason"] == "stop"
    token = served.llm.tokenize("z")[0]
    biased = served.made("/v1/chat/completions", messages=HELLO, logit_bias={token: 100}, **LIVELY)
    assert biased["choices"][0]["message"]["content"] == "z" * 12


def test_completions_echo_their_prompts_with_log_probabilities(served: Serving) -> None:
    text = "The sea is"
    made = served.made("/v1/completions", prompt=text, echo=True, logprobs=1, max_tokens=1, temperature=0)
    (choice,) = made["choices"]
    expected = served.llm.generate(text, max_tokens=1, logprobs=1, end=())
    score = served.llm.score(text)
    assert choice["text"] == text + expected.text
    found = choice["logprobs"]
    assert found["token_logprobs"][0] is None
    np.testing.assert_allclose(found["token_logprobs"][1:-1], score.logprobs, atol=1e-6)
    assert expected.logprobs is not None
    assert found["token_logprobs"][-1] == pytest.approx(expected.logprobs[0].drawn)
    assert "".join(found["tokens"][:-1]) == text
    assert found["text_offset"][:-1] == list(range(len(text)))
    none = served.made("/v1/completions", prompt=[text, text], echo=True, logprobs=0, max_tokens=0)
    assert [one["text"] for one in none["choices"]] == [text, text]
    assert none["choices"][1]["logprobs"]["token_logprobs"] == found["token_logprobs"][:-1]
    assert none["usage"]["completion_tokens"] == 0


def test_completions_of_several_prompts_stream_together(served: Serving) -> None:
    ids = served.llm.tokenize("A forest")
    options: Any = {"prompt": [ids, served.llm.tokenize("The sea")], "n": 2, **LIVELY}
    whole = served.made("/v1/completions", **options)
    parts = events(served.post("/v1/completions", stream=True, **options).text)
    for i, choice in enumerate(whole["choices"]):
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == i]
        assert "".join(one["text"] for one in own) == choice["text"]
    assert whole["choices"][0]["text"] == served.llm.generate(ids, **LIVELY).text
    assert whole["usage"]["prompt_tokens"] == len(ids) + len(served.llm.tokenize("The sea"))


def test_a_socket_that_takes_a_part_at_a_time_gets_all(
    served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a client that reads late: what it does not take at once goes before what comes later."""
    taken = _Connection._at_once
    monkeypatch.setattr(_Connection, "_at_once", lambda self, data: taken(self, data[: len(data) // 3]))
    options: Any = {"prompt": "A", "n": 4, "logprobs": 2, **LIVELY}
    whole = served.made("/v1/completions", **options)
    parts = events(served.post("/v1/completions", stream=True, **options).text)
    for i, choice in enumerate(whole["choices"]):
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == i]
        assert "".join(one["text"] for one in own) == choice["text"]
        tokens = [token for one in own for token in one["logprobs"]["tokens"]]
        assert tokens == choice["logprobs"]["tokens"]


def test_embeddings_and_tokens(served: Serving) -> None:
    texts = ["A boat", "Butter"]
    made = served.made("/v1/embeddings", input=texts)
    expected = served.llm.embed(texts)
    np.testing.assert_allclose([one["embedding"] for one in made["data"]], expected, atol=1e-6)
    packed = served.made("/v1/embeddings", input=served.llm.tokenize("A boat"), encoding_format="base64")
    vector = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(vector, expected[0])
    tokens = served.made("/tokenize", content="A boat")["tokens"]
    assert tokens == served.llm.tokenizer.encode("A boat", special=False)
    assert served.made("/detokenize", tokens=tokens)["content"] == "A boat"


def test_answers_are_what_a_schema_says(served: Serving) -> None:
    schema = {
        "type": "object",
        "properties": {"fish": {"enum": ["cod", "herring"]}, "fresh": {"type": "boolean"}},
        "required": ["fish", "fresh"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "fish", "schema": schema}}
    options: dict[str, Any] = {**LIVELY, "max_tokens": 200, "n": 3}
    made = served.made("/v1/chat/completions", messages=HELLO, response_format=form, **options)
    for choice in made["choices"]:
        assert choice["finish_reason"] == "stop"
        found = json.loads(choice["message"]["content"])
        assert found["fish"] in ("cod", "herring")
        assert isinstance(found["fresh"], bool)
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "fish"}}}
    reply = served.post("/v1/chat/completions", messages=HELLO, response_format=wrong)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "response_format")


def test_models_health_and_metrics(served: Serving) -> None:
    with served.client as client:
        (model,) = client.get("/v1/models").json()["data"]
        assert client.get(f"/v1/models/{model['id']}").json() == model
        assert client.get("/v1/models/gpt").status_code == 404
        assert client.get("/health").json() == {"status": "ok"}
        assert client.head("/health").status_code == 200
        before = client.get("/metrics").text
        client.post("/v1/completions", json={"model": model["id"], "prompt": "Hi", **LIVELY})
        after = client.get("/metrics").text

    def count(text: str, name: str) -> float:
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    name = 'shoal_requests_total{path="/v1/completions",status="200"}'
    assert count(after, name) == count(before, name) + 1
    assert count(after, 'shoal_tokens_total{kind="answer"}') > count(
        before, 'shoal_tokens_total{kind="answer"}'
    )
    reply = served.post("/v1/chat/completions", model="gpt", messages=HELLO)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    reply = served.post("/v1/completions", prompt="x" * 400)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_long_text_that_becomes_tokens_lets_other_threads_run(tiny: Path) -> None:
    """Else one request of 8 MB would stop the server for seconds."""
    tokenizer, words = Tokenizer.open(tiny), "word and other things " * 50_000
    begun, ended, turns = threading.Event(), threading.Event(), 0

    def encode() -> None:
        begun.set()
        assert len(tokenizer.encode(words)) > 100_000
        ended.set()

    thread = threading.Thread(target=encode)
    thread.start()
    begun.wait()
    while not ended.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 20
    short, long = (tokenizer.encode("a b " * count, special=False) for count in (10_000, 20_000))
    assert long == short * 2


def test_each_text_of_a_request_takes_a_place(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, taken = served.app.served.limiter.queue, list[int]()
    join = queue.join

    def joined(client: str, slots: int) -> object:
        taken.append(slots)
        return join(client, slots)

    monkeypatch.setattr(queue, "join", joined)
    served.made("/v1/embeddings", input=["a", "b", "c"])
    served.made("/v1/completions", prompt=["a b", "c d"], echo=True, logprobs=1, max_tokens=0)
    assert taken == [3, 2]
