"""What a server needs before it takes requests, by the options of `http_arguments`: sockets, keys, TLS. It
imports no part that answers, so that what is wrong is said at once."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import socket
import ssl
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import trio

from ..engine.errors import MissingDependencyError, ShoalError
from ..engine.os_errors import translated
from ..net.listen import addresses, listen, named, reachable

Listeners = list[trio.SocketListener]
_PACKAGES = ("h11", "prometheus_client")


def missing() -> MissingDependencyError:
    """The error for a package of the server that is not there."""
    return MissingDependencyError(
        f'the HTTP server needs the packages {" and ".join(_PACKAGES)}: pip install "shoal[serve]"'
    )


@dataclass(frozen=True, slots=True)
class Opened:
    """Sockets that listen, and who may ask there: see app.Options."""

    listeners: Listeners
    tls: ssl.SSLContext | None
    keys: Mapping[bytes, str] | None
    hosts: Hosts | None


@dataclass(frozen=True, slots=True)
class Hosts:
    """The hosts that the Host header of a request may name: these names, and with `addresses` any IP address.
    A page elsewhere whose name leads to this server (DNS rebinding) has that name in the header, and no page
    can have it replaced by an address."""

    names: Collection[str]
    addresses: bool = False

    def __contains__(self, header: str) -> bool:
        """Whether a Host header names one of them, whatever its port."""
        found = _HOST.fullmatch(header)
        if found is None:
            return False
        name = (found["address"] or found["name"]).lower().removesuffix(".")
        if name in self.names:
            return True
        with suppress(ValueError):
            return self.addresses and bool(ipaddress.ip_address(name))
        return False


_HOST = re.compile(r"(\[(?P<address>[0-9a-fA-F:.]+)\]|(?P<name>[^\s\[\]:/?#@]+))(:\d{0,5})?", re.ASCII)
LOCAL_HOSTS = Hosts(("127.0.0.1", "::1", "localhost"))
"""The names of a server on a loopback address."""


def opened(args: argparse.Namespace, host: str, port: int, warn: Callable[[str], object]) -> Opened:
    """Reads the files of the options, and listens. `warn` is told what an address means that other devices
    reach. AddressInUseError: the port is taken. MissingDependencyError: a package is not there. ShoalErrors:
    a file cannot be used."""
    if not all(find_spec(name) for name in _PACKAGES):
        raise missing()
    if args.tls_key is not None and args.tls_cert is None:
        raise ShoalError("--tls-key needs --tls-cert")
    keys = None if args.api_key_file is None else read_keys(args.api_key_file)
    tls = None if args.tls_cert is None else tls_context(args.tls_cert, args.tls_key)
    hosts = hosts_of(host, args.allow_host, keys=keys is not None)
    made = Opened(open_listeners(host, port), tls, keys, hosts)
    for warning in warnings(host, keys=keys is not None, tls=tls is not None):
        warn(f"warning: {warning}")
    return made


def urls(listeners: Listeners, tls: ssl.SSLContext | None) -> str:
    """Where the server is."""
    scheme = "http" if tls is None else "https"
    return ", ".join(f"{scheme}://{address}" for address in named(listeners))


def open_listeners(host: str, port: int) -> Listeners:
    """Listens on all addresses of a host. AddressInUseError, NetError: see net/listen.py."""
    return trio.run(listen, host, addresses(host), port)


def hosts_of(host: str, more: Sequence[str] = (), *, keys: bool = False) -> Hosts | None:
    """The hosts that requests to a server on `host` may name, and `more`. None: any, since other devices
    reach the server, and a page that does not know a key is not let in."""
    names = {*LOCAL_HOSTS.names, host.lower(), *(name.lower().removesuffix(".") for name in more)}
    if not reachable(addresses(host)):
        return Hosts(names)
    own = socket.gethostname().lower()
    return None if keys else Hosts(names | {own, f"{own.partition('.')[0]}.local"}, addresses=True)


def warnings(host: str, *, keys: bool, tls: bool) -> list[str]:
    """What an address means that other devices reach."""
    if not reachable(addresses(host)):
        return []
    found = []
    if not keys:
        found.append(f"everybody who reaches {host} can use the model: give --api-key-file")
    if not tls:
        found.append(f"who can listen in on the network reads what is asked on {host}: give --tls-cert")
    return found


def read_keys(path: Path) -> dict[bytes, str]:
    """The API keys of a file, by their SHA-256, with a name each: a line has a key, or a name and a key.
    ShoalError: others may read the file, or it has no key. OperatingSystemError: it cannot be read."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and (said := translated(error, path, "cannot be read")) is not None:
            raise said from error
        raise ShoalError(f"{path} cannot be read: {error}") from error
    if os.name == "posix" and mode & 0o077:
        raise ShoalError(f"other users may read {path}: chmod 600 {path}")
    found: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or line.startswith("#"):
            continue
        if len(words) > 2 or len(words[-1]) < 16:
            raise ShoalError(
                f"line {number} of {path} is not a key of at least 16 characters, or a name and a key"
            )
        found[sha256(words[-1].encode()).digest()] = words[0] if len(words) == 2 else f"key {number}"
    if not found:
        raise ShoalError(f"{path} has no key: write one on a line, such as that of `openssl rand -hex 24`")
    return found


def tls_context(certificate: Path, key: Path | None) -> ssl.SSLContext:
    """TLS with a certificate chain and its key. ShoalError: they cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ShoalError(f"{certificate} with its key cannot be used for TLS: {error}") from error
    return context
