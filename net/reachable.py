"""How a node of a house reaches the others, and stays reachable itself.

A node behind a firewall, or one whose address changes, needs no open port: it keeps connections at the head
that wait until they are used (`stay_reachable`; net/reverse.py is the head's side). To other nodes it
connects directly, or through the head where that does not work (`relayed`).
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import trio

from .connection import open_tasks
from .dial import OpenStream, open_tcp, reason, sealed
from .errors import MismatchError, NetError, NodeLostError, UntrustedError
from .identity import host_port
from .messages import Address
from .relay import RequestStream, answer_take
from .requests import INWARD, SILENT_SECONDS, Alive, Announce, Ready, Relay, Take
from .tls import TlsStream, Trust

Addresses = Callable[[], Sequence[tuple[str, int]]]
"""The addresses of the head, as far as they are known at the time."""
DIRECT_SECONDS, AGAIN_SECONDS = 1.0, 60.0
"""How long a direct connection is tried, and for how long a failure is remembered."""
HEAD_SECONDS, STAGGER_SECONDS = 5.0, 0.25
KEPT = 2
"""How many connections a node keeps waiting."""
RETRY_SECONDS, REFUSED_SECONDS = 0.5, 5.0
"""The pause before a node dials the head again, and after a refusal."""
TICK_SECONDS, JUMP_SECONDS = 0.25, 2.5


async def dial_head(addresses: Sequence[tuple[str, int]], trust: Trust) -> TlsStream:
    """TLS with the head of the house, at the first of its addresses that answers. NodeLostError: none does
    within HEAD_SECONDS. UntrustedError: the head refuses this device, or another device answers."""
    found, failed = deque[TlsStream](), deque[NetError]()

    async def attempt(host: str, port: int, ended: trio.Event) -> None:
        who = f"the head of the house ({host_port(host, port)})"
        try:
            stream = await sealed(await trio.open_tcp_stream(host, port), trust, who)
            if stream.device.role == "head":
                found.append(stream)
                tasks.cancel_scope.cancel()
            else:
                await trio.aclose_forcefully(stream)
                failed.append(UntrustedError(f"{who} is {stream.device.name}, which is not the head"))
        except (OSError, UnicodeError) as error:
            failed.append(NodeLostError(f"{who} cannot be reached ({reason(error)})"))
        except NetError as error:
            failed.append(error)
        ended.set()

    try:
        with trio.move_on_after(HEAD_SECONDS):
            async with trio.open_nursery() as tasks:
                for host, port in addresses:
                    ended = trio.Event()
                    tasks.start_soon(attempt, host, port, ended)
                    with trio.move_on_after(STAGGER_SECONDS):
                        await ended.wait()
        if found:
            return found.popleft()
    finally:
        for stream in found:
            await trio.aclose_forcefully(stream)
    failed.append(NodeLostError("the head of the house does not answer"))
    raise next((error for error in failed if isinstance(error, UntrustedError)), failed[0])


def relayed(addresses: Addresses, trust: Trust, log: Callable[[str], None]) -> OpenStream:
    """Connects a node to others of its house: directly, if that works within a second, else through the head.
    OSError, NetError: neither works."""
    return _Ways(addresses, trust, log).open_stream


class _Ways:
    """The ways to other nodes, and which direct ones have failed."""

    def __init__(self, addresses: Addresses, trust: Trust, log: Callable[[str], None]) -> None:
        self._addresses, self._trust, self._log = addresses, trust, log
        self._failed: dict[tuple[str, int], float] = {}
        self._said = set[tuple[str, int]]()
        """Addresses whose failure was logged, since they worked last."""
        self._head: str | None = None
        """The address at which the head was reached."""

    async def open_stream(self, host: str, port: int) -> TlsStream:
        """See `relayed`."""
        where, now = (host, port), trio.current_time()
        self._failed = {way: since for way, since in self._failed.items() if now - since < AGAIN_SECONDS}
        if not host.endswith(INWARD) and where not in self._failed:
            with suppress(OSError, UnicodeError, NetError):
                stream = await self._directly(host, port)
                self._said.discard(where)
                return stream
            self._failed[where], self._head = trio.current_time(), None
            if where not in self._said:
                self._said.add(where)
                self._log(
                    f"{host_port(host, port)} cannot be reached from here: its bytes go through the head"
                )
        return await self._through_head(host, port)

    async def _directly(self, host: str, port: int) -> TlsStream:
        raw: trio.abc.Stream | None = None
        with trio.move_on_after(DIRECT_SECONDS):
            raw = await open_tcp(await self._seen_from_here(host), port)
        if raw is None:
            raise OSError(errno.ETIMEDOUT, "it does not answer")
        with trio.move_on_after(HEAD_SECONDS):
            return await sealed(raw, self._trust, host_port(host, port))
        raise OSError(errno.ETIMEDOUT, "it does not answer")

    async def _seen_from_here(self, host: str) -> str:
        """The head knows nodes on its own device by a loopback address: here that is the head's."""
        with suppress(ValueError):
            if ipaddress.ip_address(host).is_loopback:
                if self._head is None:
                    stream = await dial_head(self._addresses(), self._trust)
                    try:
                        self._head = stream.addresses[1][0]
                    finally:
                        await trio.aclose_forcefully(stream)
                return self._head
        return host

    async def _through_head(self, host: str, port: int) -> TlsStream:
        stream = await dial_head(self._addresses(), self._trust)
        try:
            line = RequestStream(stream, "the head of the house")
            await line.send(Relay(Address(host, port)))
            ready = await line.receive(Ready)
            stream.stands_for(self._trust.device(ready.device))
            return line.release()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise


