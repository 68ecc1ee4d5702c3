"""A trio event loop in a thread, so that blocking code can use the async network.

A portal keeps an async context manager open in its loop, runs async functions there, and passes their results
to the caller's thread one by one. An error is raised where the caller waits. A caller that stops waiting, by
Ctrl-C or by closing a generator, cancels the function.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar

import trio

from .engine.errors import ShoalError

_LAST_LINES_SECONDS = 1.0
"""How long the last lines of a log may take at the end."""

T = TypeVar("T")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class _End:
    """The end of a stream. Without `complete` and without an error, the loop itself was ending."""

    complete: bool
    error: Exception | None = None


class Portal(Generic[T]):
    """A running loop, made by `open_portal`. `opened` is the value of its context manager. After a fork, the
    loop is not in the child process: there, what is asked of it is a ShoalError, and what only ends something
    does nothing."""

    def __init__(self, manager: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._manager, self._process = manager, os.getpid()
        self._ready: Future[T] = Future()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery
        self._scope = trio.CancelScope()
        self._closing = False
        self._error: BaseException | None = None
        # A daemon thread: a program that ends without closing the portal must not wait for the network.
        self._thread = threading.Thread(target=self._run, name="shoal network", daemon=True)

    def open(self) -> None:
        """Starts the loop and waits until the context manager is entered. Its errors are raised here."""
        self._thread.start()
        self.opened = self._ready.result()

    def close(self) -> None:
        """Cancels all functions, leaves the context manager, and waits for the end of the loop."""
        if self._elsewhere:
            return
        self._closing = True  # for a loop that is still starting
        self.tell(self._scope.cancel)
        if self._thread.ident is not None:
            self._thread.join()

    def check(self) -> None:
        """Raises the error that the closed loop ended with, if there was one."""
        if self._error is not None:
            raise self._error

    def tell(self, call: Callable[[], object]) -> bool:
        """Runs a call in the loop's thread without waiting for it. False: the loop has ended."""
        if self._elsewhere:  # its sockets are those of the parent
            return False
        try:
            if self._token is not None:
                self._token.run_sync_soon(call)
        except trio.RunFinishedError:
            return False
        return self._token is not None

    def call(self, function: Callable[[], Awaitable[Item]]) -> Item:
        """Runs an async function and returns its result."""

        async def feed(put: Callable[[Item], None]) -> None:
            put(await function())

        (result,) = self.stream(feed)
        return result

    def stream(
        self, feed: Callable[[Callable[[Item], None]], Awaitable[None]]
    ) -> Generator[Item, None, None]:
        """Runs an async function and yields what it passes to its argument `put`. Closing the generator
        cancels the function and waits for its end. If the loop has ended, its error is raised."""
        items: SimpleQueue[tuple[Item] | _End] = SimpleQueue()
        cancel = self._begin(feed, lambda item: items.put((item,)), items.put)
        end: _End | None = None
        try:
            while end is None:
                self._check_process()
                item = items.get()
                if isinstance(item, _End):
                    end = item
                else:
                    yield item[0]
        finally:
            if end is None and not self._elsewhere:
                cancel()
                _drain(items)
        error = self._failure(end)
        if error is not None:
            raise error

    def start(
        self,
        feed: Callable[[Callable[[Item], None]], Awaitable[None]],
        put: Callable[[Item | Exception | None], None],
    ) -> partial[None]:
        """Runs an async function without waiting for it. `put` is called in the loop's thread with what the
        function passes to its argument, then with None, or the exception that has ended it. The returned
        function cancels it and waits for its end, unless told `wait=False`."""
        ended = threading.Event()

        def finish(end: _End) -> None:
            put(self._failure(end))
            ended.set()

        cancel = self._begin(feed, put, finish)

        def stop(*, wait: bool = True) -> None:
            if not ended.is_set() and not self._elsewhere:
                cancel()
                if wait:
                    ended.wait()

        return partial(stop)

    def _begin(
        self,
        feed: Callable[[Callable[[Item], None]], Awaitable[None]],
        put: Callable[[Item], None],
        finish: Callable[[_End], None],
    ) -> Callable[[], object]:
        """Runs an async function; returns a function that cancels it. `finish` is called at its end, which
        may be at once."""
        self._check_process()
        scope = trio.CancelScope()

        async def work() -> None:
            end = _End(complete=False)
            try:
                with scope:
                    await feed(put)
                end = _End(complete=True)
            except Exception as error:  # for the caller, not for the loop
                end = _End(complete=False, error=error)
            finally:
                finish(end)

        def begin() -> None:
            try:
                self._nursery.start_soon(work)
            except RuntimeError:  # the loop is ending and accepts no more tasks
                finish(_End(complete=False))

        if not self.tell(begin):
            finish(_End(complete=False))
        return lambda: self.tell(scope.cancel)

    @property
    def _elsewhere(self) -> bool:
        return self._process != os.getpid()

    def _check_process(self) -> None:
        if self._elsewhere:
            raise ShoalError(
                "connections to nodes belong to the process that opened them: open the model in this one, too"
            )

    def _failure(self, end: _End) -> Exception | None:
        """The error with which a function has ended. If the loop itself has ended, that is its error."""
        if end.error is not None or end.complete:
            return end.error
        if threading.current_thread() is not self._thread:
            self._thread.join()
        error = self._error
        if isinstance(error, Exception) or error is None:
            return error or RuntimeError("the event loop has been closed")
        raise error

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:
            self._error = error
        if not self._ready.done():
            self._ready.set_exception(self._error or RuntimeError("the event loop has been closed"))

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            if self._closing:
                self._scope.cancel()
            async with self._manager() as opened, trio.open_nursery() as self._nursery:
                self._ready.set_result(opened)
                await trio.sleep_forever()


def _drain(items: SimpleQueue[tuple[Item] | _End]) -> None:
    """Waits for the end of a cancelled function. It ends soon, so another Ctrl-C meanwhile is ignored."""
    while True:
        with suppress(KeyboardInterrupt):
            if isinstance(items.get(), _End):
                return


@contextmanager
def open_portal(manager: Callable[[], AbstractAsyncContextManager[T]]) -> Iterator[Portal[T]]:
    """A portal with `manager()` entered. Errors of the manager are raised here, or where a caller waits."""
    portal = Portal(manager)
    try:
        portal.open()
        yield portal
    finally:
        portal.close()
    portal.check()


@contextmanager
def logging_thread(log: Callable[[str], object]) -> Iterator[Callable[[str], None]]:
    """Calls `log` in a thread of its own, since it may block and the network must not: a terminal that is
    stopped accepts no more text. What cannot be written, as on a full disk, is lost."""
    lines: SimpleQueue[str | None] = SimpleQueue()

    def call() -> None:
        while (line := lines.get()) is not None:
            with suppress(OSError):
                log(line)

    thread = threading.Thread(target=call, name="shoal messages", daemon=True)
    thread.start()
    try:
        yield lines.put
    finally:
        lines.put(None)
        thread.join(_LAST_LINES_SECONDS)
