"""Translates errors of the operating system into errors for users: what was refused, and the remedy."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from .errors import OperatingSystemError

_PATH = "check the path"
_DISK = "check the disk"
_LATER = "try again when the program that uses it has ended"
_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.ENOENT: _PATH,
    errno.ENOTDIR: _PATH,
    errno.EISDIR: _PATH,
    errno.EEXIST: _PATH,
    errno.ENOTEMPTY: _PATH,
    errno.ELOOP: _PATH,
    errno.ENAMETOOLONG: _PATH,
    errno.EIO: _DISK,
    errno.ESTALE: _DISK,
    errno.ENXIO: _DISK,
    errno.ENODEV: _DISK,
    errno.EBUSY: _LATER,
    errno.ETXTBSY: _LATER,
    errno.EAGAIN: _LATER,
    errno.EMFILE: "close other programs, or raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.ENOMEM: "close other programs, or take a smaller model or context",
    errno.ENOLCK: _DISK,
    errno.ENOTSUP: _DISK,
}
"""Remedies by errno, for errors that are the system's even if they name no file. Any other error without a
file name (a bad file descriptor, an invalid argument) is a bug in this program."""

_PLACES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
"""Errors that choosing another file or directory can avoid."""

STANDARD_INPUT, STANDARD_OUTPUT = "standard input", "standard output"
_STREAMS = {STANDARD_INPUT: "give the input as an argument", STANDARD_OUTPUT: "send the output elsewhere"}


def translated(
    error: OSError | MemoryError, path: object = None, what: str = ""
) -> OperatingSystemError | None:
    """The error for the user, or None if `error` is a bug in this program. `path` replaces the file that the
    error names; `what` says which operation on it was refused."""
    number = errno.ENOMEM if isinstance(error, MemoryError) else error.errno
    if path is None and isinstance(error, OSError):
        path = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    if number is None or (number not in _REMEDIES and path is None):
        return None
    reason = (isinstance(error, OSError) and error.strerror) or os.strerror(number)
    remedy = _STREAMS.get(str(path)) or _REMEDIES.get(number, _PATH)
    where = " ".join(str(part) for part in (path, what) if part)
    message = f"{where}{': ' if where else ''}{reason}: {remedy}"
    return OperatingSystemError(message, place=path if number in _PLACES else None)


def check_space(directory: Path, needed: int, what: str) -> None:
    """OperatingSystemError: the disk of `directory` has less than `needed` bytes free for `what`."""
    disk = shutil.disk_usage(directory)
    if disk.total and disk.free < needed:  # some file systems report a size of 0
        raise OperatingSystemError(
            f"{directory}: too little space on the disk: {what} needs {needed / 1e6:.1f} MB and "
            f"{disk.free / 1e6:.1f} MB are free: free space there",
            place=directory,
        )
