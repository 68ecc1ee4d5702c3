"""Changes bytes at random: a bit, a number at the edge of its type, a piece that is cut, doubled or taken
from another input, and words of JSON."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from random import Random

MOST_BYTES = 64 * 1024
"""Inputs do not grow beyond this."""
NUMBERS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
WORDS = (
    b"null", b"true", b"[]", b"{}", b'""', b"-1", b"0", b"1e999", b"1.5", b"NaN", b"-0.0", b"9" * 400,
    b"65536", b"16777216", b"1e-300", b"1e30", b"0.1", b"[0]", b'{"a":0}',
    b"18446744073709551616", b'"\\ud800"', b'"\\u0000"', b'"' + b"x" * 300 + b'"', b"[" * 3000,
    b'{"":' * 2000, b",", b'"a":1,', b"../../x", b"\xff\xfe",
)  # fmt: skip


def mutated(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """The data with one to four changes."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(len(changed) + 1)
        random.choice(_CHANGES)(random, changed, at, others)
    return bytes(changed[:MOST_BYTES])


def _bit(random: Random, data: bytearray, at: int, others: Sequence[bytes]) -> None:
    if at < len(data):
        data[at] ^= 1 << random.randrange(8)


def _number(random: Random, data: bytearray, at: int, others: Sequence[bytes]) -> None:
    width = random.choice((1, 2, 4, 8))
    value = random.choice(NUMBERS) & ((1 << 8 * width) - 1)
    data[at : at + width] = value.to_bytes(width, random.choice(("little", "big")))


def _cut(random: Random, data: bytearray, at: int, others: Sequence[bytes]) -> None:
    del data[at : at + random.choice((1, 2, 8, 64, len(data)))]


def _double(random: Random, data: bytearray, at: int, others: Sequence[bytes]) -> None:
    data[at:at] = data[at : at + random.choice((1, 8, 64))] * random.choice((1, 2, 50))


def _splice(random: Random, data: bytearray, at: int, others: Sequence[bytes]) -> None:
    other = random.choice(others)
    start = random.randrange(len(other) + 1)
    data[at : at + random.randrange(64)] = other[start : start + random.randrange(1, 256)]


def _word(random: Random, data: bytearray, at: int, others: Sequence[bytes]) -> None:
    """Puts a word in the place of a value of JSON, if there is one behind `at`."""
    start = data.find(b":", at) + 1
    end = min((end for mark in b",]}" if (end := data.find(mark, start)) >= 0), default=start)
    if not start:
        start = end = at
    data[start:end] = random.choice(WORDS)


def _float(random: Random, data: bytearray, at: int, others: Sequence[bytes]) -> None:
    data[at : at + 4] = struct.pack("<f", random.choice((float("nan"), float("inf"), -1.0, 1e38)))


_CHANGES = (_bit, _number, _cut, _double, _splice, _word, _word, _float)
