"""Changes inputs at random: bits and numbers, pieces that are cut, doubled or taken from another input, and
values of the JSON in it, elements of a certificate with the lengths around them, or fields of a GGUF file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from . import gguf

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
    b'{"":' * 2000, b",", b'"a":1,', b"../../x", b"\xff\xfe", b"9" * 5000,
    *(b"[" * depth + b"]" * depth for depth in (60, 400, 980)),
)  # fmt: skip
VALUES = (
    None, True, False, 0, 1, -1, 2, 7, 64, 4096, 65535, 65536, 1 << 24, 1 << 31, 1 << 53, 1 << 63, 1 << 64,
    0.0, 0.5, 1e-300, 1e30, 1e300, float("nan"), float("inf"), "", "a", "0", "x" * 70, "x" * 300, "ü", "a b",
    "\n", "\0", "\ud800", "\u202e", "../x", "[" * 900 + "]" * 900, [], {}, [0], ["a"], [[]], [None], {"a": 0},
)  # fmt: skip


_GGUF, _SEQUENCE = b"GGUF", b"\x30\x82"
"""How a GGUF file and a certificate begin."""


@dataclass(frozen=True, slots=True)
class Source:
    """What changes are made of: other inputs, and words that the reader may know."""

    inputs: Sequence[bytes]
    words: Sequence[str | int | float]


def mutated(random: Random, data: bytes, source: Source) -> bytes:
    """The data with one to four changes."""
    changed = bytearray(data)
    changes = _BYTES
    if data.startswith(_GGUF):
        changes += 12 * (gguf.changed,)
    elif data.startswith(_SEQUENCE):
        changes += 8 * (_element,)
    elif b"{" in data:
        changes += 4 * (_tree,)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(len(changed) + 1)
        random.choice(changes)(random, changed, at, source)
    return bytes(changed[:MOST_BYTES])


def _bit(random: Random, data: bytearray, at: int, source: Source) -> None:
    if at < len(data):
        data[at] ^= 1 << random.randrange(8)


def _number(random: Random, data: bytearray, at: int, source: Source) -> None:
    width = random.choice((1, 2, 4, 8))
    value = random.choice(NUMBERS) & ((1 << 8 * width) - 1)
    data[at : at + width] = value.to_bytes(width, random.choice(("little", "big")))


def _near(random: Random, data: bytearray, at: int, source: Source) -> None:
    """A number that is there, and a little more or less."""
    width = random.choice((1, 2, 4, 8))
    value = int.from_bytes(data[at : at + width], "little") + random.choice((-32, -8, -4, -1, 1, 4, 8, 32))
    data[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")


def _cut(random: Random, data: bytearray, at: int, source: Source) -> None:
    del data[at : at + random.choice((1, 2, 4, 8, 64, len(data)))]


def _double(random: Random, data: bytearray, at: int, source: Source) -> None:
    data[at:at] = data[at : at + random.choice((1, 8, 64))] * random.choice((1, 2, 50))


def _splice(random: Random, data: bytearray, at: int, source: Source) -> None:
    other = random.choice(source.inputs)
    start = random.randrange(len(other) + 1)
    data[at : at + random.randrange(64)] = other[start : start + random.randrange(1, 256)]


def _word(random: Random, data: bytearray, at: int, source: Source) -> None:
    """Puts a word in the place of another, or of a value of JSON, if there is one behind `at`."""
    if source.words and random.random() < 0.5:
        start = end = at
        while end < len(data) and chr(data[end]).isalnum():
            end += 1
        data[start:end] = str(random.choice(source.words)).encode("utf-8", "replace")
        return
    start = data.find(b":", at) + 1
    end = min((end for mark in b",]}" if (end := data.find(mark, start)) >= 0), default=start)
    if not start:
        start = end = at
    data[start:end] = random.choice(WORDS)


def _float(random: Random, data: bytearray, at: int, source: Source) -> None:
    data[at : at + 4] = struct.pack("<f", random.choice((float("nan"), float("inf"), -1.0, 1e38)))


# --- JSON


def _tree(random: Random, data: bytearray, at: int, source: Source) -> None:
    """Changes a value of the object in the data, or of one in a string of it."""
    begin, end = data.find(b"{"), data.rfind(b"}") + 1
    try:
        root = [json.loads(data[begin:end])]
        places = [*_places(root)]
        holder, key = random.choice(places)
        random.choice(_EDITS)(random, holder, key, source, places)
        text = json.dumps(root, ensure_ascii=random.random() < 0.5, separators=(",", ":"))[1:-1]
    except (ValueError, RecursionError, OverflowError):  # there is none
        return
    data[begin:end] = text.encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All values in a value, as what holds them and their keys."""
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        for key, item in holder.items() if isinstance(holder, dict) else enumerate(holder):
            yield holder, key
            if isinstance(item, dict | list):
                waiting.append(item)


