"""The beginning of `shoal up`: what can be wrong with the command is said before a model is fetched and
converted, and this device's own node starts while the coordinator is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from . import house
from .engine.errors import ShoalError, ignore
from .engine.host import check_promise, ram
from .first_use import model_directory
from .local import unix_socket
from .net.listen import addresses, host_port, listen, named
from .own_node import OwnNode
from .server.opening import opened

_NOTHING_MB = 1
"""A node that promises so little RAM runs no layers (planning.NOTHING_BYTES)."""


@dataclass(frozen=True, slots=True)
class First:
    """The place of the socket for commands of this user, the port for devices, the model directory, and this
    device's own node, which has been started."""

    socket: Path
    listeners: Sequence[trio.SocketListener]
    model: Path
    own: OwnNode


@contextmanager
def begun(args: argparse.Namespace) -> Iterator[First]:
    """Begins, by the arguments of `shoal up`, and ends the node and the listeners. Errors as for
    `shoal up`."""
    with ExitStack() as stack:
        socket = stack.enter_context(unix_socket.claimed())
        if args.ram is not None:
            check_promise(args.ram, ram())
        devices = house.open_or_create(args.name)
        host, port = args.listen
        listeners = trio.run(partial(listen, host, addresses(host), port))
        stack.callback(trio.run, _close, listeners)
        _check_http(args)
        model = _model(args.model).resolve()
        name = next(device.name for device in devices if device.role == "head")
        own = OwnNode(_command(args, model, name, named(listeners)[0]))
        stack.callback(own.end)
        own.begin()
        yield First(socket, listeners, model, own)


def _check_http(args: argparse.Namespace) -> None:
    """What --http was given, and cannot be done, is an error now. The server listens later: a client that
    connects to it while a model is converted would wait for an answer."""
    if args.http is not None:
        host, port = args.http
        trio.run(_close, opened(args, host, port, ignore).listeners)


async def _close(listeners: Sequence[trio.SocketListener]) -> None:
    for listener in listeners:
        await listener.aclose()


def _model(given: str | None) -> Path:
    """The model directory of the command line or of last time. ShoalError: there is none."""
    if given is not None:
        return model_directory(given)
    last = house.last_model()
    if last is None:
        raise ShoalError(
            "no model was used on the head of this house yet: give one, as in `shoal up smollm2-135m`"
        )
    return model_directory(str(last))


def _command(args: argparse.Namespace, model: Path, name: str, head: str) -> list[str]:
    """The command of this device's own node. It listens where the head does, and nowhere else."""
    command = [sys.executable, "-m", "shoal", "node", str(model), "--head", head, "--name", name]
    command += ["--listen", host_port(args.listen[0], 0)]
    promise = _NOTHING_MB if args.no_layers else args.ram
    if promise is not None:
        command += ["--ram", str(promise)]
    if args.policy is not None:
        command += ["--policy", str(args.policy)]
    return command + second_range(args)


def second_range(args: argparse.Namespace) -> list[str]:
    """The option for the second range of this device's own node: where it is asked for, or takes little
    RAM."""
    if args.no_layers or args.private is False:
        return []
    return ["--both-ends", "always" if args.private else "if-small"]
