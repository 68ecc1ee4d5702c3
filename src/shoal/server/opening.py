"""What a server needs before it takes requests, by the options of `http_arguments`: sockets, keys, TLS. It
imports no part that answers, so that what is wrong is said at once."""

from __future__ import annotations

import argparse
import os
import ssl
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import trio

from ..engine.errors import MissingDependencyError, ShoalError
from ..engine.os_errors import translated
from ..net.listen import addresses, listen, named, reachable

LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")
"""Hosts that requests name to a server on a loopback address. A page elsewhere whose name leads here (DNS
rebinding) names another."""
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
    hosts: Sequence[str] | None


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
    made = Opened(open_listeners(host, port), tls, keys, hosts_of(host))
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


def hosts_of(host: str) -> Sequence[str] | None:
    """What the Host header of a request may name; None: anything, since other devices reach the server."""
    return None if reachable(addresses(host)) else (*LOCAL_HOSTS, host.lower())


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
