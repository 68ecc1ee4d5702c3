"""mDNS, in a process of its own: announces a head in the local network, or looks for one.

    python -m shoal.mdns announce PURPOSE KEY PROTOCOL PORT [ADDRESS …]
    python -m shoal.mdns look PURPOSE KEY [ADDRESS …]

PURPOSE is who is to connect there, KEY the SHA-256 of the head's certificate, ADDRESS one of this device's
(default: each in a private network, also those that it gets later). `look` prints a line with all places that
are announced, HOST:PORT HOST:PORT …, when they change and every REPEAT_SECONDS. Both end when their standard
input does.

An announcement is an instance of the service _shoal._tcp under a random name, the salt. Its TXT record has a
hash of salt, purpose and key: who knows the key recognises the head, and nobody else can tell whether two
announcements are of one head. Anybody can send the same, so the place found is only where to try: the head
proves by TLS that it is there.

src/shoal/nearby.py starts this process. What strangers send is parsed here, where it takes neither the memory
that a node has promised, nor time of the thread that passes tokens on, and where no key is.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import sys
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress

import ifaddr
from zeroconf import IPVersion, ServiceStateChange
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from .home_networks import is_private

TYPE = "_shoal._tcp.local."
MOST_PLACES, MOST_RESOLVED, MOST_ADDRESSES = 8, 8, 8
"""Announcements that are kept and that are asked for at a time, and the addresses of this device in use."""
REPEAT_SECONDS, CALM_SECONDS, LOOK_SECONDS, ASK_SECONDS = 5.0, 0.1, 1.0, 60.0
_TTL, _RESOLVE_MS = 120, 3000
_SALT = re.compile("[0-9a-f]{16}")
_MEMORY = 512 << 20


def tag(salt: str, purpose: str, key: str) -> str:
    """What an announcement under the name `salt` says of the head."""
    return hashlib.sha256(f"shoal mdns 1\0{salt}\0{purpose}\0{key}".encode()).hexdigest()[:16]


def is_of(head: tuple[str, str], name: str, properties: Mapping[bytes, bytes | None]) -> bool:
    """Whether an announcement claims to be of a head, given by purpose and key."""
    salt = name.removesuffix(f".{TYPE}")
    return _SALT.fullmatch(salt) is not None and properties.get(b"tag") == tag(salt, *head).encode()


async def announce(head: tuple[str, str], protocol: int, port: int, given: Sequence[str]) -> None:
    """Announces a head until cancelled, and then says goodbye."""

    async def on(address: str) -> None:
        async with AsyncZeroconf([address], ip_version=IPVersion.V4Only) as mdns:
            salt = secrets.token_hex(8)
            info = AsyncServiceInfo(
                TYPE,
                f"{salt}.{TYPE}",
                port,
                properties={"v": str(protocol), "tag": tag(salt, *head)},
                server=f"{salt}.local.",
                parsed_addresses=[address],
                host_ttl=_TTL,
                other_ttl=_TTL,
            )
            # The name is random, so nobody is asked whether it is taken.
            sent = await mdns.async_register_service(info, cooperating_responders=True)
            await sent
            await asyncio.Event().wait()

    await _on_each(given, on)


async def look(
    head: tuple[str, str], given: Sequence[str], found: Callable[[Collection[tuple[str, int]]], object]
) -> None:
    """Calls `found` with the places where a head is announced, again and again, until cancelled."""
    places, changed = dict[str, tuple[str, int]](), asyncio.Event()

    async def on(address: str) -> None:
        asking = set[asyncio.Task[None]]()
        async with AsyncZeroconf([address], ip_version=IPVersion.V4Only) as mdns:

            async def ask(name: str) -> None:
                info = await mdns.async_get_service_info(TYPE, name, _RESOLVE_MS)
                if info is None or not info.port or not is_of(head, name, info.properties):
                    return
                hosts = [host for host in info.parsed_addresses() if is_private(host) or host in given]
                if hosts and (name in places or len(places) < MOST_PLACES):
                    places[name] = hosts[0], info.port
                    changed.set()

            def heard(
                zeroconf: object, service_type: str, name: str, state_change: ServiceStateChange
            ) -> None:
                if state_change is ServiceStateChange.Removed:
                    places.pop(name, None)
                    changed.set()
                elif _SALT.fullmatch(name.removesuffix(f".{TYPE}")) and len(asking) < MOST_RESOLVED:
                    asking.add(task := asyncio.create_task(ask(name)))
                    task.add_done_callback(asking.discard)

            # A browser asks less and less often, and first for an answer to this device alone, which is all
            # that a phone hears whose system keeps multicasts from it.
            while True:
                async with AsyncServiceBrowser(mdns.zeroconf, TYPE, handlers=[heard]):
                    await asyncio.sleep(ASK_SECONDS)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_on_each(given, on))
        while True:
            changed.clear()
            found(set(places.values()))
            await asyncio.sleep(CALM_SECONDS)
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), REPEAT_SECONDS)


async def _on_each(given: Sequence[str], serve: Callable[[str], Coroutine[object, object, None]]) -> None:
    """Runs `serve` for each address of this device, as long as it has that, and again where it has failed:
    one responder for each, so that an address is told to no network but its own."""
    serving: dict[str, asyncio.Task[None]] = {}
    try:
        while True:
            now = set(given or _own_addresses())
            over = {address for address, task in serving.items() if task.done() or address not in now}
            await _end([serving.pop(address) for address in over])
            for address in now - serving.keys():
                serving[address] = asyncio.create_task(serve(address))
            await asyncio.sleep(LOOK_SECONDS)
    finally:
        await _end(list(serving.values()))


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _own_addresses() -> list[str]:
    found = {ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips if isinstance(ip.ip, str)}
    return sorted(filter(is_private, found))[:MOST_ADDRESSES]


async def _until_told(work: Awaitable[None]) -> None:
    """Works until the standard input ends."""
    task, told = asyncio.ensure_future(work), asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), told.set)
    await asyncio.wait([task, asyncio.ensure_future(told.wait())], return_when=asyncio.FIRST_COMPLETED)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def _print(places: Collection[tuple[str, int]]) -> None:
    print(*(f"{host}:{port}" for host, port in places), flush=True)


def main(words: Sequence[str]) -> None:
    """Runs until the standard input ends."""
    os.nice(10)
    with suppress(ImportError, OSError, ValueError):  # a flood ends this process at the latest
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    what, purpose, key, *rest = words
    if what == "announce":
        work = announce((purpose, key), int(rest[0]), int(rest[1]), rest[2:])
    else:
        work = look((purpose, key), rest, _print)
    asyncio.run(_until_told(work))


if __name__ == "__main__":
    main(sys.argv[1:])
