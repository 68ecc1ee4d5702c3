"""shoal.LLM: what an app asks of a model, in this process and over nodes, with the same answers."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.models import tiny_chat_model

import shoal
from shoal import house
from shoal.answering import LocalEngine
from shoal.processes import NodeSpec, nodes

LIVELY: Any = {"temperature": 1.2, "seed": 9, "end": ()}
CHATS = ["Hello", "What is a shoal?", "Tell me about the sea, at length"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def llm(path: Path, request: pytest.FixtureRequest) -> Iterator[shoal.LLM]:
    with shoal.LLM(path, context=300, share_prefixes=getattr(request, "param", True)) as opened:
        yield opened


leaves_nothing = pytest.mark.parametrize("llm", [False], ids=["unshared"], indirect=True)
"""Without shared prefixes no answer leaves keys and values for others."""


def kv_bytes(llm: shoal.LLM) -> int:
    assert isinstance(llm._engine, LocalEngine)
    return llm._engine.stage.kv_bytes


@leaves_nothing
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


@leaves_nothing
def test_a_stream_that_is_left_frees_its_state(llm: shoal.LLM) -> None:
    with llm.generate("Once", stream=True, max_tokens=None, **LIVELY) as stream:
        first = next(stream)
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.text.startswith(first)
    assert kv_bytes(llm) == 0
    stream.close()
    assert stream.completion.finish_reason == "cancelled"
    stream = llm.generate("Once", stream=True, max_tokens=None, **LIVELY)
    next(stream)
    del stream
    gc.collect()
    assert kv_bytes(llm) == 0


@leaves_nothing
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


@leaves_nothing
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


@leaves_nothing
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


def test_several_draws_compute_their_prompt_once(llm: shoal.LLM) -> None:
    options: Any = {"max_tokens": 10, **LIVELY}
    text = "A long text that no other test has, for several answers"
    several = llm.generate(text, n=4, **options)
    assert [made.usage.cached_tokens for made in several] == [0] + [llm.count(text) - 1] * 3
    for i, made in enumerate(several):
        assert made.tokens == llm.generate(text, **{**options, "seed": 9 + i}).tokens
    assert len({made.tokens for made in several}) == 4
    assert len(llm.chat("Hello", n=2, max_tokens=3)) == 2
    for wrong, words in (({"n": 0}, "n = 0"), ({"n": 2, "stream": True}, "cannot be streamed")):
        with pytest.raises(ValueError, match=words):
            llm.generate("Once", **wrong)
    with pytest.raises(ValueError, match="n needs a single prompt"):
        llm.chat(CHATS, n=2)  # type: ignore[call-overload]


def test_the_next_turn_of_a_chat_computes_what_is_new(llm: shoal.LLM) -> None:
    turns = [{"role": "system", "content": "You are terse. " * 5}, {"role": "user", "content": "And now?"}]
    first = llm.chat(turns, max_tokens=8, temperature=0, logit_bias={70: 100.0})  # text that is these tokens
    assert first.usage.cached_tokens == 0
    turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Go on"}]
    second = llm.chat(turns, max_tokens=8)
    held = first.usage.prompt_tokens + first.usage.completion_tokens - 1  # the last one was not run
    assert second.usage.cached_tokens == held
    with llm.session(system="You are terse. " * 5, max_tokens=4, end=()) as session:
        one, two = session.send("And now?"), session.send("And then?")
    assert one.usage.cached_tokens >= first.usage.prompt_tokens - 1
    assert two.usage.cached_tokens >= one.usage.prompt_tokens


@pytest.mark.parametrize("how", ["streamed", "whole", "listed"])
def test_an_answer_that_ends_at_a_stop_string_leaves_its_state(llm: shoal.LLM, how: str) -> None:
    text = f"A text that is {how}, and stopped by a word in its answer"
    says_a = {llm.tokenizer.encode("A", special=False)[-1]: 1000.0}
    options: Any = {"max_tokens": 200, "stop": "AA", "temperature": 0, "logit_bias": says_a}
    if how == "streamed":
        assert "".join(llm.generate(text, stream=True, **options)) == ""
    else:
        made = llm.generate([text] if how == "listed" else text, **options)
        assert (made[0] if isinstance(made, list) else made).finish_reason == "stop"
    assert llm.generate(text, max_tokens=1).usage.cached_tokens == llm.count(text) - 1


@leaves_nothing
def test_nothing_is_shared_that_should_not_be(llm: shoal.LLM) -> None:
    several = llm.generate("A text for several answers", n=3, max_tokens=4)
    assert [made.usage.cached_tokens for made in several] == [0] * 3
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


@leaves_nothing
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


def test_a_raw_session_continues_each_message_as_it_is(llm: shoal.LLM) -> None:
    with llm.session(system="Be brief", raw=True, max_tokens=8, **LIVELY) as session:
        for text in ("Once upon", "a time", "Once upon"):
            assert session.send(text).tokens == llm.generate(text, max_tokens=8, **LIVELY).tokens
        assert [turn.role for turn in session.messages[:3]] == ["system", "user", "assistant"]


def test_an_engine_that_is_open_stays_open(llm: shoal.LLM) -> None:
    with shoal.LLM.over(llm.model, llm._engine, 40) as other:
        made = other.generate("Once", max_tokens=None, end=())
        assert made.usage.prompt_tokens + len(made.tokens) == 40
    assert llm.generate("Once", max_tokens=4, end=()).tokens == made.tokens[:4]


def test_the_speed_of_an_answer_is_that_of_its_tokens(llm: shoal.LLM) -> None:
    made = llm.generate("Once", max_tokens=8, end=())
    speed = 7 / (made.timings.seconds - made.timings.first_token_s)
    assert made.tokens_per_s == pytest.approx(speed)
    assert made.summary().endswith(f"8 tokens, {speed:.1f} tokens/s")
    one = llm.generate("Once", max_tokens=1, end=())
    assert one.tokens_per_s is None
    assert one.summary().startswith(f"{one.usage.prompt_tokens} tokens of prompt, first token after ")
    assert one.summary().endswith(" s, 1 tokens")


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
                assert (one.text, one.tokens) == (other.text, other.tokens)
                assert one.usage.prompt_tokens == other.usage.prompt_tokens
            several = far.generate("A text for several answers over nodes", n=3, **options)
            assert [made.tokens for made in several] == [
                made.tokens for made in llm.generate("A text for several answers over nodes", n=3, **options)
            ]
            shared = len(several) * [several[0].usage.prompt_tokens - 1]
            assert sorted(made.usage.cached_tokens for made in several) == [0, *shared[1:]]
            text = "A text for an answer that is stopped by a word"
            a = {far.tokenizer.encode("A", special=False)[-1]: 1000.0}
            assert far.generate(text, stop="A", max_tokens=100, logit_bias=a).finish_reason == "stop"
            assert far.generate(text, max_tokens=1).usage.cached_tokens == far.count(text) - 1
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
            told, same = (one.generate("Once", logprobs=2, **adjusted) for one in (far, llm))
            assert told.logprobs == same.logprobs is not None and len(told.logprobs or ()) == len(told.tokens)
            texts = ["Once upon a time there was a fish", "two", "a"]
            assert far.score(texts) == llm.score(texts)
            assert far.score(texts, prompt="Once") == llm.score(texts, prompt="Once")
            chosen = {"allow": lambda tokens: range(len(tokens), 200, 3), "max_tokens": 9, "temperature": 1.5}
            masked = [one.generate("Once", seed=3, **chosen).tokens for one in (far, llm)]
            assert masked[0] == masked[1]
            assert all(token in range(i, 200, 3) for i, token in enumerate(masked[0]))
            with pytest.raises(ValueError, match="no token may follow"):
                far.generate("Once", allow=lambda tokens: [])
            with ThreadPoolExecutor(4) as pool:
                found = pool.map(lambda text: far.chat(text, **options).tokens, CHATS)
                assert list(found) == [made.tokens for made in llm.chat(CHATS, **options)]


@pytest.mark.slow
def test_a_paired_device_reaches_insecure_nodes_only_when_told_to(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    house.open_or_create("laptop")
    spec = NodeSpec("n", ram_mb=300, options=("--measure-seconds", "0.01", "--insecure"))

    async def tokens(**options: Any) -> tuple[int, ...]:
        async with shoal.AsyncLLM(path, nodes=addresses, context=300, **options) as far:
            return (await far.generate("Once", max_tokens=4, **LIVELY)).tokens

    with nodes(path, [spec], tmp_path) as running:
        addresses = ["{}:{}".format(*node.address) for node in running]
        with pytest.raises(shoal.UntrustedError):
            shoal.LLM(path, nodes=addresses, context=300)
        with shoal.LLM(path, nodes=addresses, context=300, insecure=True) as far:
            made = far.generate("Once", max_tokens=4, **LIVELY)
        assert trio.run(partial(tokens, insecure=True)) == made.tokens
