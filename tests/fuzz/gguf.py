"""Changes a field in the header of a GGUF file, and writes all that follows from it: counts and lengths."""

from __future__ import annotations

import struct
from contextlib import suppress
from random import Random
from typing import Any

_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_ALIGNMENT = 32
_VALUES = (
    0, 1, -1, 2, 3, 7, 8, 16, 32, 64, 255, 1 << 15, 1 << 20, 1 << 24, 1 << 31, 1 << 48, (1 << 63) - 1,
    0.0, 0.5, -1.0, 8.0, 1e-30, 1e30, float("inf"), float("nan"), True, False,
    "", "a", "none", "linear", "yarn", "llama", "gpt2", "llama-bpe", "bert", "default", "qwen2", "a b",
    "\u2581",
)  # fmt: skip
_KEYS = (
    "general.architecture", "general.alignment", "split.no", "split.count", "split.tensors.count",
    "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.scale_linear",
    "llama.attention.key_length", "llama.rope.freq_base", "tokenizer.chat_template",
    "tokenizer.chat_template.default", "tokenizer.ggml.pre", "tokenizer.ggml.model", "tokenizer.ggml.scores",
    "tokenizer.ggml.merges", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.eot_token_id",
)  # fmt: skip
_NAMES = ("token_embd.weight", "output.weight", "rope_freqs.weight", "blk.0.attn_q.weight", "blk.9.x", "")


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 4

    def number(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        (value,) = struct.unpack_from(f"<{code}", self._data, self.at)
        self.at += size
        return value

    def text(self) -> bytes:
        size = self.number("Q")
        if size > len(self._data):
            raise ValueError
        self.at += size
        return self._data[self.at - size : self.at]

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            return self.number(_CODES[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner == _LIST or count > len(self._data):
            raise ValueError
        return inner, [self.value(inner) for _ in range(count)]


def changed(random: Random, data: bytearray, at: int, source: object) -> None:
    """Changes the data, if they are the header of a GGUF file."""
    with suppress(ValueError, KeyError, struct.error, OverflowError):
        cursor = _Cursor(bytes(data))
        version, tensors, entries = (cursor.number(code) for code in "IQQ")
        if tensors + entries > len(data):
            return
        listed = [[cursor.text(), kind := cursor.number("I"), cursor.value(kind)] for _ in range(entries)]
        described = [
            [
                cursor.text(),
                [cursor.number("Q") for _ in range(cursor.number("I"))],
                *map(cursor.number, "IQ"),
            ]
            for _ in range(tensors)
        ]
        if described and random.random() < 0.3:
            _change_tensor(random, described)
        elif listed:
            _change_entry(random, listed)
        made = _written(version, listed, described)
        data[:] = made + bytes(-len(made) % _ALIGNMENT) + data[cursor.at + -cursor.at % _ALIGNMENT :]


def _change_tensor(random: Random, tensors: list[Any]) -> None:
    one, other = random.choice(tensors), random.choice(tensors)
    match random.randrange(6):
        case 0:
            tensors.remove(one)
        case 1:
            tensors.append(list(one))
        case 2:
            one[0] = random.choice((other[0], random.choice(_NAMES).encode()))
        case 3:
            one[1] = random.choice((other[1], one[1][::-1], one[1] * 2, [], [0], [1 << 40] * 2, [32, 1]))
        case 4:
            one[2] = random.choice((0, 1, 2, 8, 12, 14, 20, 28, 30, 4, 31, 36, 99))
        case _:
            one[3] = random.choice((other[3], one[3] + 1, one[3] + 32, 1 << 40, 0))


def _change_entry(random: Random, entries: list[Any]) -> None:
    entry = random.choice(entries)
    _, kind, value = entry
    match random.randrange(6):
        case 0:
            entries.remove(entry)
        case 1:
            entries.append([random.choice(_KEYS).encode(), *_typed(random)])
        case 2:
            entry[0] = random.choice((random.choice(entries)[0], random.choice(_KEYS).encode()))
        case 3:
            entry[1:] = _typed(random)
        case 4:
            entry[1:] = random.choice(entries)[1:]
        case _ if kind == _LIST and value[1]:
            items = value[1]
            at = random.randrange(len(items))
            items[at : at + random.choice((0, 1, 1))] = random.choice(
                ([], [items[at]] * 2, [random.choice(items)], [items[at] * 2])
            )
        case _:
            entry[1:] = _LIST, (kind, [value] * random.choice((0, 1, 40)))


def _typed(random: Random) -> tuple[int, Any]:
    """A value of some type."""
    value = random.choice(_VALUES)
    if isinstance(value, str):
        return _TEXT, value.encode()
    if isinstance(value, bool):
        return 7, value
    if isinstance(value, float):
        return random.choice((6, 12)), value
    return random.choice((4, 5, 10, 11)), value


def _written(version: int, entries: list[Any], tensors: list[Any]) -> bytes:
    made = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(entries))]
    for key, kind, value in entries:
        made += [_text(key), struct.pack("<I", kind), _value(kind, value)]
    for name, shape, kind, offset in tensors:
        made += [_text(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)]
    return b"".join(made)


def _value(kind: int, value: Any) -> bytes:
    if kind == _TEXT:
        return _text(value)
    if kind != _LIST:
        return struct.pack(f"<{_CODES[kind]}", value)
    inner, items = value
    return struct.pack("<IQ", inner, len(items)) + b"".join(_value(inner, item) for item in items)


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text
