"""shoal.LLM: what an app asks of a model, in this process and over nodes, with the same answers."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.models import tiny_chat_checkpoint

import shoal
from shoal.answering import LocalEngine
from shoal.engine.convert import convert
from shoal.processes import NodeSpec, nodes

LIVELY: Any = {"temperature": 1.2, "seed": 9, "end": ()}
CHATS = ["Hello", "What is a shoal?", "Tell me about the sea, at length"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llm")
    convert(tiny_chat_checkpoint(directory / "checkpoint"), directory / "tiny")
    return directory / "tiny"


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[shoal.LLM]:
    with shoal.LLM(path, context=300) as opened:
        yield opened


def kv_bytes(llm: shoal.LLM) -> int:
    assert isinstance(llm._engine, LocalEngine)
    return llm._engine.stage.kv_bytes


def test_an_answer_is_that_of_the_engine(llm: shoal.LLM) -> None:
    made = llm.generate("Once upon", max_tokens=20, **LIVELY)
    prompt = llm.tokenize("Once upon")
    assert isinstance(llm._engine, LocalEngine)
    tokens = list(
        shoal.generate(
            llm._engine.stage, prompt, shoal.Sampling(temperature=1.2, seed=9), max_tokens=20, end=()
        )
    )
    assert list(made.tokens) == tokens
    assert made.text == llm.detokenize(tokens)
    assert made.finish_reason == "length"
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(prompt), 20)
    assert 0 < made.timings.first_token_s <= made.timings.seconds
    assert llm.generate(prompt, max_tokens=20, **LIVELY).tokens == made.tokens
    assert kv_bytes(llm) == 0


def test_answers_to_a_list_are_those_of_each_alone(llm: shoal.LLM) -> None:
    options: Any = {"max_tokens": 12, **LIVELY}
    each = [llm.chat(text, **options) for text in CHATS]
    together = llm.chat(CHATS, **options)
    assert [made.text for made in together] == [made.text for made in each]
    chats = [[{"role": "user", "content": text}] for text in CHATS]
    assert [made.tokens for made in llm.chat(chats, **options)] == [made.tokens for made in each]
    tokens = [llm.tokenize(text) for text in CHATS]
    assert [made.text for made in llm.generate(tokens, **options)] == [
        made.text for made in llm.generate(CHATS, **options)
    ]
    assert llm.generate([]) == []
    with pytest.raises(ValueError, match="single prompt"):
        llm.generate(CHATS, stream=True)


def test_a_stream_gives_the_text_piece_by_piece(llm: shoal.LLM) -> None:
    whole = llm.chat("Hello", max_tokens=30, **LIVELY)
    stream = llm.chat("Hello", stream=True, max_tokens=30, **LIVELY)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == whole.text == stream.completion.text
    assert stream.completion.tokens == whole.tokens
    assert stream.completion.finish_reason == "length"
    assert list(stream) == []


def test_a_stream_that_is_left_frees_its_state(llm: shoal.LLM) -> None:
    with llm.generate("Once", stream=True, max_tokens=None, **LIVELY) as stream:
        first = next(stream)
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.text.startswith(first)
    assert kv_bytes(llm) == 0
    stream = llm.generate("Once", stream=True, max_tokens=None, **LIVELY)
    next(stream)
    del stream
    gc.collect()
    assert kv_bytes(llm) == 0


def test_stop_strings_and_end_tokens(llm: shoal.LLM) -> None:
    options: Any = {"max_tokens": 40, **LIVELY}
    whole = llm.generate("Once", **options)
    stop = next(c for c in whole.text[3:] if c.isascii() and c.isprintable())
    before = whole.text[: whole.text.index(stop)]
    for given in (stop, [stop, "never to be seen"]):
        made = llm.generate("Once", stop=given, **options)
        assert (made.text, made.finish_reason) == (before, "stop")
    stream = llm.generate("Once", stop=stop, stream=True, **options)
    assert "".join(stream) == before
    assert stream.completion.finish_reason == "stop"
    both = llm.generate(["Once", "Once"], stop=stop, **options)
    assert [made.text for made in both] == [before, before]
    ended = llm.generate("Once", **{**options, "end": [whole.tokens[5]]})
    at = whole.tokens.index(whole.tokens[5])
    assert (ended.tokens, ended.finish_reason) == (whole.tokens[:at], "stop")
    assert kv_bytes(llm) == 0


def test_the_end_of_the_context(llm: shoal.LLM) -> None:
    made = llm.generate([5] * 290, max_tokens=None, **LIVELY)
    assert (len(made.tokens), made.finish_reason) == (10, "length")
    with pytest.raises(shoal.ContextError, match="the context holds 300"):
        llm.generate([5] * 300)
    with pytest.raises(shoal.ContextError, match="the context holds 300"):
        llm.generate([[5], [5] * 300])
    with pytest.raises(shoal.UnsupportedModelError, match="the token 99999"):
        llm.generate([99999])
    with pytest.raises(ValueError, match="top_p = 7"):
        llm.generate("Once", top_p=7)
    assert kv_bytes(llm) == 0


def test_a_seed_repeats_an_answer_and_without_one_it_varies(llm: shoal.LLM) -> None:
    def texts(**options: object) -> set[tuple[int, ...]]:
        return {
            llm.generate("Once", max_tokens=12, temperature=1.5, end=(), **options).tokens for _ in range(4)
        }

    assert len(texts(seed=3)) == 1
    assert len(texts()) > 1
    many = llm.generate(["Once"] * 4, max_tokens=12, temperature=1.5, end=())
    assert len({made.tokens for made in many}) > 1


def test_log_probabilities_of_an_answer(llm: shoal.LLM) -> None:
    made = llm.generate("Once", max_tokens=6, logprobs=3, **LIVELY)
    assert made.logprobs is not None and len(made.logprobs) == 6
    assert all(len(one.likeliest) == 3 for one in made.logprobs)
    whole = llm.score(made.text, prompt="Once")
    if whole.tokens == made.tokens:  # the text of some tokens is that of other tokens, too
        assert list(whole.logprobs) == pytest.approx([one.drawn for one in made.logprobs], abs=1e-4)
    stream = llm.generate("Once", stream=True, max_tokens=6, logprobs=0, **LIVELY)
    list(stream)
    assert stream.completion.logprobs is not None
    assert [one.drawn for one in stream.completion.logprobs] == [one.drawn for one in made.logprobs]
    both = llm.generate(["Once", "Once"], max_tokens=6, logprobs=3, **LIVELY)
    assert [one.logprobs for one in both] == [made.logprobs] * 2
    assert llm.generate("Once", max_tokens=6, **LIVELY).logprobs is None


def test_scores(llm: shoal.LLM) -> None:
    score = llm.score("Once upon a time")
    assert len(score.logprobs) == len(score.tokens) == llm.count("Once upon a time") - 1
    assert score.logprob == pytest.approx(sum(score.logprobs))
    assert score.perplexity > 1
    parts = llm.score(["Once", " upon"], prompt="Say: ")
    assert parts[0] == llm.score("Once", prompt="Say: ") != parts[1]
    with pytest.raises(shoal.ContextError):
        llm.score("x" * 400)
    assert kv_bytes(llm) == 0


def test_biases_and_penalties_of_an_answer(llm: shoal.LLM) -> None:
    made = llm.generate("Once", max_tokens=5, logit_bias={65: 1000.0})
    assert made.tokens == (65,) * 5
    varied = llm.generate("Once", max_tokens=20, frequency_penalty=1000.0, end=())
    assert len(set(varied.tokens)) == 20


def test_threads_share_a_model(llm: shoal.LLM) -> None:
    def ask(i: int) -> tuple[int, ...]:
        return llm.generate(f"number {i}", max_tokens=15, **LIVELY).tokens

    alone = [ask(i) for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone


def test_a_session_keeps_its_chat(llm: shoal.LLM) -> None:
    with llm.session(system="Be brief", max_tokens=8, **LIVELY) as session:
        for text in CHATS:
            before = list(session.messages)
            made = session.send(text)
            fresh = llm.chat(
                [*before, {"role": "user", "content": text}],
                max_tokens=8,
                **LIVELY,
            )
            assert (made.text, made.tokens) == (fresh.text, fresh.tokens)
            assert [turn.content for turn in session.messages[-2:]] == [text, made.text]
        pieces = session.stream("And then?")
        first = next(pieces)
        pieces.close()  # type: ignore[attr-defined]
        assert session.messages[-1].content.startswith(first)
        assert kv_bytes(llm) > 0
        turns = len(session.messages)
        with pytest.raises(shoal.ContextError):
            session.send("x" * 400)
        assert len(session.messages) == turns
        assert session.send("Go on").finish_reason == "length"
    assert kv_bytes(llm) == 0


def test_counting(llm: shoal.LLM) -> None:
    assert llm.count("Once upon") == len(llm.tokenize("Once upon"))
    chat = [{"role": "user", "content": "Hello"}]
    assert llm.count(chat) == llm.chat(chat, max_tokens=1).usage.prompt_tokens > llm.count("Hello")


def test_closing_ends_what_is_under_way(path: Path) -> None:
    llm = shoal.LLM(path)
    stream = llm.generate("Once", stream=True, max_tokens=None, end=(), temperature=1.0)
    next(stream)
    closing = threading.Thread(target=llm.close)
    closing.start()
    with pytest.raises(ValueError, match="has been closed"):
        for _ in stream:
            pass
    closing.join(20)
    stream.close()
    with pytest.raises(ValueError, match="has been closed"):
        llm.generate("Once")


def test_a_stream_that_cannot_begin_is_one_error(path: Path) -> None:
    llm = shoal.LLM(path)
    llm.close()
    with pytest.raises(ValueError, match="has been closed"):
        llm.generate("Once", stream=True)
    gc.collect()  # pytest fails on an exception in __del__


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(shoal.ModelFileError, match="no-such-model"):
        shoal.LLM("no-such-model")
    with pytest.raises(shoal.ShoalError, match="is not HOST:PORT"):
        shoal.LLM(tmp_path, nodes=["nowhere"])
    with pytest.raises(shoal.ShoalError, match="an address twice"):
        shoal.LLM(tmp_path, nodes=["one:7000", "one:7000"])


@pytest.mark.slow
def test_nodes_give_the_same_answers(llm: shoal.LLM, path: Path, tmp_path: Path) -> None:
    specs = [NodeSpec(f"n{i}", ram_mb=300, options=("--measure-seconds", "0.01")) for i in range(3)]
    options: Any = {"max_tokens": 12, **LIVELY}
    with nodes(path, specs, tmp_path) as running:
        addresses = ["{}:{}".format(*node.address) for node in running]
        with shoal.LLM(path, nodes=addresses, context=300) as far:
            for one, other in zip(far.chat(CHATS, **options), llm.chat(CHATS, **options), strict=True):
                assert (one.text, one.tokens, one.usage) == (other.text, other.tokens, other.usage)
            stream = far.generate("Once", stream=True, **options)
            assert "".join(stream) == llm.generate("Once", **options).text
            with far.generate("Once", stream=True, max_tokens=None, end=()) as left:
                next(left)
            assert left.completion.finish_reason == "cancelled"
            with far.session(max_tokens=8, **LIVELY) as there, llm.session(max_tokens=8, **LIVELY) as here:
                for text in CHATS:
                    assert there.send(text).tokens == here.send(text).tokens
            with pytest.raises(shoal.ContextError, match="the context holds 300"):
                far.generate([[5], [5] * 300])
            adjusted: Any = {"presence_penalty": 0.7, "logit_bias": {65: 2.0}, **options}
            assert far.generate("Once", **adjusted).tokens == llm.generate("Once", **adjusted).tokens
            with pytest.raises(shoal.ShoalError, match="log-probabilities"):
                far.generate("Once", logprobs=2)
            with pytest.raises(shoal.ShoalError, match="log-probabilities"):
                far.score("Once")
            with ThreadPoolExecutor(4) as pool:
                found = pool.map(lambda text: far.chat(text, **options).tokens, CHATS)
                assert list(found) == [made.tokens for made in llm.chat(CHATS, **options)]
