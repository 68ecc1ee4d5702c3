"""The HTTP server of `shoal up`: that of `shoal serve`, in a thread of its own, over the head's engine."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import trio

from .engine.errors import MissingDependencyError, ShoalError
from .engine.model_directory import Model
from .http_arguments import HOST, PORT
from .net.errors import AddressInUseError
from .nodes import Nodes
from .server.opening import Listeners, Opened, opened, urls

_QUIET_SECONDS = 0.5
"""The end is not mentioned where it takes no longer."""


@contextmanager
def serve_http(
    args: argparse.Namespace, model: Model, nodes: Nodes, say: Callable[[str], None]
) -> Iterator[None]:
    """Serves by the options of `shoal up` while the block runs. At its end no more requests are taken, and
    answers under way go on for --grace seconds, or until Ctrl-C. AddressInUseError, MissingDependencyError:
    --http cannot be done. ShoalErrors: as for `opened`."""
    web = _opened(args, say)
    if web is None:
        yield
        return
    server = _Server(args, model, nodes, say, web)
    say(f"serves HTTP on {urls(web.listeners, web.tls)}")
    try:
        yield
    finally:
        server.end()


def _opened(args: argparse.Namespace, say: Callable[[str], None]) -> Opened | None:
    """Sockets that listen. None: none are wanted, or what nobody asked for is not possible."""
    if args.no_http:
        return None
    host, port = args.http or (HOST, PORT)
    try:
        return opened(args, host, port, say)
    except AddressInUseError:
        if args.http is not None:
            raise
        say(f"no HTTP server: port {PORT} is in use; --http {HOST}:0 takes a free one")
    except MissingDependencyError as error:
        if args.http is not None:
            raise
        say(f"no HTTP server: {error}")
    return None


class _Server:
    """A thread that serves. All that answers is imported and read when somebody connects first, so that a
    head that nobody asks starts sooner, and has more RAM for layers."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: Model,
        nodes: Nodes,
        say: Callable[[str], None],
        web: Opened,
    ) -> None:
        self._args, self._model, self._nodes, self._say, self._web = args, model, nodes, say, web
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        """Set when no more requests are to be taken."""
        self._begun = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,), name="shoal http", daemon=True)
        self._thread.start()
        self._begun.wait()

    def end(self) -> None:
        """Ends the server. Ctrl-C ends answers that are under way."""
        self._tell(self._ended.set)
        try:
            self._thread.join(_QUIET_SECONDS)
            if self._thread.is_alive():
                self._say(f"answers under way may end within {self._args.grace:g} s; Ctrl-C ends them now")
            self._thread.join()
        except KeyboardInterrupt:
            self._tell(self._scope.cancel)
            self._thread.join()

    def _tell(self, call: Callable[[], object]) -> None:
        assert self._token is not None, "the thread has begun"
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(call)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._begun.set()
        with self._scope:
            try:
                await _first_connection(self._web.listeners, self._ended)
                if not self._ended.is_set():
                    await self._serve()
            except ShoalError as error:
                self._say(f"no HTTP server: {error}")
            finally:
                for listener in self._web.listeners:
                    listener.socket.close()

    async def _serve(self) -> None:
        from .server.app import serve_app
        from .server.http import Limits, Server
        from .server.run import options_of

        nodes, args = self._nodes, self._args
        options = options_of(args, self._web)
        app = serve_app(nodes, self._model, lambda: nodes.context, options, self._say, status=nodes.status)
        server = Server(app, Limits(grace=args.grace), self._say)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, self._web.listeners, self._web.tls)
            await self._ended.wait()
            server.drain()


async def _first_connection(listeners: Listeners, ended: trio.Event) -> None:
    """Waits until somebody connects, or it is time to end."""
    async with trio.open_nursery() as nursery:

        async def wait(listener: trio.SocketListener) -> None:
            await trio.lowlevel.wait_readable(listener.socket)
            nursery.cancel_scope.cancel()

        for listener in listeners:
            nursery.start_soon(wait, listener)
        await ended.wait()
        nursery.cancel_scope.cancel()
