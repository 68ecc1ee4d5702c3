"""Files of a model on their way from node to node, without I/O: pieces, sums, and what a node needs of its
disk (`Files`).

A file travels in requests of at most FILE_BYTES. It is checked in pieces of PIECE bytes, whose SHA-256 a
source tells (Sums), so that a source that sends wrong bytes is found at once. What decides in the end is the
SHA-256 of the whole file, which every node has in its index.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

PIECE = 4 * 1024 * 1024
"""Bytes of a piece of a file; the last one may be shorter."""
SUM_BYTES = 32


@dataclass(frozen=True, slots=True)
class Room:
    """The files that are missing and for which the disk has room, in the order in which they are wanted.
    `problem` says why there is none for others, or is empty."""

    names: tuple[str, ...]
    problem: str = ""


class Part(Protocol):
    """A file that is being fetched. All methods block, and raise OSError."""

    @property
    def size(self) -> int:
        """The bytes of the whole file."""
        ...

    @property
    def have(self) -> Mapping[int, tuple[bytes, str]]:
        """The pieces that are here: the SHA-256 of each, and the name of its source."""
        ...

    def write(self, at: int, data: bytes | bytearray) -> None:
        """Writes bytes of a piece that is not here yet."""
        ...

    def keep(self, piece: int, digest: bytes, source: str) -> None:
        """Notes that a piece with that SHA-256 was written, so that it is not fetched again after a
        restart."""
        ...

    def forget(self, pieces: Collection[int]) -> None:
        """Notes that these pieces are not here."""
        ...

    def finish(self, busy: Callable[[], bool]) -> bool:
        """Puts the file in its place, if its SHA-256 is that of the index. False: it is not, and no piece is
        here any more. Takes most of its time to rest while it is `busy`."""
        ...

    def close(self) -> None:
        """Lets another process go on with the file."""
        ...


class Files(Protocol):
    """The files of a node's model on its disk. `held`, `progress`, `names` and `size` return at once; the
    others block, and are called in a thread."""

    def held(self) -> frozenset[int]:
        """The units whose files are all whole."""
        ...

    def progress(self, units: Collection[int]) -> tuple[int, int]:
        """The bytes of the files of these units, and how many of them are here."""
        ...

    def names(self, units: Sequence[int]) -> tuple[str, ...]:
        """The names of the files of these units, in their order."""
        ...

    def read(self, name: str, first: int, last: int, ahead: int = 0) -> bytes:
        """Bytes [first, last) of a whole file, and up to `ahead` more of the same piece. ModelFileError: it
        is not whole here. ValueError: the model has no such file, or the file no such bytes; the message says
        which."""
        ...

    def sum(self, name: str, piece: int) -> bytes | None:
        """The SHA-256 of a piece of a whole file; None: it has no such piece. Errors as for `read`."""
        ...

    def make_room(self, units: Sequence[int], in_use: Collection[int]) -> Room:
        """Makes room on the disk for the files of these units that are missing, by removing files that are
        neither among them nor of units `in_use`."""
        ...

    def part(self, name: str) -> Part | None:
        """A missing file to be fetched, with what an earlier process has left of it. None: another process
        fetches it, or it has become whole. OSError: it cannot be written."""
        ...


def pieces(size: int) -> int:
    """The number of pieces of a file of that many bytes."""
    return -(-size // PIECE)


def piece_of(at: int) -> int:
    """The piece that a byte of a file is in."""
    return at // PIECE


def piece_range(piece: int, size: int) -> tuple[int, int]:
    """The bytes [first, last) of a piece of a file of `size` bytes."""
    return piece * PIECE, min((piece + 1) * PIECE, size)
