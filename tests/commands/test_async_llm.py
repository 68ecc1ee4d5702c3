"""shoal.AsyncLLM on asyncio and on trio: the answers of shoal.LLM, and cancels that end them."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.models import tiny_chat_model
from tests.patience import LIMIT

import shoal

LIVELY: Any = {"temperature": 1.2, "seed": 9, "end": ()}
CHATS = ["Hello", "What is a shoal?", "Tell me about the sea, at length"]
ENDLESS: Any = {**LIVELY, "max_tokens": None}

Use = Callable[[shoal.AsyncLLM, shoal.LLM], Awaitable[None]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("async"))


@pytest.fixture(params=["asyncio", "trio"])
def used(request: pytest.FixtureRequest, path: Path) -> Callable[[Use], None]:
    """Runs an async function with a model, on one of the event loops."""

    def run(use: Use) -> None:
        async def main() -> None:
            async with shoal.AsyncLLM(path, context=300, share_prefixes=False) as llm:
                with anyio.fail_after(LIMIT):
                    await use(llm, llm.llm)
                assert kv_bytes(llm) == 0

        before = set(threading.enumerate())  # other files of tests may keep a model for all of theirs
        anyio.run(main, backend=request.param)
        more = set(threading.enumerate()) - before
        assert [one for one in more if one.name.startswith("shoal")] == []

    return run


def kv_bytes(llm: shoal.AsyncLLM) -> int:
    engine: Any = llm.llm._engine
    held: int = engine.stage.kv_bytes
    return held


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_the_methods_are_those_of_llm() -> None:
    for name, method in inspect.getmembers(shoal.LLM, inspect.isfunction):
        other = {"close": "aclose"}.get(name, name)
        if not name.startswith("_"):
            found = getattr(shoal.AsyncLLM, other)
            assert inspect.iscoroutinefunction(found), name
            assert inspect.signature(found).parameters == inspect.signature(method).parameters, name
    given, offered = (inspect.signature(cls.__init__) for cls in (shoal.LLM, shoal.AsyncLLM))
    assert given == offered


def test_answers_are_those_of_llm(used: Callable[[Use], None]) -> None:
    async def use(llm: shoal.AsyncLLM, plain: shoal.LLM) -> None:
        options: Any = {"max_tokens": 12, **LIVELY}
        assert llm.context == 300
        made = await llm.generate("Once", **options)
        assert (made.text, made.tokens) == (
            (again := plain.generate("Once", **options)).text,
            again.tokens,
        )
        many = await llm.chat(CHATS, **options)
        assert [one.text for one in many] == [one.text for one in plain.chat(CHATS, **options)]
        assert await llm.score("Once upon") == plain.score("Once upon")
        assert (await llm.embed(CHATS) == plain.embed(CHATS)).all()
        labels = ["good", "bad"]
        assert await llm.classify("Once", labels) == plain.classify("Once", labels)
        even = await llm.generate("Once", allow=lambda answer: range(0, 256, 2), **options)
        assert len(even.tokens) == 12 and not any(token % 2 for token in even.tokens)
        draws = await llm.generate("Once", n=3, **options)
        assert [one.tokens for one in draws] == [one.tokens for one in plain.generate("Once", n=3, **options)]
        draws = await llm.generate("Once", n=2, **options)
        assert [one.tokens for one in draws] == [one.tokens for one in plain.generate("Once", n=2, **options)]
        assert await llm.tokenize("Once") == plain.tokenize("Once")
        assert await llm.detokenize(made.tokens) == plain.detokenize(made.tokens)
        assert await llm.count("Once") == plain.count("Once")
        with pytest.raises(shoal.ContextError, match="the context holds 300"):
            await llm.generate([5] * 300)
        with pytest.raises(ValueError, match="top_p = 7"):
            await llm.generate("Once", top_p=7)

    used(use)


def test_many_tasks_ask_at_the_same_time(used: Callable[[Use], None]) -> None:
    async def use(llm: shoal.AsyncLLM, plain: shoal.LLM) -> None:
        found: dict[int, tuple[int, ...]] = {}

        async def ask(i: int) -> None:
            found[i] = (await llm.generate(f"number {i}", max_tokens=15, **LIVELY)).tokens

        async with anyio.create_task_group() as tasks:
            for i in range(12):
                tasks.start_soon(ask, i)
        for i in range(12):
            assert plain.generate(f"number {i}", max_tokens=15, **LIVELY).tokens == found[i]

    used(use)


def test_streams(used: Callable[[Use], None]) -> None:
    async def use(llm: shoal.AsyncLLM, plain: shoal.LLM) -> None:
        whole = plain.chat("Hello", max_tokens=30, **LIVELY)
        stream = await llm.chat("Hello", stream=True, max_tokens=30, **LIVELY)
        pieces = [piece async for piece in stream]
        assert len(pieces) > 1
        assert "".join(pieces) == whole.text == stream.completion.text
        assert (stream.completion.tokens, stream.completion.finish_reason) == (whole.tokens, "length")
        assert [piece async for piece in stream] == []
        stop = next(c for c in whole.text[3:] if c.isascii() and c.isprintable())
        stream = await llm.chat("Hello", stream=True, stop=stop, max_tokens=30, **LIVELY)
        assert "".join([piece async for piece in stream]) == whole.text[: whole.text.index(stop)]
        assert stream.completion.finish_reason == "stop"
        async with await llm.generate("Once", stream=True, **ENDLESS) as stream:
            first = await anext(stream)
        assert stream.completion.text.startswith(first)
        assert stream.completion.finish_reason == "cancelled"
        assert kv_bytes(llm) == 0

    used(use)


def test_a_session(used: Callable[[Use], None]) -> None:
    async def use(llm: shoal.AsyncLLM, plain: shoal.LLM) -> None:
        options: Any = {"max_tokens": 8, **LIVELY}
        async with await llm.session(system="Be brief", **options) as session:
            with plain.session(system="Be brief", **options) as other:
                for text in CHATS:
                    assert (await session.send(text)).tokens == other.send(text).tokens
                async with aclosing(session.stream("And then?")) as pieces:
                    assert await anext(pieces) == next(iter(other.stream("And then?")))
                assert [turn.role for turn in session.messages[-2:]] == ["user", "assistant"]

    used(use)


def test_a_cancel_ends_what_a_call_has_begun(used: Callable[[Use], None]) -> None:
    async def use(llm: shoal.AsyncLLM, plain: shoal.LLM) -> None:
        async def begun(call: Callable[[], Awaitable[object]], tokens: int) -> None:
            """Cancels the call when the engine has made some tokens."""
            drawn, made = 0, anyio.Event()
            engine: Any = plain._engine
            append = engine._batcher._append

            def counting(*arguments: Any) -> None:
                nonlocal drawn
                append(*arguments)
                drawn += 1
                if drawn == tokens:
                    soon(made.set)

            loop: Any = anyio.lowlevel.current_token().native_token
            soon = getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon
            engine._batcher._append = counting
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call)
                await made.wait()
                tasks.cancel_scope.cancel()
            del engine._batcher._append

        await begun(lambda: llm.generate("Once", **ENDLESS), 3)
        assert kv_bytes(llm) == 0
        await begun(lambda: llm.generate(["Once"] * 20, **ENDLESS), 30)
        assert kv_bytes(llm) == 0

        async def read() -> None:
            stream = await llm.generate("Once", stream=True, **ENDLESS)
            async for _ in stream:
                pass

        await begun(read, 3)
        assert kv_bytes(llm) == 0
        async with await llm.session(**ENDLESS) as session:
            await begun(lambda: session.send("Hello"), 3)
            assert session.messages == []
            with anyio.CancelScope() as scope:
                async with aclosing(session.stream("Hello")) as pieces:
                    async for _ in pieces:
                        scope.cancel()
            assert [turn.role for turn in session.messages] == ["user", "assistant"]
            assert 0 < len(session.messages[1].content) < 250
        assert (await llm.generate("Once", max_tokens=3)).usage.completion_tokens == 3

    used(use)


def test_asyncios_own_cancel(path: Path) -> None:
    async def main() -> None:
        async with shoal.AsyncLLM(path, share_prefixes=False) as llm:
            task: asyncio.Future[Any] = asyncio.ensure_future(llm.generate(["Once"] * 3, **ENDLESS))
            await asyncio.to_thread(wait_until, lambda: kv_bytes(llm) > 0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert kv_bytes(llm) == 0
            stream = await llm.generate("Once", stream=True, **ENDLESS)
            await anext(stream)
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)  # it begins
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert kv_bytes(llm) == 0
            both = await asyncio.gather(*[llm.count("Once"), llm.count("Once upon")])
            assert both == [4, 9]

    asyncio.run(main())


def test_a_model_is_opened_and_closed_by_hand(path: Path) -> None:
    async def main() -> None:
        llm = shoal.AsyncLLM(path)
        with pytest.raises(RuntimeError, match="the model is not open: use `async with"):
            await llm.count("Once")
        assert await (await llm.open()).count("Once") == 4
        plain = llm.llm
        async with shoal.AsyncLLM.over(plain) as other:
            assert await other.count("Once") == 4
        assert plain.generate("Once", max_tokens=2).usage.completion_tokens == 2
        await llm.aclose()
        with pytest.raises(ValueError, match="has been closed"):
            plain.generate("Once")
        with anyio.CancelScope() as scope:
            scope.cancel()
            await llm.open()
        with pytest.raises(RuntimeError, match="not open"):
            _ = llm.context
        with pytest.raises(shoal.ModelFileError, match="no-such-model"):
            await shoal.AsyncLLM("no-such-model").open()

    anyio.run(main)


def test_without_anyio_there_is_one_line() -> None:
    code = "import sys; sys.modules['anyio'] = None; import shoal; shoal.AsyncLLM"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        'MissingDependencyError: shoal.AsyncLLM needs the package anyio: pip install "shoal[async]"'
    )
