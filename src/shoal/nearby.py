"""Finds the head of a house in the local network by mDNS, where the zeroconf package is installed.

A convenience: without it, and where it finds nothing, a device keeps to the addresses that it knows. What is
found is dialled as any other address, and the head proves by TLS that it is there.
"""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Literal

import trio

from .arguments import address
from .home_networks import is_private
from .net.errors import NetError
from .net.messages import PROTOCOL
from .net.reachable import dial_head
from .net.tls import Trust, der_of, key_of

Purpose = Literal["node", "join"]
"""Who is to connect there: a node of the house, or a device that joins it."""
PAUSE_SECONDS = 1.0
"""Between two places that are tried: whoever announces much has a device dial no more often."""
_GRACE_SECONDS, _GOODBYE_SECONDS, _RESTART_SECONDS = 0.5, 2.0, 60.0
_ANYWHERE = "0.0.0.0"


def installed() -> bool:
    """Whether mDNS can be used."""
    return importlib.util.find_spec("zeroconf") is not None


async def announce(
    purpose: Purpose, key: str, listeners: Sequence[trio.SocketListener], say: Callable[[str], None]
) -> None:
    """Announces, until cancelled, where the head with this key listens. Returns at once if that is in
    no private network, or mDNS cannot be used."""
    hosts = [one.socket.getsockname() for one in listeners if one.socket.family == socket.AF_INET]
    hosts = [where for where in hosts if where[0] == _ANYWHERE or is_private(where[0])]
    if not hosts or not installed():
        return
    over = () if any(host == _ANYWHERE for host, _ in hosts) else [host for host, _ in hosts]
    try:
        async with _process("announce", purpose, key, str(PROTOCOL), str(hosts[0][1]), *over) as process:
            say("announced in the local network by mDNS (not with --no-mdns)")
            code = await process.wait()
    except OSError as error:  # as many processes or open files as there may be
        say(f"not announced by mDNS: {error}")
    else:
        say(f"not announced by mDNS any more: its process has ended with code {code}")


@asynccontextmanager
async def announced(purpose: Purpose, key: str) -> AsyncIterator[AsyncIterator[tuple[str, int]]]:
    """The places where a head with this key is announced, again and again as long as they are. They end if
    the process that looks for them does. OSError: it cannot be started."""
    async with _process("look", purpose, key) as process:
        assert process.stdout is not None
        async with aclosing(_places(process.stdout)) as places:
            yield places


async def find_head(trust: Trust, known: Callable[[], Sequence[tuple[str, int]]]) -> tuple[str, int]:
    """Looks for the head of a house until it is found where it is not known to be, and has proved by TLS that
    it is the head. Waits for ever where mDNS cannot be used."""
    if not installed():
        await trio.sleep_forever()
    key = next(key_of(der_of(device)) for device in trust.devices if device.role == "head")
    await trio.sleep(_GRACE_SECONDS)  # most often it is back where it was
    while True:
        with suppress(OSError):
            async with announced("node", key) as places:
                async for place in places:
                    if place not in known():
                        with suppress(NetError):  # somebody else announces the same
                            await trio.aclose_forcefully(await dial_head([place], trust))
                            return place
        await trio.sleep(_RESTART_SECONDS)


async def _places(output: trio.abc.ReceiveStream) -> AsyncGenerator[tuple[str, int], None]:
    """The places in the last line that the process has printed meanwhile, and then in a later one."""
    rest = b""
    async for data in output:
        *lines, rest = (rest + data).split(b"\n")
        for word in lines[-1].decode("ascii").split() if lines else ():
            yield address(word)
            await trio.sleep(PAUSE_SECONDS)


@asynccontextmanager
async def _process(*words: str) -> AsyncIterator[trio.Process]:
    """A process of src/shoal/mdns.py, which ends with the block."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "shoal.mdns", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0,  # Ctrl-C on the terminal is for this process, which then ends the child
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            await process.stdin.aclose()
            with trio.move_on_after(_GOODBYE_SECONDS):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
            await process.stdout.aclose()