async def stay_reachable(
    addresses: Addresses,
    trust: Trust,
    announce: Announce,
    connected: Callable[[TlsStream], Awaitable[None]],
    log: Callable[[str], None],
    search: Callable[[], Awaitable[object]] = trio.sleep_forever,
) -> None:
    """Keeps connections at the head of the house that wait until it uses them, which are then passed to
    `connected` (Node.connected), in a task of their own. Dials again when one ends, at all of the head's
    addresses, and at once when this device has slept or has another address. Says to `log` when the head
    cannot be reached, and when it can again. As long as it cannot, `search` is called, which returns when
    there is another address. Runs until cancelled.

    MismatchError: the head has another model now, or another version of shoal."""
    async with open_tasks() as tasks:
        stay = _Stay(addresses, trust, announce, connected, log, search, tasks)
        tasks.start_soon(stay.watch)
        for _ in range(KEPT):
            tasks.start_soon(stay.keep)


class _Stay:
    """The waiting connections of a node."""

    def __init__(
        self,
        addresses: Addresses,
        trust: Trust,
        announce: Announce,
        connected: Callable[[TlsStream], Awaitable[None]],
        log: Callable[[str], None],
        search: Callable[[], Awaitable[object]],
        tasks: trio.Nursery,
    ) -> None:
        self._addresses, self._trust, self._announce = addresses, trust, announce
        self._connected, self._log, self._search, self._tasks = connected, log, search, tasks
        self._scopes = set[trio.CancelScope]()
        self._searching = trio.CancelScope()
        self._ends: tuple[str | None, str] | None = None
        """The address of this device on the way to the head, when it connected there, and the head's."""
        self._last = ""
        """The address of the head that has answered last: it is tried first."""
        self._anew = False
        self._said: NetError | None = None

    async def keep(self) -> None:
        """Keeps one connection waiting."""
        while True:
            pause = 0.0
            with trio.CancelScope() as scope:
                self._scopes.add(scope)
                try:
                    await self._wait_once()
                except MismatchError:
                    raise
                except NetError as error:
                    self._say(error)
                    pause = RETRY_SECONDS if isinstance(error, NodeLostError) else REFUSED_SECONDS
                finally:
                    self._scopes.discard(scope)
            with trio.CancelScope() as scope:  # `_dial_anew` ends a pause, too
                self._scopes.add(scope)
                await trio.sleep(pause)
            self._scopes.discard(scope)

    async def _wait_once(self) -> None:
        """Connects to the head, and waits until it uses the connection. Errors as for `dial_head`."""
        addresses = sorted(self._addresses(), key=lambda address: address[0] != self._last)
        stream = await dial_head(addresses, self._trust)
        given = False
        try:
            line, anew = RequestStream(stream, "the head of the house"), self._anew
            with suppress(OSError):
                self._last = stream.addresses[1][0]
                if self._ends is None or self._ends[1] != self._last:
                    self._ends = _own_address(self._last), self._last
            await line.send(replace(self._announce, anew=anew))
            while True:
                take = await self._heard(line)
                self._say(None)
                self._anew = self._anew and not anew
                if isinstance(take, Take):
                    break
                await line.send(Alive())
            await answer_take(line, take, self._trust)
            given = True
            self._tasks.start_soon(self._connected, stream)
        finally:
            if not given:
                await trio.aclose_forcefully(stream)

    async def _heard(self, line: RequestStream) -> Alive | Take:
        with trio.move_on_after(SILENT_SECONDS):
            return await line.receive(Alive, Take)
        self._anew = True
        raise NodeLostError(f"{line.who} is lost: it has said nothing for {SILENT_SECONDS:g} s")

    async def watch(self) -> None:
        """Dials anew when this process has not run for a while, or the way to the head begins at another
        address."""
        last, asleep = trio.current_time(), _slept()
        while True:
            await trio.sleep(TICK_SECONDS)
            now, sleep = trio.current_time(), _slept()
            if now - last > JUMP_SECONDS or sleep - asleep > JUMP_SECONDS or self._elsewhere():
                self._dial_anew()
            last, asleep = now, sleep

    def _elsewhere(self) -> bool:
        if self._ends is None:
            return False
        own, head = self._ends
        now = _own_address(head)
        return now is not None and now != own

    def _dial_anew(self) -> None:
        self._anew, self._ends = True, None
        for scope in self._scopes:
            scope.cancel()

    def _say(self, error: NetError | None) -> None:
        """Tells the user that the head is away, for what reason, that it does not know this device any more,
        or that it is back; each once."""
        if error is None:
            if self._said is not None:
                self._log("the head of the house is there again")
                self._searching.cancel()
            self._said = None
        elif self._said is None or (
            isinstance(error, UntrustedError) and type(self._said) is not type(error)
        ):
            self._log(f"{error}; trying again until it answers")
            if self._said is None:
                self._searching = trio.CancelScope()
                self._tasks.start_soon(self._look_elsewhere, self._searching)
            self._said = error

    async def _look_elsewhere(self, searching: trio.CancelScope) -> None:
        """Dials the head where it is found meanwhile."""
        with searching:
            while True:
                await self._search()
                self._dial_anew()
                await trio.sleep(REFUSED_SECONDS)


def _slept() -> float:
    """A number that grows by the seconds for which this device was suspended, where the system tells."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    if boottime is None:
        return 0.0
    return time.clock_gettime(boottime) - time.clock_gettime(time.CLOCK_MONOTONIC)


def _own_address(host: str) -> str | None:
    """The address of this device on the way to a host; None: there is none. Sends nothing."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None
