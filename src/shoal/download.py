"""Download of one file over HTTP. It is resumed after an interruption, and kept only if its hash is right."""

from __future__ import annotations

import errno
import hashlib
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .engine.errors import DownloadError, OperatingSystemError
from .engine.os_errors import check_space, translated

_CHUNK = 1 << 16
_TIMEOUT = 30  # seconds without a byte
_TRIES = 5  # attempts in a row without progress
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.EFBIG)
_PAUSE = 1.0  # seconds before the second attempt; doubles each time


def download(
    url: str,
    target: Path,
    *,
    size: int,
    sha256: str,
    progress: Callable[[int, int], None],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Downloads `url` to `target`, first as `target`.part, which a later call continues.

    DownloadError: no connection after several attempts, or the hash is wrong.
    OperatingSystemError: the disk has too little space."""
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while (have := part.stat().st_size if part.exists() else 0) != size:
        if have > size:
            part.unlink()
            continue
        try:
            check_space(target.parent, size - have, f"the rest of {target.name}" if have else target.name)
            _fetch(url, part, have, size, progress)
        except OperatingSystemError as e:
            raise _with_part(e, part) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as e:
            if isinstance(e, OSError) and e.errno in _DISK and (refused := translated(e, target.parent)):
                raise _with_part(refused, part) from e
            failures = 1 if part.exists() and part.stat().st_size > have else failures + 1
            if failures >= _TRIES or _final(e):
                raise DownloadError(
                    f"{url} could not be downloaded: {_reason(e)}; what has arrived is kept: "
                    "check the network and repeat the command"
                ) from e
            sleep(_PAUSE * 2 ** (failures - 1))
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        part.unlink()
        raise DownloadError(
            f"{url} has the SHA-256 {found}, not {sha256}, and was discarded: repeat the command"
        )
    part.replace(target)


def _fetch(url: str, part: Path, have: int, size: int, progress: Callable[[int, int], None]) -> None:
    """Appends what is missing to `part`. IncompleteRead: the connection ended early."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        resumed = response.status == 206 and _starts_at(response.headers.get("Content-Range"), have)
        if not resumed:
            have = 0
        with part.open("ab" if resumed else "wb") as file:
            progress(have, size)
            while have < size and (chunk := response.read(min(_CHUNK, size - have))):
                file.write(chunk)
                have += len(chunk)
                progress(have, size)
    if have < size:
        raise http.client.IncompleteRead(b"", size - have)


def _with_part(error: OperatingSystemError, part: Path) -> OperatingSystemError:
    """The error, with the size and place of what has arrived. An empty `part` is removed."""
    with suppress(OSError):
        if size := part.stat().st_size:
            kept = f"{size / 1e6:.1f} MB that have arrived are kept in {part} for the next try"
            return OperatingSystemError(f"{error}, or remove what has arrived: {kept}", place=error.place)
        part.unlink()
    return error


def _starts_at(content_range: str | None, have: int) -> bool:
    return (content_range or "").startswith(f"bytes {have}-")


def _final(error: Exception) -> bool:
    """Whether another attempt is pointless: the server refused the request."""
    return isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code != 429


def _reason(error: Exception) -> str:
    return str(error.reason if isinstance(error, urllib.error.URLError) else error) or type(error).__name__
