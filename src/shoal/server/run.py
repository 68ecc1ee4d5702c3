"""Runs the server until it is told to end."""

from __future__ import annotations

import argparse
import signal
import ssl
from collections.abc import Sequence
from functools import partial

import trio

from .app import Log, Options
from .http import App, Limits, Server
from .opening import Listeners, Opened, urls


def options_of(args: argparse.Namespace, opened: Opened, names: Sequence[str] = ()) -> Options:
    """How the server treats those who ask, by the options of `http_arguments`."""
    return Options(
        names=names,
        keys=opened.keys,
        origins=args.allow_origin,
        hosts=opened.hosts,
        slots=args.answers,
        queue=args.queue,
    )


def run(app: App, listeners: Listeners, tls: ssl.SSLContext | None, limits: Limits, log: Log) -> None:
    """Serves until SIGINT or SIGTERM; then no more requests are taken, and running answers may end within the
    grace, or until the second signal."""
    trio.run(partial(_main, app, listeners, tls, limits, log))


async def _main(app: App, listeners: Listeners, tls: ssl.SSLContext | None, limits: Limits, log: Log) -> None:
    server = Server(app, limits, log)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def wait_for_the_end() -> None:
                async for _ in signals:
                    if server.draining:
                        nursery.cancel_scope.cancel()
                    server.drain()

            await nursery.start(server.serve, listeners, tls)
            nursery.start_soon(wait_for_the_end)
            log(f"listening on {urls(listeners, tls)}")
            await server.ended.wait()
            nursery.cancel_scope.cancel()
