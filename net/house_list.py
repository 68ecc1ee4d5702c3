"""The list of a house's devices, as a coordinator tells it to its nodes: each node hears it before it is
used, and again when it was changed on the head. What pairs devices is in net/pairing.py."""

from __future__ import annotations

from collections.abc import Callable

import trio

from ..engine.errors import ShoalError
from .connection import Connection
from .errors import NodeLostError, UntrustedError
from .events import Removed
from .members import ClusterState
from .messages import House, PairedDevice, Ping, Pong
from .tls import Trust


def told(trust: Trust) -> House:
    """The list as it is now."""
    return House(trust.devices, trust.addresses)


async def introduce(connection: Connection, trust: Trust, seconds: float) -> None:
    """Tells a node the list, and waits until it knows it: then other devices may connect to it.
    NodeLostError: it does not answer in time."""
    known: tuple[PairedDevice, ...] = ()
    with trio.move_on_after(seconds):
        while known != trust.devices:  # a change meanwhile is told only to those that have joined
            known = trust.devices
            await connection.send(told(trust))
            await connection.send(Ping(0))
            await connection.expect(Pong)
        return
    raise NodeLostError(f"{connection.peer} did not answer within {seconds:g} s: start it again")


def changed(trust: Trust, log: Callable[[str], None]) -> bool:
    """Reads the list again if it was changed on this device. False: it was not, or it cannot be read."""
    try:
        return trust.refresh()
    except (ShoalError, ValueError, OSError) as error:
        log(f"the changed list of the house is not used: {error}")
        return False


def revoked(trust: Trust, state: ClusterState) -> list[Removed]:
    """The ends of nodes of devices that are no longer on the list."""
    return [
        Removed(i, UntrustedError(f"{member.called} is no longer a device of the house"))
        for i, member in enumerate(state.members)
        if member.incarnation is not None and not member.barred and not trust.has(member.incarnation)
    ]
