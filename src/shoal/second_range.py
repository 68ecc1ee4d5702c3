"""The second range of a node: one process with two nodes, of which the second holds the LM head alone, so
that both ends of a model can be on one device (planner/home.py). The second shares the cores, the promised
RAM and a tied table with the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from .engine.errors import NoPlanError
from .engine.host import resident_bytes
from .net.assignment import NodeParts
from .net.node import Node
from .planner import Device, ModelCosts
from .planner.home import SMALL, second_range
from .planning import MB


def two_rows(
    costs: ModelCosts, device: Device, scratch: int, *, asked: bool, log: Callable[[str], None]
) -> list[Device]:
    """The rows of a device's two ranges. Unless they are `asked` for, there is one range if the second would
    take more than a small part of the RAM. NoPlanError: there is no room for what was asked for."""
    try:
        first, second = second_range(costs, device, scratch)
    except ValueError as error:
        if asked:
            raise NoPlanError(f"--both-ends: {error}: promise more with --ram") from None
        log(f"shoal: no second range for the LM head, so that --private has no effect: {error}")
        return [device]
    part = second.ram_bytes / device.ram_bytes
    if part > SMALL and not asked:
        log(
            f"shoal: no second range for the LM head, which would take {second.ram_bytes / MB:.0f} of the "
            f"{device.ram_bytes / MB:.0f} MB promised: ask for it with --private"
        )
        return [device]
    return [first, second]


class Held(Protocol):
    @property
    def held_bytes(self) -> int: ...


def resident_of(row: Device, seconds: Sequence[Held]) -> int:
    """The RAM of this process that counts for one range: what a second one promises, for the first the
    rest."""
    if row.beside:
        return row.ram_bytes
    return max(0, resident_bytes() - sum(second.held_bytes for second in seconds))


def say_second(parts: NodeParts, found: Sequence[str]) -> None:
    """Tells the user where the second range listens."""
    with suppress(OSError):  # as for the first
        promised = parts.offer.device.ram_bytes / MB
        print(
            f"listening on {', '.join(found)} as {parts.identity.name}: the LM head, {promised:.0f} MB",
            flush=True,
        )


class Nodes:
    """The nodes of this process as one, for whoever waits until they may end (policy_enforcer)."""

    def __init__(self, each: Sequence[Node]) -> None:
        self.each = each

    @property
    def coordinated(self) -> bool:
        """Whether a coordinator is connected to one of them."""
        return any(node.coordinated for node in self.each)

    @property
    def holds_layers(self) -> bool:
        """Whether a coordinator has assigned layers to one of them."""
        return any(node.holds_layers for node in self.each)

    @property
    def idle(self) -> bool:
        """Whether all that have layers are (Node.idle)."""
        return all(node.idle for node in self.each if node.holds_layers)

    def stuck(self, unseen: float = 0.0) -> str | None:
        """A sentence about a call that does not return; else None."""
        return next((said for node in self.each if (said := node.stuck(unseen)) is not None), None)
