"""What a target is."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32


@dataclass(frozen=True, slots=True)
class Target:
    """Something that reads bytes. `seeds`: inputs that it accepts; the errors by which it says that others
    are wrong are those of `refuses`. `slow`: it gets so many times fewer inputs than others. `waits`: `read`
    is an async function, for trio's event loop."""

    read: Callable[[bytes], Any]
    seeds: tuple[bytes, ...]
    refuses: tuple[type[Exception], ...]
    slow: int = 1
    waits: bool = False


def shares(targets: Mapping[str, Target], count: int) -> dict[str, int]:
    """How many of `count` inputs each target gets."""
    parts = sum(1 / target.slow for target in targets.values())
    return {name: round(count / parts / target.slow) for name, target in targets.items()}


def mostly(data: bytes) -> bool:
    """True for three inputs of four: what they would be refused for first is put right."""
    return crc32(data) % 4 > 0


def fitting(data: bytes, header: int) -> bytes:
    """The frame, mostly with the length in its header that it has: the last four bytes."""
    if len(data) < header or not mostly(data):
        return data
    return data[: header - 4] + struct.pack("<I", len(data) - header) + data[header:]


def in_a_file(read: Callable[[Path], object], tail: int = 0) -> Callable[[bytes], object]:
    """Reads bytes from a file, with so many zeros behind them. It is in memory: it is written a million
    times."""
    file = os.memfd_create("fuzz")
    path = Path(f"/proc/self/fd/{file}")

    def reads(data: bytes) -> object:
        os.ftruncate(file, 0)
        os.ftruncate(file, len(data) + tail)
        os.pwrite(file, data, 0)
        return read(path)

    return reads
