"""Enforces the policy of a device while its node serves, and lets the node leave in good order.

A node that leaves tells its coordinator (messages.Condition) and goes on serving until its layers have moved
to other nodes, so that no answer notices. If they do not within LEAVING_SECONDS, it ends all the same, and
the coordinator goes on as after a loss."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Protocol

import trio

from .engine.errors import ShoalError
from .engine.power import PowerReader, is_android
from .net.messages import Condition
from .net.policy import NO_POLICY, Policy, default_policy
from .net.throttling import NOTHING, decide, forbidden


class Served(Protocol):
    """What PolicyEnforcer asks of a node, or of the nodes of a process (net/node.Node has the texts)."""

    @property
    def coordinated(self) -> bool: ...
    @property
    def holds_layers(self) -> bool: ...
    @property
    def idle(self) -> bool: ...
    def stuck(self, unseen: float = 0.0) -> str | None: ...


LOOK_SECONDS = 2.0
"""The time between two looks at the device."""
LEAVING_SECONDS = 30.0
"""How long a node that leaves waits for its layers to move."""
IDLE_SECONDS = 3.0
"""How long it waits while no answer uses them and no other node takes them, since none has room."""
SETTLED_SECONDS = 0.5
"""How long it goes on after that, so that its last messages arrive."""
_QUIET_SECONDS = 0.2
"""How long it waits before it says so: a coordinator that ends as well may be about to disconnect."""
_REMEDIES = {"charging": "plug it in", "battery": "charge it", "temperature": "let it cool down"}
_OF_TERMUX = ("charging", "battery", "temperature")


async def _in_thread(call: Callable[[], None]) -> None:
    await trio.to_thread.run_sync(call, abandon_on_cancel=True)


class PolicyEnforcer:
    """Follows the policy of this device (None: the default one). `condition` may be called in any thread.
    Tests replace `clock` and `hop`, which runs a blocking call in a thread."""

    def __init__(
        self,
        policy: Policy | None,
        reader: PowerReader,
        log: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        hop: Callable[[Callable[[], None]], Awaitable[None]] = _in_thread,
    ) -> None:
        self._policy = default_policy() if policy is None else policy
        self._given, self._reader, self._log, self._clock = policy is not None, reader, log, clock
        self._hop, self._memory, self._leaving = hop, NOTHING, ""
        self._condition = Condition()
        self._left = trio.Event()

    async def begin(self) -> None:
        """Looks at the device for the first time. ShoalError: its policy allows no work."""
        if self._policy != NO_POLICY:
            await self._hop(self._begin)

    def _begin(self) -> None:
        self._log(f"shoal: the policy of this device is {self._policy}")
        readings = self._reader.read()
        for rule, clause in forbidden(self._policy, readings).items():
            remedy = _REMEDIES.get(rule, "end other programs")
            raise ShoalError(
                f"the policy of this device allows no work now: {clause}; {remedy}, or set another --policy"
            )
        unread = [name for name in self._policy.unread(readings) if self._given or name in _OF_TERMUX]
        if unread:
            remedy = ""
            if is_android() and not set(unread).isdisjoint(_OF_TERMUX):
                remedy = "; Termux:API tells the battery's: `pkg install termux-api`, and the app Termux:API"
            names = " and ".join(unread)
            self._log(f"shoal: without effect, since this device hides the readings: {names}{remedy}")
        self._look()

    def condition(self) -> Condition | None:
        """How much of the node may be used; None as long as nothing limits it."""
        if self._leaving:
            return replace(self._condition, leaving=True, reason=self._leaving)
        return None if self._policy == NO_POLICY else self._condition

    async def until_left(self, node: Served, signals: AsyncIterator[int]) -> int | None:
        """Returns when the node may end: after a signal, or when its policy says so, and once its layers have
        moved. A second signal ends the wait, and is returned."""
        again: int | None = None
        async with trio.open_nursery() as tasks:

            async def heed() -> None:
                nonlocal again
                async for number in signals:
                    if self._left.is_set():
                        again = number
                        tasks.cancel_scope.cancel()
                        return
                    self._leave("it was told to end")

            tasks.start_soon(heed)
            tasks.start_soon(self._watch)
            await self._left.wait()
            await self._see_off(node)
            tasks.cancel_scope.cancel()
        return again

    def _leave(self, reason: str) -> None:
        self._leaving = reason
        self._left.set()

    async def _watch(self) -> None:
        """Looks at the device again and again, until the node has to leave."""
        while self._policy != NO_POLICY and not self._left.is_set():
            await trio.sleep(LOOK_SECONDS)
            await self._hop(self._look)
            if self._condition.leaving:
                self._leave(self._condition.reason)

    def _look(self) -> None:
        before, readings = self._condition, self._reader.read()
        self._memory, now = decide(self._policy, self._memory, readings, self._clock())
        self._condition = replace(
            now,
            battery=_within(readings.battery, 0, 100),
            temperature=_within(readings.temperature, -100, 200),
        )
        if now.share != before.share and not now.leaving:
            why = f": {now.reason}" if now.reason else ""
            self._log(f"shoal: this device computes for at most {now.share:.0%} of the time{why}")

    async def _see_off(self, node: Served) -> None:
        """Returns when the layers of a node that leaves have moved to other nodes, or LEAVING_SECONDS have
        passed."""
        if not node.holds_layers or node.stuck() is not None:
            return
        with trio.move_on_after(_QUIET_SECONDS):
            await self._emptied(node)
            return
        self._log(
            f"shoal: leaving, since {self._leaving}: ends when its layers have moved to other nodes, after "
            f"{LEAVING_SECONDS:.0f} s at most (Ctrl-C ends it at once)"
        )
        with trio.move_on_after(LEAVING_SECONDS) as scope:
            if not await self._emptied(node):
                self._log("shoal: no answer uses its layers, and no other node takes them: it ends now")
        if scope.cancelled_caught:
            self._log("shoal: its layers have not moved: the coordinator goes on as after a loss")

    async def _emptied(self, node: Served) -> bool:
        """Waits until the node has no layers; False: nobody needs those that it has."""
        used = trio.current_time()
        while node.holds_layers:
            used = used if node.idle else trio.current_time()
            if trio.current_time() - used >= IDLE_SECONDS:
                return False
            await trio.sleep(0.05)
        if node.coordinated:
            await trio.sleep(SETTLED_SECONDS)
        return True


def _within(reading: float | None, low: float, high: float) -> float | None:
    """A reading in whole numbers, so that it does not change all the time; None: it is not possible."""
    return None if reading is None or not low <= reading <= high else float(round(reading))
