"""Keys and values of sequences, in pages of 256 positions per layer.

A page is one flat array: for each kv head, keys `[256 / 64][head_dim][64]`, then values `[256][head_dim]`; of
int8, four packed matrices, keys `[64, head_dim]` with fp16 scales, then four more, values `[head_dim, 64]`
with an f32 scale a position (csrc/kernels.h). The layout is the same on every device, so
a page is sent and received as it stands. Pages are written by absolute position, so writing a position again
is harmless, and forgetting from a position on needs no work on pages kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ContextError
from .layout import CHUNK, GROUP, PAGE, PANEL, QUAD, round_up
from .memory import Arena, room
from .program import KvState
from .quant import packed_shapes

F32 = NDArray[np.float32]
Page = NDArray[np.uint8]
KV_TYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
}
"""What a page's numbers are; those of int8 have scales."""
_SLAB = 32 << 20  # addresses, not memory: that comes as pages are written
_LIMIT = np.float32(127)


def page_bytes(state: KvState, kv_type: str) -> int:
    """Bytes of one page of a state: keys and values of 256 positions, and their scales."""
    return state.kv_heads * _head_bytes(state, kv_type)


def _head_bytes(state: KvState, kv_type: str) -> int:
    if kv_type == "int8":
        padded = round_up(state.head_dim, GROUP)
        return PAGE * (padded + state.head_dim + padded // GROUP * 2 + 4)
    return 2 * PAGE * state.head_dim * KV_TYPES[kv_type].itemsize


class _Floats:
    """Keys and values of a page of a state, as views."""

    def __init__(self, page: Page, state: KvState, kv_type: str) -> None:
        heads, dim = state.kv_heads, state.head_dim
        halves = page.view(KV_TYPES[kv_type]).reshape(heads, 2, PAGE * dim)
        self._keys = halves[:, 0].reshape(heads, PAGE // CHUNK, dim, CHUNK)
        self._values = halves[:, 1].reshape(heads, PAGE, dim)

    def read(self, n: int) -> tuple[F32, F32, None]:
        """The page's first n positions: two arrays f32 `[kv_heads, n, head_dim]`."""
        heads, _, dim = self._values.shape
        keys = self._keys[:, : -(-n // CHUNK)].transpose(0, 1, 3, 2).reshape(heads, -1, dim)
        return keys[:, :n].astype(np.float32), self._values[:, :n].astype(np.float32), None

    def write(self, at: int, keys: F32, values: F32) -> None:
        """Keys and values f32 `[kv_heads, head_dim]` of the page's position `at`."""
        self._keys[:, at // CHUNK, :, at % CHUNK] = keys
        self._values[:, at] = values


class _Int8:
    """The same of int8."""

    def __init__(self, page: Page, state: KvState) -> None:
        heads, self._dim = state.kv_heads, state.head_dim
        self._groups = round_up(self._dim, GROUP) // GROUP
        shape = heads, PAGE // CHUNK
        numbers = CHUNK * self._groups * GROUP, CHUNK * self._dim
        of_keys, of_values = numbers[0] + CHUNK * self._groups * 2, numbers[1] + CHUNK * 4
        halves = np.split(page.reshape(heads, -1), [shape[1] * of_keys], axis=1)
        keys, key_scales = np.split(halves[0].reshape(*shape, of_keys), [numbers[0]], axis=2)
        values, value_scales = np.split(halves[1].reshape(*shape, of_values), [numbers[1]], axis=2)
        (panels, quads, line), scales = packed_shapes(CHUNK, self._dim)
        self._keys = keys.view(np.int8).reshape(*shape, panels, quads, PANEL, line // PANEL)
        self._key_scales = key_scales.view(np.float16).reshape(*shape, *scales)
        (panels, quads, line), _ = packed_shapes(self._dim, CHUNK)
        self._values = values.view(np.int8).reshape(*shape, panels, quads, PANEL, line // PANEL)
        self._value_scales = value_scales.view(np.float32)

    def read(self, n: int) -> tuple[F32, F32, F32]:
        """As of _Floats, but for the values' scales, which are the third: `[kv_heads, n]`."""
        heads, chunks = len(self._keys), -(-n // CHUNK)
        grouped = heads, chunks * CHUNK, self._groups, GROUP
        keys = self._keys[:, :chunks].transpose(0, 1, 2, 4, 3, 5).reshape(grouped).astype(np.float32)
        keys *= self._key_scales[:, :chunks].transpose(0, 1, 2, 4, 3).reshape(*grouped[:3], 1)
        values = self._values[:, :chunks].transpose(0, 1, 3, 5, 2, 4).reshape(heads, -1, self._dim)
        scales = self._value_scales[:, :chunks].reshape(heads, -1)
        keys = keys.reshape(heads, chunks * CHUNK, -1)[:, :n, : self._dim]
        return keys, values[:, :n].astype(np.float32), scales[:, :n]

    def write(self, at: int, keys: F32, values: F32) -> None:
        """As of _Floats."""
        heads, (chunk, at) = len(keys), divmod(at, CHUNK)
        panel, lane = divmod(at, PANEL)
        groups = np.zeros((heads, self._groups * GROUP), np.float32)
        groups[:, : self._dim] = keys
        numbers, scales = _rounded(groups.reshape(heads, self._groups, GROUP))
        self._keys[:, chunk, panel, :, lane] = numbers.reshape(heads, -1, QUAD)
        self._key_scales[:, chunk, panel, :, lane] = scales
        numbers, self._value_scales[:, chunk, at] = _rounded(values)
        self._values[:, chunk, :, at // QUAD, :, at % QUAD] = numbers.reshape(heads, -1, PANEL)


def _heads(page: Page, state: KvState, kv_type: str) -> _Floats | _Int8:
    return _Int8(page, state) if kv_type == "int8" else _Floats(page, state, kv_type)


class PagePool:
    """Pages for all sequences of a stage, within `limit` bytes; freed pages are used again.

    A sequence's first pages are cut from memory in small pages, so that a short context takes no more of it
    than it fills; `states` are what a sequence has."""

    def __init__(self, kv_type: str, limit: int | None = None, states: Sequence[KvState] = ()) -> None:
        self.kv_type = kv_type
        self.limit = limit
        self.used = 0
        self._free: dict[tuple[int, bool], list[Page]] = {}
        self._slabs: dict[bool, Arena] = {}
        self._slab_bytes = {True: room(page_bytes(state, kv_type) for state in states), False: _SLAB}

    def take(self, size: int, *, first: bool) -> Page:
        """A page of `size` bytes, contents undefined; `first` of a sequence's. ContextError: the limit is
        reached."""
        if self.limit is not None and self.used + size > self.limit:
            raise ContextError(
                f"keys and values have filled the {self.limit / 1e6:.0f} MB promised to them: "
                "end another request, shorten the prompt, or promise more RAM"
            )
        free = self._free.get((size, first))
        try:
            page = free.pop() if free else self._cut(size, first)
        except MemoryError:
            raise ContextError(
                "out of memory for keys and values: end another request, or promise less"
            ) from None
        self.used += size
        return page

    def _cut(self, size: int, first: bool) -> Page:
        """A new page of `size` bytes, cut from a slab: of huge pages but for the first, as attention walks
        over all of them."""
        try:
            return self._slabs[first].take(size)
        except (KeyError, MemoryError):  # none yet, or used up
            self._slabs[first] = Arena(max(size, self._slab_bytes[first]), huge=not first)
            return self._slabs[first].take(size)

    def give(self, page: Page, *, first: bool) -> None:
        """Takes a page back."""
        self.used -= page.nbytes
        self._free.setdefault((page.nbytes, first), []).append(page)


class SequenceKv:
    """Pages of one sequence for the states of a stage, and the table of their addresses that C reads."""

    def __init__(self, pool: PagePool, states: Sequence[KvState], context: int) -> None:
        self.pool = pool
        self.states = tuple(states)
        self.pages: list[list[Page]] = [[] for _ in states]
        self._held = self._most = 0  # pages that every state has, and that any state has
        self.table = np.zeros((max(len(self.states), 1), -(-context // PAGE)), np.uint64)

    def reserve(self, positions: int) -> None:
        """Makes sure that positions [0, positions) have pages. ContextError: no room; nothing is lost
        then."""
        need = -(-positions // PAGE)
        if need <= self._held:  # nearly always: the lists stay untouched
            return
        self._most = max(self._most, need)
        for s, state in enumerate(self.states):
            while len(self.pages[s]) < need:
                page = self.pool.take(page_bytes(state, self.pool.kv_type), first=not self.pages[s])
                self.table[s, len(self.pages[s])] = page.ctypes.data
                self.pages[s].append(page)
        self._held = need

    def truncate(self, positions: int) -> None:
        """Forgets positions from `positions` on; pages that hold nothing any more go back to the pool."""
        keep = -(-positions // PAGE)
        if self._most <= keep:
            return
        self._held, self._most = min(self._held, keep), keep
        for pages in self.pages:
            while len(pages) > keep:
                self.pool.give(pages.pop(), first=len(pages) == 0)

    def keys_values(self, s: int, n: int) -> tuple[F32, F32, F32 | None]:
        """Keys and values of positions [0, n) of state s: two arrays f32 `[kv_heads, n, head_dim]`; of int8,
        the values are numbers and the third array their scales, `[kv_heads, n]`."""
        pages = [_heads(page, self.states[s], self.pool.kv_type) for page in self.pages[s][: -(-n // PAGE)]]
        parts = (page.read(min(n - i * PAGE, PAGE)) for i, page in enumerate(pages))
        keys, values, scales = zip(*parts, strict=True)
        join = partial(np.concatenate, axis=1)
        return join(keys), join(values), None if scales[0] is None else join(scales)

    def write(self, s: int, first: int, keys: F32, values: F32) -> None:
        """Writes keys and values f32 `[rows, kv_heads, head_dim]` at positions first, first + 1, …"""
        for i, (key, value) in enumerate(zip(keys, values, strict=True)):
            page, at = divmod(first + i, PAGE)
            _heads(self.pages[s][page], self.states[s], self.pool.kv_type).write(at, key, value)


def _rounded(x: F32) -> tuple[F32, F32]:
    """Whole numbers in [-127, 127] of x `[..., n]`, and scales `[...]`."""
    largest = np.abs(x).max(axis=-1)
    inverse = np.divide(_LIMIT, largest, out=np.zeros_like(largest), where=largest >= 1e-30)
    return np.rint(np.clip(x * inverse[..., None], -_LIMIT, _LIMIT)), np.where(
        inverse > 0, largest / _LIMIT, 0
    )