def _replace(random: Random, holder: Any, key: Any, source: Source, places: Any) -> None:
    holder[key] = _value(random, source)


def _insert(random: Random, holder: Any, key: Any, source: Source, places: Any) -> None:
    other, name = random.choice(places)
    value = random.choice((other[name], _value(random, source)))
    if isinstance(holder, dict):
        holder[str(_value(random, source))[:300]] = value
    else:
        holder.insert(key, value)


def _value(random: Random, source: Source) -> Any:
    return random.choice(random.choice((VALUES, source.words or VALUES)))


def _exchange(random: Random, holder: Any, key: Any, source: Source, places: Any) -> None:
    other, name = random.choice(places)
    holder[key] = json.loads(json.dumps(other[name]))  # a copy, or the value could come to hold itself


def _remove(random: Random, holder: Any, key: Any, source: Source, places: Any) -> None:
    del holder[key]


def _repeat(random: Random, holder: Any, key: Any, source: Source, places: Any) -> None:
    if isinstance(holder, list):
        holder[key:key] = [holder[key]] * int(300 ** random.random() ** 2)
    else:
        holder[f"{key}{random.choice('01x')}"] = holder[key]


def _rename(random: Random, holder: Any, key: Any, source: Source, places: Any) -> None:
    if isinstance(holder, dict):
        _, name = random.choice(places)
        holder[name if isinstance(name, str) else str(_value(random, source))[:300]] = holder.pop(key)


def _adjust(random: Random, holder: Any, key: Any, source: Source, places: Any) -> None:
    if type(holder[key]) in (int, float):
        holder[key] += random.choice((-1, 1, 0.5, holder[key]))
    elif isinstance(holder[key], str):
        text = bytearray(holder[key], "utf-8", "surrogatepass")
        _tree(random, text, 0, source)
        random.choice((_bit, _cut, _double))(random, text, random.randrange(len(text) + 1), source)
        holder[key] = text.decode("utf-8", "replace")


def _enclose(random: Random, holder: Any, key: Any, source: Source, places: Any) -> None:
    for _ in range(random.choice((1, 2, 30, 70, 450))):
        holder[key] = random.choice(([holder[key]], {"a": holder[key]}))


_EDITS = (
    *(_replace, _replace, _replace, _exchange, _insert, _insert),
    *(_remove, _repeat, _rename, _adjust, _adjust, _enclose),
)


# --- certificates


def _element(random: Random, data: bytearray, at: int, source: Source) -> None:
    """Changes an element of the DER in the data, if it is that, and the lengths around it."""
    if not (found := _elements(bytes(data))):
        return
    holder, i = random.choice([*_nested(found)])
    tag, content = holder[i]
    match random.randrange(5):
        case 0:
            del holder[i]
        case 1:
            holder[i:i] = [holder[i]]
        case 2:
            holder[i] = random.randrange(256), content
        case 3 if isinstance(content, bytes):
            text = bytearray(content)
            random.choice((_bit, _number, _near, _cut, _double))(random, text, random.randrange(9), source)
            holder[i] = tag, bytes(text)
        case _:
            other, k = random.choice([*_nested(found)])
            copy = other[k][1]
            holder[i] = tag, _written(copy) if isinstance(copy, list) else copy
    data[:] = _written(found)


def _elements(data: bytes) -> list[tuple[int, Any]] | None:
    """The elements that fill the data, as tags with bytes or further elements; None: it is not that."""
    found, at = [], 0
    while at < len(data):
        if at + 2 > len(data):
            return None
        tag, size, at = data[at], data[at + 1], at + 2
        if size >= 0x80:
            count = size & 3
            size, at = int.from_bytes(data[at : at + count], "big"), at + count
        content = data[at : at + size]
        if len(content) < size:
            return None
        inner = _elements(content) if tag & 0x20 else None
        found.append((tag, content if inner is None else inner))
        at += size
    return found


def _nested(elements: list[tuple[int, Any]]) -> Iterator[tuple[Any, int]]:
    """All elements, as what holds them and their numbers."""
    for i, (_, content) in enumerate(elements):
        yield elements, i
        if isinstance(content, list):
            yield from _nested(content)


def _written(elements: list[tuple[int, Any]]) -> bytes:
    made = bytearray()
    for tag, content in elements:
        body = _written(content) if isinstance(content, list) else content
        size = len(body).to_bytes(2, "big")
        long = b"\x81" + size[1:] if len(body) < 0x100 else b"\x82" + size
        made += bytes([tag]) + (size[1:] if len(body) < 0x80 else long) + body
    return bytes(made[:MOST_BYTES])


_BYTES = (_bit, _number, _near, _cut, _double, _splice, _word, _float)
