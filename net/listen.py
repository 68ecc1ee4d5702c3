"""Where a node listens: every address of a name, on one port; and the names by which others find it there.

A name may have several addresses: `localhost` is 127.0.0.1 and ::1, and who dials it may try either. The
addresses are looked up once, so those that were checked are those that are served.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Sequence

import trio

from .errors import AddressInUseError, NetError

_TRIES = 20
"""Free ports that are tried until one is free on every address."""
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_FAR = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses that are kept for documentation: the way to them is the way to others."""


def addresses(host: str) -> tuple[str, ...]:
    """The numeric addresses of a host; `::`, every IPv6 address, brings every IPv4 address with it. NetError:
    it has none."""
    try:
        # ASCII as bytes: a node never needs the codec for other names, which takes memory.
        name = host.encode("ascii") if host.isascii() else host
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "that is no name of a host"
        raise NetError(
            f"cannot listen on {host}: {reason}; give an address of this device, such as 127.0.0.1, or with "
            "--insecure one that others can reach"
        ) from error
    numeric = dict.fromkeys(_plain(str(sockaddr[0])) for *_, sockaddr in found)
    if "::" in numeric:
        numeric = dict.fromkeys(["0.0.0.0", *numeric])
    return tuple(numeric)


def reachable(numeric: Sequence[str]) -> str | None:
    """The first of some addresses that others can reach; None: all are this device's own."""
    return next((address for address in numeric if not ipaddress.ip_address(address).is_loopback), None)


async def listen(host: str, numeric: Sequence[str], port: int) -> list[trio.SocketListener]:
    """Listeners on all addresses of a host, on the same port; 0 takes one that is free on all. Addresses that
    this device does not have are left out, unless none is left. AddressInUseError; NetError."""
    tries = _TRIES if port == 0 else 1
    while True:
        tries -= 1
        try:
            return await _on_all(numeric, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and tries:
                continue
            if error.errno == errno.EADDRINUSE:
                raise AddressInUseError(
                    f"port {port} of {host} is in use: stop what listens there, or choose another port "
                    "(port 0 takes a free one)"
                ) from error
            raise NetError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def named(listeners: Sequence[trio.SocketListener]) -> list[str]:
    """HOST:PORT of each address under which the listeners are found: of one that stands for all of a family,
    this device's own first, then the one that others on its network see."""
    found = []
    for listener in listeners:
        host, port = listener.socket.getsockname()[:2]
        if ipaddress.ip_address(host).is_unspecified:
            own = "::1" if ":" in host else "127.0.0.1"
            found += [(own, port), (_seen_by_others(listener.socket.family), port)]
        else:
            found.append((host, port))
    found.sort(key=lambda item: item[0] is not None and not ipaddress.ip_address(item[0]).is_loopback)
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in found if host]


async def _on_all(numeric: Sequence[str], port: int) -> list[trio.SocketListener]:
    listeners: list[trio.SocketListener] = []
    absent: OSError | None = None
    try:
        for address in numeric:
            try:
                (listener,) = await trio.open_tcp_listeners(port, host=address)
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                absent = error
                continue
            listeners.append(listener)
            port = listener.socket.getsockname()[1]
        if absent is not None and not listeners:
            raise absent
    except BaseException:
        for listener in listeners:
            listener.socket.close()
        raise
    return listeners


def _plain(address: str) -> str:
    """An IPv4 address that is written as IPv6, as itself."""
    if ":" in address and "%" not in address:
        mapped = ipaddress.IPv6Address(address).ipv4_mapped
        return str(mapped or address)
    return address


def _seen_by_others(family: int) -> str | None:
    """This device's address on the network that leads on; None where nothing does. Nothing is sent."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((_FAR[socket.AddressFamily(family)], 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None
