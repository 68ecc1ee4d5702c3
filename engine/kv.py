"""Keys and values of sequences, in pages of 64 positions per layer.

A page is one flat array: for each kv head, keys `[64 / 16][head_dim][16]`, then values `[64][head_dim]`,
then, if they are int8, f32 scales of the 64 keys and of the 64 values (csrc/kernels.h). The layout is the
same on every device, so a page is sent and received as it stands. Pages are written by absolute position,
so writing a position again is harmless, and forgetting from a position on needs no work on pages kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ContextError
from .layout import LANES, PAGE
from .memory import Arena
from .program import KvState

Page = NDArray[np.uint8]
KV_TYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
}
"""What a page's numbers are; those of int8 have a scale a position and head."""
_SLAB = 32 << 20  # addresses, not memory: that comes page by page, as pages are written
_LIMIT = np.float32(127)


def page_bytes(state: KvState, kv_type: str) -> int:
    """Bytes of one page of a state: keys and values of 64 positions, and their scales."""
    return state.kv_heads * _head_bytes(state, kv_type)


def _head_bytes(state: KvState, kv_type: str) -> int:
    numbers = 2 * PAGE * state.head_dim * KV_TYPES[kv_type].itemsize
    return numbers + (2 * PAGE * 4 if kv_type == "int8" else 0)


class _Heads:
    """The parts of a page of a state, as views."""

    def __init__(self, page: Page, state: KvState, kv_type: str) -> None:
        heads, dim = state.kv_heads, state.head_dim
        whole = page.reshape(heads, _head_bytes(state, kv_type))
        numbers = whole[:, : 2 * PAGE * dim * KV_TYPES[kv_type].itemsize].view(KV_TYPES[kv_type])
        halves = numbers.reshape(heads, 2, PAGE * dim)
        self.keys = halves[:, 0].reshape(heads, PAGE // LANES, dim, LANES)
        self.values = halves[:, 1].reshape(heads, PAGE, dim)
        self.scales: NDArray[np.float32] | None = None
        """`[heads, 2, 64]`, of keys, then of values."""
        if kv_type == "int8":
            self.scales = whole[:, numbers.shape[1] :].view(np.float32).reshape(heads, 2, PAGE)


class PagePool:
    """Pages for all sequences of a stage, within `limit` bytes; freed pages are used again."""

    def __init__(self, kv_type: str, limit: int | None = None) -> None:
        self.kv_type = kv_type
        self.limit = limit
        self.used = 0
        self._free: dict[int, list[Page]] = {}
        self._slab: Arena | None = None

    def take(self, size: int) -> Page:
        """A page of `size` bytes, contents undefined. ContextError: the limit is reached."""
        if self.limit is not None and self.used + size > self.limit:
            raise ContextError(
                f"keys and values have filled the {self.limit / 1e6:.0f} MB promised to them: "
                "end another request, shorten the prompt, or promise more RAM"
            )
        free = self._free.get(size)
        try:
            page = free.pop() if free else self._cut(size)
        except MemoryError:
            raise ContextError(
                "out of memory for keys and values: end another request, or promise less"
            ) from None
        self.used += size
        return page

    def _cut(self, size: int) -> Page:
        """A new page of `size` bytes, cut from a slab of huge pages: attention walks over all of them."""
        try:
            if self._slab is not None:
                return self._slab.take(size)
        except MemoryError:  # used up
            pass
        self._slab = Arena(max(size, _SLAB))
        return self._slab.take(size)

    def give(self, page: Page) -> None:
        """Takes a page back."""
        self.used -= page.nbytes
        self._free.setdefault(page.nbytes, []).append(page)


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
                page = self.pool.take(page_bytes(state, self.pool.kv_type))
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
                self.pool.give(pages.pop())

    def keys_values(self, s: int, n: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values of positions [0, n) of state s: two arrays f32 `[kv_heads, n, head_dim]`."""
        state, keys, values = self.states[s], [], []
        for page in self.pages[s][: -(-n // PAGE)]:
            heads = _Heads(page, state, self.pool.kv_type)
            shape = (state.kv_heads, PAGE, state.head_dim)
            key = heads.keys.transpose(0, 1, 3, 2).reshape(shape).astype(np.float32)
            value = heads.values.astype(np.float32)
            if heads.scales is not None:
                key *= heads.scales[:, 0, :, None]
                value *= heads.scales[:, 1, :, None]
            keys.append(key)
            values.append(value)
        return np.concatenate(keys, axis=1)[:, :n], np.concatenate(values, axis=1)[:, :n]

    def write(self, s: int, first: int, keys: NDArray[np.float32], values: NDArray[np.float32]) -> None:
        """Writes keys and values f32 `[rows, kv_heads, head_dim]` at positions first, first + 1, …"""
        for i, (key, value) in enumerate(zip(keys, values, strict=True)):
            page, at = divmod(first + i, PAGE)
            heads = _Heads(self.pages[s][page], self.states[s], self.pool.kv_type)
            if heads.scales is not None:
                key, heads.scales[:, 0, at] = _rounded(key)
                value, heads.scales[:, 1, at] = _rounded(value)
            heads.keys[:, at // LANES, :, at % LANES] = key
            heads.values[:, at] = value


def _rounded(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Whole numbers in [-127, 127] and scales of the rows of x `[heads, head_dim]`."""
    largest = np.abs(x).max(axis=1)
    inverse = np.divide(_LIMIT, largest, out=np.zeros_like(largest), where=largest >= 1e-30)
    return np.rint(np.clip(x * inverse[:, None], -_LIMIT, _LIMIT)), np.where(inverse > 0, largest / _LIMIT, 0)
