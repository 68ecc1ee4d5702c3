"""The memory layout of a page: keys and values of 256 positions of one layer.

A page is one flat array. For each kv head it has f32 or f16 keys `[256 / 64][head_dim][64]`, then values
`[256][head_dim]`. With int8 it has four packed matrices of keys `[64, head_dim]` with fp16 scales, then
four of values `[head_dim, 64]` with one f32 scale per position (csrc/kernels.h). A chunk is 64 positions:
for each kv head its keys, then its values. Both layouts are the same on every device."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import F32
from .layout import CHUNK, GROUP, PAGE, PANEL, QUAD, round_up
from .packing import packed_shapes
from .program import KvState

Bytes = NDArray[np.uint8]
KV_TYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
}
"""Element types of keys and values; int8 values have scales."""
_LIMIT = np.float32(127)


def page_bytes(state: KvState, kv_type: str) -> int:
    """Bytes of one page of a state: keys, values and scales of 256 positions."""
    return state.kv_heads * _head_bytes(state, kv_type)


def _head_bytes(state: KvState, kv_type: str) -> int:
    values = state.head_dim * KV_TYPES[kv_type].itemsize + (4 if kv_type == "int8" else 0)
    return PAGE // CHUNK * _key_bytes(state, kv_type) + PAGE * values


def _key_bytes(state: KvState, kv_type: str) -> int:
    """Bytes of one head's keys in a chunk."""
    if kv_type == "int8":
        padded = round_up(state.head_dim, GROUP)
        return CHUNK * (padded + padded // GROUP * 2)
    return CHUNK * state.head_dim * KV_TYPES[kv_type].itemsize


class _Floats:
    """A page of f32 or f16 keys and values, as views."""

    def __init__(self, page: Bytes, state: KvState, kv_type: str) -> None:
        heads, dim = state.kv_heads, state.head_dim
        halves = page.view(KV_TYPES[kv_type]).reshape(heads, 2, PAGE * dim)
        self._keys = halves[:, 0].reshape(heads, PAGE // CHUNK, dim, CHUNK)
        self._values = halves[:, 1].reshape(heads, PAGE, dim)

    def read(self, n: int) -> tuple[F32, F32, None]:
        """Keys and values of the first n positions: two arrays f32 `[kv_heads, n, head_dim]`."""
        heads, _, dim = self._values.shape
        keys = self._keys[:, : -(-n // CHUNK)].transpose(0, 1, 3, 2).reshape(heads, -1, dim)
        return keys[:, :n].astype(np.float32), self._values[:, :n].astype(np.float32), None

    def write(self, at: int, keys: F32, values: F32) -> None:
        """Writes keys and values f32 `[kv_heads, head_dim]` at position `at` of the page."""
        self._keys[:, at // CHUNK, :, at % CHUNK] = keys
        self._values[:, at] = values

    def clear(self, at: int) -> None:
        """Zeroes the positions of the first chunk from `at` on."""
        self._keys[:, 0, :, at:] = 0
        self._values[:, at:CHUNK] = 0

    def sound(self, chunk: int) -> bool:
        """Whether attention may read the chunk: all keys and values are finite."""
        values = self._values[:, chunk * CHUNK : (chunk + 1) * CHUNK]
        return bool(np.isfinite(self._keys[:, chunk]).all() and np.isfinite(values).all())


class _Int8:
    """A page of int8 keys and values, as views. The methods are those of `_Floats`."""

    def __init__(self, page: Bytes, state: KvState) -> None:
        heads, self._dim = state.kv_heads, state.head_dim
        self._groups = round_up(self._dim, GROUP) // GROUP
        shape = heads, PAGE // CHUNK
        sizes = CHUNK * self._groups * GROUP, CHUNK * self._dim
        of_keys, of_values = sizes[0] + CHUNK * self._groups * 2, sizes[1] + CHUNK * 4
        halves = np.split(page.reshape(heads, -1), [shape[1] * of_keys], axis=1)
        keys, key_scales = np.split(halves[0].reshape(*shape, of_keys), [sizes[0]], axis=2)
        values, value_scales = np.split(halves[1].reshape(*shape, of_values), [sizes[1]], axis=2)
        (panels, quads, line), scales = packed_shapes(CHUNK, self._dim)
        self._keys = keys.view(np.int8).reshape(*shape, panels, quads, PANEL, line // PANEL)
        self._key_scales = key_scales.view(np.float16).reshape(*shape, *scales)
        (panels, quads, line), _ = packed_shapes(self._dim, CHUNK)
        self._values = values.view(np.int8).reshape(*shape, panels, quads, PANEL, line // PANEL)
        self._value_scales = value_scales.view(np.float32)

    def read(self, n: int) -> tuple[F32, F32, F32]:
        """Keys f32 and quantised values as f32, both `[kv_heads, n, head_dim]`, and the scales of the values
        `[kv_heads, n]`, for the first n positions."""
        heads, chunks = len(self._keys), -(-n // CHUNK)
        grouped = heads, chunks * CHUNK, self._groups, GROUP
        keys = self._keys[:, :chunks].transpose(0, 1, 2, 4, 3, 5).reshape(grouped).astype(np.float32)
        keys *= self._key_scales[:, :chunks].transpose(0, 1, 2, 4, 3).reshape(*grouped[:3], 1)
        values = self._values[:, :chunks].transpose(0, 1, 3, 5, 2, 4).reshape(heads, -1, self._dim)
        scales = self._value_scales[:, :chunks].reshape(heads, -1)
        keys = keys.reshape(heads, chunks * CHUNK, -1)[:, :n, : self._dim]
        return keys, values[:, :n].astype(np.float32), scales[:, :n]

    def write(self, at: int, keys: F32, values: F32) -> None:
        """Quantises and writes keys and values f32 `[kv_heads, head_dim]` at position `at` of the page."""
        heads, (chunk, at) = len(keys), divmod(at, CHUNK)
        panel, lane = divmod(at, PANEL)
        groups = np.zeros((heads, self._groups * GROUP), np.float32)
        groups[:, : self._dim] = keys
        quantised, scales = _rounded(groups.reshape(heads, self._groups, GROUP))
        self._keys[:, chunk, panel, :, lane] = quantised.reshape(heads, -1, QUAD)
        self._key_scales[:, chunk, panel, :, lane] = scales
        quantised, self._value_scales[:, chunk, at] = _rounded(values)
        self._values[:, chunk, :, at // QUAD, :, at % QUAD] = quantised.reshape(heads, -1, PANEL)

    def clear(self, at: int) -> None:
        """Zeroes the positions of the first chunk from `at` on."""
        for i in range(at, CHUNK):
            panel, lane = divmod(i, PANEL)
            self._keys[:, 0, panel, :, lane] = self._key_scales[:, 0, panel, :, lane] = 0
            self._values[:, 0, :, i // QUAD, :, i % QUAD] = 0
        self._value_scales[:, 0, at:] = 0

    def sound(self, chunk: int) -> bool:
        """Whether attention may read the chunk: scales are finite, and no quantised value is -128, which has
        no int8 negative, so that instruction sets disagree on its products."""
        scales = self._key_scales[:, chunk], self._value_scales[:, chunk]
        quantised = self._keys[:, chunk], self._values[:, chunk]
        return all(np.isfinite(s).all() for s in scales) and all(n.min() > -128 for n in quantised)


def views(page: Bytes, state: KvState, kv_type: str) -> _Floats | _Int8:
    return _Int8(page, state) if kv_type == "int8" else _Floats(page, state, kv_type)


def chunks_of(page: Bytes, state: KvState, kv_type: str) -> tuple[Bytes, Bytes]:
    """The keys and the values of a page as views, each `[kv_heads, chunks of 64 positions, bytes]`."""
    chunks, keys = PAGE // CHUNK, _key_bytes(state, kv_type)
    heads = page.reshape(state.kv_heads, -1)
    first, second = np.split(heads, [chunks * keys], axis=1)
    return first.reshape(state.kv_heads, chunks, -1), second.reshape(state.kv_heads, chunks, -1)


def cleared(part: Bytes, state: KvState, kv_type: str, n: int) -> Bytes:
    """A copy of a chunk `[kv_heads, bytes]` with zeros for its positions from n on."""
    page = np.zeros(page_bytes(state, kv_type), np.uint8)
    keys, values = chunks_of(page, state, kv_type)
    keys[:, 0], values[:, 0] = np.split(part, [keys.shape[2]], axis=1)
    views(page, state, kv_type).clear(n)
    return np.concatenate([keys[:, 0], values[:, 0]], axis=1)


def _rounded(x: F32) -> tuple[F32, F32]:
    """Quantised values in [-127, 127] of x `[..., n]`, as floats, and their scales `[...]`."""
    largest = np.abs(x).max(axis=-1)
    inverse = np.divide(_LIMIT, largest, out=np.zeros_like(largest), where=largest >= 1e-30)
    return np.rint(np.clip(x * inverse[..., None], -_LIMIT, _LIMIT)), np.where(
        inverse > 0, largest / _LIMIT, 0
    )
