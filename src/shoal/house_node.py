"""A node of a house: it asks the head for its model, and stays reachable for the head."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import trio

from . import house
from .engine.errors import ShoalError, ignore
from .held_files import local_model, make_skeleton
from .nearby import find_head
from .net.connection import open_tasks
from .net.errors import MismatchError, NodeLostError, UntrustedError
from .net.identity import Identity, host_port
from .net.messages import MOST_ADDRESSES, Address
from .net.reachable import dial_head, relayed, stay_reachable
from .net.relay import RequestStream
from .net.requests import Alive, Announce, GetModel
from .net.tls import TlsStream, Trust
from .skeletons import Skeleton, receive_skeleton

_HEAD = "the head of the house"
_ASK_SECONDS = 30.0
_PAUSES = (0.5, 1.0, 2.0, 5.0)
"""Seconds between two tries to reach the head."""


class HouseNode:
    """The head of this device's house, as a node sees it. `given` are addresses of the command line, which
    are tried instead of those that the head has told. `mdns`: without them, it is looked for by mDNS, too,
    when it cannot be reached."""

    def __init__(
        self,
        trust: Trust,
        given: Sequence[tuple[str, int]],
        log: Callable[[str], None],
        *,
        mdns: bool = False,
    ) -> None:
        self._trust, self._given, self._log = trust, tuple(given), log
        self._mdns = mdns and not given
        self._trying = trio.CancelScope()
        self._known: tuple[tuple[str, int], ...] = ()
        self._found: tuple[tuple[str, int], ...] = ()
        """Where the head has been found last, if that could not be kept."""
        self.open_stream = relayed(self.addresses, trust, self._tell)
        """How the node reaches other nodes of the house."""

    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Where the head may be, also after this device has left the house. ShoalError: it is not known."""
        told = self._given or tuple((where.host, where.port) for where in house.head_addresses())
        found = self._known = tuple(dict.fromkeys(self._found + told)) or self._known
        if not found:
            raise ShoalError(
                "it is not known where the head is: give --head HOST:PORT, as `shoal up` prints it"
            )
        return found

    async def find_model(self) -> Path:
        """The directory of the model that the head has now. Waits until the head is there. UntrustedError:
        this device does not belong to its house any more."""
        tries, skeleton = 0, None
        async with open_tasks() as tasks:
            while skeleton is None:
                with trio.CancelScope() as self._trying:
                    try:
                        skeleton = await self._ask()
                    except NodeLostError as error:
                        if not tries:
                            self._tell(f"waiting for the head of the house: {error}")
                            tasks.start_soon(self._look_elsewhere)
                        await trio.sleep(_PAUSES[min(tries, len(_PAUSES) - 1)])
                        tries += 1
            tasks.cancel_scope.cancel()
        if tries:
            self._tell("the head of the house is there")
        return await trio.to_thread.run_sync(_directory, skeleton)

    async def _look_elsewhere(self) -> None:
        """Lets `find_model` try at once where the head is found meanwhile."""
        while True:
            await self._search()
            self._trying.cancel()
            await trio.sleep(_PAUSES[-1])

    async def _search(self) -> None:
        """Waits until the head is found elsewhere by mDNS, and keeps where that is."""
        if not self._mdns:
            await trio.sleep_forever()
        found = await find_head(self._trust, self.addresses)
        self._tell(f"the head of the house is at {host_port(*found)}, found by mDNS")
        known = [where for where in house.head_addresses() if (where.host, where.port) != found]
        try:
            house.keep_head((Address(*found), *known)[:MOST_ADDRESSES])
            self._found = ()
        except OSError as error:
            self._found = (found,)
            self._tell(f"that cannot be kept: {error}")

    async def stay(
        self,
        identity: Identity,
        port: int,
        connected: Callable[[TlsStream], Awaitable[None]],
        *,
        quiet: bool = False,
    ) -> None:
        """Lets the head reach the node on connections that this device opens. It returns when the head has
        another model. `quiet`: another node of this process says when the head is away."""
        tell = ignore if quiet else self._tell
        announce = Announce(identity.name, identity.incarnation, port, identity.model)
        try:
            await stay_reachable(self.addresses, self._trust, announce, connected, tell, self._search)
        except MismatchError as error:
            tell(str(error))

    async def _ask(self) -> Skeleton:
        """What the head's model consists of. NodeLostError: the head is not there, or does not answer.
        UntrustedError: as for `find_model`. Other ShoalErrors: the head gives none, for this reason."""
        try:
            stream = await dial_head(self.addresses(), self._trust)
        except UntrustedError as error:  # its old address is somebody else's now, and it may be back there
            raise NodeLostError(str(error)) from error
        try:
            with trio.move_on_after(_ASK_SECONDS):
                line = RequestStream(stream, _HEAD)
                await line.send(GetModel())
                if await line.is_next():
                    await line.receive(Alive)  # raises the reason why the head gives none
                return await receive_skeleton(line.release(), _HEAD, _is_here)
            raise NodeLostError(f"{_HEAD} did not answer within {_ASK_SECONDS:g} s")
        finally:
            await trio.aclose_forcefully(stream)

    def _tell(self, text: str) -> None:
        self._log(f"shoal: {text}")


def _is_here(model_hash: str) -> bool:
    return local_model(model_hash) is not None


def _directory(skeleton: Skeleton) -> Path:
    """The directory of a model here, with what is there of its weights."""
    return local_model(skeleton.hash) or make_skeleton(skeleton.hash, skeleton.index, skeleton.files)
