"""Where the socket of this user's head is, who may be at its other end, and that there is one head only."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..engine.errors import OperatingSystemError, ShoalError
from ..engine.host import on_linux
from ..engine.os_errors import translated
from ..net.errors import AddressInUseError
from ..store import cache_directory

SOCKET, LOCK = "head.sock", "head.lock"
LONGEST = 103
"""Bytes of the path of a Unix socket, on the system that allows the fewest."""


def directory() -> Path:
    """`$XDG_RUNTIME_DIR/shoal`, or `run` in the cache directory where that is not set, as in Termux.
    OperatingSystemError: there is no home directory."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(base) / "shoal" if os.path.isabs(base) else cache_directory() / "run"


def socket_path() -> Path:
    """The path of the head's socket, whether a head runs or not. Errors as for `directory`."""
    return directory() / SOCKET


@contextmanager
def claimed() -> Iterator[Path]:
    """Makes this process the head of this user on this device, and gives the path for its socket; the
    directory is made if there is none. AddressInUseError: another process is the head. ShoalError: others may
    use the directory."""
    with _locked(directory()) as place:
        yield place / SOCKET


@contextmanager
def _locked(place: Path) -> Iterator[Path]:
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_private(place)
        lock = os.open(place / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise translated(error, place, "cannot be used for the head's socket") or error from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(lock, 20, 0).decode("ascii", "replace")
            raise AddressInUseError(
                f"`shoal up` runs on this device already (process {pid}): use it with `shoal run`, or end it "
                "first"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield place
    finally:
        os.close(lock)


def check_private(place: Path) -> None:
    """ShoalError: other users could put a socket of their own into the directory."""
    found = place.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ShoalError(f"other users may use {place}: run `chmod 700 {place}`")


@contextmanager
def short(path: Path) -> Iterator[str]:
    """A name of the socket for `bind` and `connect`, which refuse long paths. OperatingSystemError: the path
    is too long here."""
    if len(os.fsencode(path)) <= LONGEST:
        yield str(path)
        return
    if not on_linux():
        raise OperatingSystemError(f"{path} is too long for a socket: set XDG_RUNTIME_DIR to a shorter path")
    place = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{place}/{path.name}"
    finally:
        os.close(place)


def check_peer(connection: socket.socket) -> None:
    """PermissionError: the process at the other end belongs to another user, where the system tells."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return  # the directory lets nobody else in
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i")))
    if user != os.getuid():
        raise PermissionError("a process of another user is at the other end of the head's socket")
