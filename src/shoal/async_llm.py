"""`shoal.AsyncLLM`: `shoal.LLM` for programs that run on asyncio or trio.

Each call runs the method of `LLM` of the same name in a thread of its own, and waits for it without blocking
the event loop. A call that is cancelled ends what it has begun, waits until that is freed, and only then
raises. A stream needs no thread: its tokens wake the task that reads it."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from .answer_text import Item, Stream
from .answering import Engine, Stop, stop_all
from .chat_session import ChatSession
from .engine.batch import ReadRequest
from .engine.batcher import PutResult
from .engine.chat import Message
from .engine.errors import MissingDependencyError, ShoalError
from .engine.model_directory import Model
from .llm import LLM, Options, Turn
from .readings import PROMPT, Labels, Pooling
from .results import Classification, Completion, Score

try:
    import anyio
    import anyio.lowlevel
except ImportError:
    raise MissingDependencyError(
        'shoal.AsyncLLM needs the package anyio: pip install "shoal[async]"'
    ) from None

T = TypeVar("T")


class AsyncLLM:
    """A model that answers, for asyncio and trio.

        async with shoal.AsyncLLM("smollm2-135m") as llm:
            print((await llm.chat("What is a shoal?")).text)

    The arguments, the methods and the results are those of `LLM`, and every method is awaited. The model is
    opened on entering the block, or by `open`. Any number of tasks may use it at the same time: what they ask
    is computed together. Each call that waits has a thread.

    Cancelling a call ends its computation after the current op (on nodes: the current chunk of rows), and
    frees its state before the call returns."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        nodes: Sequence[str] = (),
        context: int | None = None,
        backend: str = "auto",
        isa: str = "auto",
        threads: int | None = None,
        kv_bytes: int | None = None,
        resident: bool | None = None,
        share_prefixes: bool = True,
        insecure: bool = False,
        private: bool | None = None,
        house: bool = False,
    ) -> None:
        self._opening = partial(
            LLM,
            model,
            nodes=nodes,
            context=context,
            backend=backend,
            isa=isa,
            threads=threads,
            kv_bytes=kv_bytes,
            resident=resident,
            share_prefixes=share_prefixes,
            insecure=insecure,
            private=private,
            house=house,
        )
        self._llm: LLM | None = None
        self._owned = True

    @classmethod
    def over(cls, llm: LLM) -> AsyncLLM:
        """An `LLM` that is open already, and stays open."""
        made = cls(llm.model.path)
        made._llm, made._owned = _read(llm), False
        return made

    async def open(self) -> Self:
        """Opens the model, unless it is open. A cancelled call waits until it can close it again. Errors as
        for `LLM`."""
        if self._llm is None:
            try:
                await _in_thread(self._open)
            except BaseException:
                await self.aclose()
                raise
        return self

    def _open(self) -> None:
        self._llm = _read(self._opening())

    async def aclose(self) -> None:
        """Ends all answers, and frees the memory or leaves the nodes."""
        llm, self._llm = self._llm, None
        if llm is not None and self._owned:
            with anyio.CancelScope(shield=True):
                await _in_thread(llm.close)

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def llm(self) -> LLM:
        """The `LLM` behind this one, for other threads. RuntimeError: the model is not open."""
        if self._llm is None:
            raise RuntimeError("the model is not open: use `async with shoal.AsyncLLM(…) as llm`")
        return self._llm

    @property
    def model(self) -> Model:
        """The model's directory."""
        return self.llm.model

    @property
    def context(self) -> int:
        """See LLM.context."""
        return self.llm.context

    async def tokenize(self, text: str) -> list[int]:
        """See LLM.tokenize."""
        return await _in_thread(partial(self.llm.tokenize, text))

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """See LLM.detokenize."""
        return await _in_thread(partial(self.llm.detokenize, tokens))

    async def count(self, prompt: str | Sequence[Turn]) -> int:
        """See LLM.count."""
        return await _in_thread(partial(self.llm.count, prompt))

    @overload  # as in LLM
    async def generate(  # type: ignore[overload-overlap]
        self, prompt: str | Sequence[int], *, stream: Literal[False] = ..., **options: Unpack[Options]
    ) -> Completion: ...
    @overload
    async def generate(
        self, prompt: str | Sequence[int], *, stream: Literal[True], **options: Unpack[Options]
    ) -> AsyncStream: ...
    @overload
    async def generate(
        self, prompt: str | Sequence[int], *, n: int, **options: Unpack[Options]
    ) -> list[Completion]: ...
    @overload
    async def generate(
        self, prompt: Sequence[str] | Sequence[Sequence[int]], **options: Unpack[Options]
    ) -> list[Completion]: ...
    async def generate(
        self, prompt: Any, *, stream: bool = False, n: int | None = None, **options: Unpack[Options]
    ) -> Any:
        """See LLM.generate."""
        return await self._call(LLM.generate, prompt, stream=stream, n=n, **options)

    @overload
    async def chat(  # type: ignore[overload-overlap]
        self, messages: str | Sequence[Turn], *, stream: Literal[False] = ..., **options: Unpack[Options]
    ) -> Completion: ...
    @overload
    async def chat(
        self, messages: str | Sequence[Turn], *, stream: Literal[True], **options: Unpack[Options]
    ) -> AsyncStream: ...
    @overload
    async def chat(
        self, messages: str | Sequence[Turn], *, n: int, **options: Unpack[Options]
    ) -> list[Completion]: ...
    @overload
    async def chat(
        self, messages: Sequence[str] | Sequence[Sequence[Turn]], **options: Unpack[Options]
    ) -> list[Completion]: ...
    async def chat(
        self, messages: Any, *, stream: bool = False, n: int | None = None, **options: Unpack[Options]
    ) -> Any:
        """See LLM.chat."""
        return await self._call(LLM.chat, messages, stream=stream, n=n, **options)

    @overload
    async def score(  # type: ignore[overload-overlap]
        self, text: str, *, prompt: str = ...
    ) -> Score: ...
    @overload
    async def score(self, text: Sequence[str], *, prompt: str = ...) -> list[Score]: ...
    async def score(self, text: str | Sequence[str], *, prompt: str = "") -> Score | list[Score]:
        """See LLM.score."""
        found: Score | list[Score] = await self._call(LLM.score, text, prompt=prompt)
        return found

    async def embed(
        self, texts: str | Sequence[str], *, pooling: Pooling = "mean", normalize: bool = True
    ) -> NDArray[np.float32]:
        """See LLM.embed."""
        found: NDArray[np.float32] = await self._call(LLM.embed, texts, pooling=pooling, normalize=normalize)
        return found

    @overload
    async def classify(  # type: ignore[overload-overlap]
        self, texts: str, labels: Labels | None = ..., *, prompt: str = ..., neutral: str | None = ...
    ) -> Classification: ...
    @overload
    async def classify(
        self,
        texts: Sequence[str],
        labels: Labels | None = ...,
        *,
        prompt: str = ...,
        neutral: str | None = ...,
    ) -> list[Classification]: ...
    async def classify(
        self,
        texts: str | Sequence[str],
        labels: Labels | None = None,
        *,
        prompt: str = PROMPT,
        neutral: str | None = None,
    ) -> Classification | list[Classification]:
        """See LLM.classify."""
        found: Classification | list[Classification] = await self._call(
            LLM.classify, texts, labels, prompt=prompt, neutral=neutral
        )
        return found

    async def session(
        self, *, system: str | None = None, raw: bool = False, **options: Unpack[Options]
    ) -> AsyncChatSession:
        """See LLM.session."""
        opening = partial(self.llm.session, system=system, raw=raw, **options)
        return AsyncChatSession(await _in_thread(opening))

    async def _call(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What a method of LLM returns. Cancelled, it ends whatever the method has begun."""
        view = copy.copy(self.llm)
        view._engine = ends = _Ends(view._engine)
        result = await _in_thread(partial(method, view, *arguments, **options), ends.stop)
        return AsyncStream(result) if isinstance(result, Stream) else result


class AsyncStream:
    """The text of an answer, piece by piece; an asynchronous iterator. Closing it, leaving its `async with`
    block, or cancelling who waits for a piece ends the answer and frees its state. `completion` is the answer
    so far, and the whole one after the end."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._news = stream, _News()
        stream._items.wake = self._news.tell

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        """See Stream."""
        answer = self._stream._answer
        while not answer.finished:
            text = answer.take(await self._item())
            if answer.finished:
                await self.aclose()
            if text:
                return text
        if text := answer.rest():
            return text
        raise StopAsyncIteration

    async def _item(self) -> Item:
        queue = self._stream._items.queue
        try:
            await anyio.lowlevel.checkpoint()
            while queue.empty():
                await self._news.wait()
        except BaseException:  # cancelled
            await self.aclose()
            raise
        return queue.get_nowait()

    async def aclose(self) -> None:
        """Ends the answer."""
        self._stream._answer.cancel()
        with anyio.CancelScope(shield=True):
            await _in_thread(self._stream.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def completion(self) -> Completion:
        """The answer."""
        return self._stream.completion


class AsyncChatSession:
    """A chat whose keys and values are kept: `ChatSession`, awaited. A message whose `send` was cancelled has
    not joined the chat."""

    def __init__(self, session: ChatSession) -> None:
        self._session = session

    @property
    def messages(self) -> list[Message]:
        """The chat so far."""
        return self._session.messages

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Frees the chat's keys and values."""
        with anyio.CancelScope(shield=True):
            await _in_thread(self._session.close)

    async def send(self, text: str) -> Completion:
        """See ChatSession.send."""
        made = await _in_thread(partial(self._session._answer, text))
        sending = partial(self._session._send, text, made)
        return await _in_thread(sending, partial(self._session._stop, made))

    async def stream(self, text: str) -> AsyncIterator[str]:
        """See ChatSession.stream. To leave it early, close it (contextlib.aclosing)."""
        made = await _in_thread(partial(self._session._answer, text))
        pieces = self._session._stream(text, made)
        stop = partial(self._session._stop, made)
        try:
            while (piece := await _in_thread(partial(next, pieces, None), stop)) is not None:
                yield piece
        finally:
            with anyio.CancelScope(shield=True):
                await _in_thread(pieces.close)


def _read(llm: LLM) -> LLM:
    """Opens the tokenizer and the template of a model: each call has a view of it, and all share these."""
    _ = llm.tokenizer
    with suppress(ShoalError):  # a model need not have a template
        _ = llm.template
    return llm


class _Ends:
    """An engine, for one call, which can end everything that the call has begun."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._stops, self._ended = engine, list[Stop](), False

    def begin(self, *arguments: Any, **options: Any) -> Stop:
        """See Engine."""
        return self._added(self._engine.begin(*arguments, **options))

    def read(self, request: ReadRequest, put: PutResult) -> Stop:
        """See Engine."""
        return self._added(self._engine.read(request, put))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _added(self, stop: Stop) -> Stop:
        self._stops.append(stop)
        if self._ended:
            stop(wait=False)
        return stop

    def stop(self) -> None:
        """Ends what was begun, and what will be."""
        self._ended = True
        stop_all(list(self._stops))


class _News:
    """Wakes a task from any thread."""

    def __init__(self) -> None:
        self._event = anyio.Event()
        loop: Any = anyio.lowlevel.current_token().native_token
        self._soon = (
            loop.call_soon_threadsafe if hasattr(loop, "call_soon_threadsafe") else loop.run_sync_soon
        )

    def tell(self) -> None:
        """Ends `wait`, or the next one."""
        with suppress(RuntimeError):  # the event loop has ended, and nobody waits
            self._soon(lambda: self._event.set())

    async def wait(self) -> None:
        """Waits for `tell`."""
        await self._event.wait()
        self._event = anyio.Event()


async def _in_thread(function: Callable[[], T], stop: Callable[[], object] | None = None) -> T:
    """What a function returns that is called in a thread of its own. Cancelled, it calls `stop` in another
    one, and waits for the function's end."""
    outcome, news = Future[T](), _News()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)
        news.tell()

    await anyio.lowlevel.checkpoint_if_cancelled()
    threads = [_started(run)]
    try:
        await news.wait()
    except BaseException:
        if stop is not None:
            threads.append(_started(stop))
        with anyio.CancelScope(shield=True):
            await news.wait()
        raise
    finally:
        for thread in threads:  # there is nothing left to do for them
            thread.join()
    return outcome.result()


def _started(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, name="shoal call", daemon=True)
    thread.start()
    return thread
