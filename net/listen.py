"""Listening sockets of a node: all addresses of a host name on one port, and the addresses to tell the user.

A host name may have several addresses: `localhost` is 127.0.0.1 and ::1, and a client may try either. The
name is resolved once, so that exactly the addresses that were checked are served.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Sequence

import trio

from .errors import AddressInUseError, NetError
from .identity import host_port as host_port

_TRIES = 20
"""How many free ports of the first address are tried on the others before giving up."""
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_FULL_SECONDS = 0.1
_BATCH, _SILENT = 32, 8
_FAR = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses reserved for documentation. The route to them is the default route."""


def addresses(host: str) -> tuple[str, ...]:
    """The numeric addresses of a host. `::` (all IPv6 addresses) also gives 0.0.0.0 (all IPv4 addresses).
    NetError: the host has no address."""
    try:
        # An ASCII name is passed as bytes, so that a node does not load the IDNA codec, which needs memory.
        name = host.encode("ascii") if host.isascii() else host
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the host name is not valid"
        raise NetError(
            f"cannot listen on {host} ({reason}): give an address of this device, such as 127.0.0.1, or one "
            "that other devices can reach, if it is paired or with --insecure"
        ) from error
    numeric = dict.fromkeys(plain(str(sockaddr[0])) for *_, sockaddr in found)
    if "::" in numeric:
        numeric = dict.fromkeys(["0.0.0.0", *numeric])
    return tuple(numeric)


def reachable(numeric: Sequence[str]) -> str | None:
    """The first address that other devices can reach; None if all are loopback addresses."""
    return next((address for address in numeric if not ipaddress.ip_address(address).is_loopback), None)


async def listen(host: str, numeric: Sequence[str], port: int) -> list[trio.SocketListener]:
    """Listeners on all addresses of a host, on the same port. Port 0 chooses one that is free on all of them.
    Addresses that this device does not have are left out, if any other is left. AddressInUseError: the port
    is taken. NetError: the system refuses for another reason."""
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
                    f"port {port} of {host} is in use: stop the program that listens on it, or give another "
                    "port (0 takes a free one)"
                ) from error
            raise NetError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


async def accept(listener: trio.SocketListener) -> list[trio.SocketStream]:
    """Waits for connections, and returns those to serve of up to _BATCH that have arrived.

    A flood of connections must not delay the one that matters, and most of a flood says nothing. So of the
    connections that have sent nothing yet only the newest _SILENT are served, and the others are closed at
    once, which costs far less. When the process has no file descriptors left, it waits for some."""
    arrived: list[socket.socket] = []
    raw = socket.socket(fileno=listener.socket.fileno())  # trio's socket accepts one connection in each turn
    try:
        raw.setblocking(False)
        while not arrived:
            await trio.lowlevel.wait_readable(listener.socket)
            if not _accept_ready(raw, arrived):
                await trio.sleep(_FULL_SECONDS)
    finally:
        raw.detach()
    silent = [connection for connection in arrived if not _has_sent(connection)]
    for connection in silent[:-_SILENT]:
        connection.close()
    return [
        trio.SocketStream(trio.socket.from_stdlib_socket(connection))
        for connection in arrived
        if connection.fileno() >= 0
    ]


def _accept_ready(raw: socket.socket, arrived: list[socket.socket]) -> bool:
    """Accepts what is ready, up to _BATCH; False: the process has no file descriptor for the next one."""
    while len(arrived) < _BATCH:
        try:
            connection, _ = raw.accept()
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno in _FULL:
                return False
            if error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
                raise
            continue  # that connection broke before it was accepted
        connection.setblocking(False)
        arrived.append(connection)
    return True


def _has_sent(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except OSError:
        return False


def named(listeners: Sequence[trio.SocketListener]) -> list[str]:
    """HOST:PORT for each address of the listeners, loopback first. An unspecified address (0.0.0.0 or ::) is
    shown as the loopback address and the one that other devices on the network see."""
    found = []
    for listener in listeners:
        host, port = listener.socket.getsockname()[:2]
        if ipaddress.ip_address(host).is_unspecified:
            own = "::1" if ":" in host else "127.0.0.1"
            found += [(own, port), (_seen_by_others(listener.socket.family), port)]
        else:
            found.append((host, port))
    found.sort(key=lambda item: item[0] is not None and not ipaddress.ip_address(item[0]).is_loopback)
    return [host_port(host, port) for host, port in found if host]


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


def plain(address: str) -> str:
    """The address, with an IPv4-mapped IPv6 address as plain IPv4."""
    if ":" in address and "%" not in address:
        mapped = ipaddress.IPv6Address(address).ipv4_mapped
        return str(mapped or address)
    return address


def _seen_by_others(family: int) -> str | None:
    """This device's address on the interface of the default route; None if there is none. Sends nothing."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((_FAR[socket.AddressFamily(family)], 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None
