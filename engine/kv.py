"""Keys and values of sequences, in pages of 64 positions per layer.

A page is one flat array: for each kv head, keys `[64 / 16][head_dim][16]`, then values `[64][head_dim]`
(csrc/kernels.h). The layout is the same on every device, so a page is sent and received as it stands. Pages
are written by absolute position, so writing a position again is harmless, and forgetting from a position on
needs no work on pages kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ContextError
from .layout import LANES, PAGE
from .memory import Arena
from .program import KvState

Page = NDArray[Any]
_SLAB = 32 << 20  # addresses, not memory: that comes page by page, as pages are written


def page_elements(state: KvState) -> int:
    """Elements of one page of a state: keys and values of 64 positions."""
    return 2 * PAGE * state.kv_heads * state.head_dim


class PagePool:
    """Pages for all sequences of a stage, within `limit` bytes; freed pages are used again."""

    def __init__(self, dtype: np.dtype[Any], limit: int | None = None) -> None:
        self.dtype = dtype
        self.limit = limit
        self.used = 0
        self._free: dict[int, list[Page]] = {}
        self._slab: Arena | None = None

    def take(self, elements: int) -> Page:
        """A page of `elements` elements, contents undefined. ContextError: the limit is reached."""
        size = elements * self.dtype.itemsize
        if self.limit is not None and self.used + size > self.limit:
            raise ContextError(
                f"keys and values have filled the {self.limit / 1e6:.0f} MB promised to them: "
                "end another request, shorten the prompt, or promise more RAM"
            )
        self.used += size
        free = self._free.get(elements)
        try:
            page = free.pop() if free else self._cut(size).view(self.dtype)
        except MemoryError:
            self.used -= size
            raise ContextError(
                "out of memory for keys and values: end another request, or promise less"
            ) from None
        return page

    def _cut(self, size: int) -> NDArray[np.uint8]:
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
        self._free.setdefault(page.size, []).append(page)


class SequenceKv:
    """Pages of one sequence for the states of a stage, and the table of their addresses that C reads."""

    def __init__(self, pool: PagePool, states: Sequence[KvState], context: int) -> None:
        self.pool = pool
        self.states = tuple(states)
        self.pages: list[list[Page]] = [[] for _ in states]
        self.table = np.zeros((max(len(self.states), 1), -(-context // PAGE)), np.uint64)

    def reserve(self, positions: int) -> None:
        """Makes sure that positions [0, positions) have pages. ContextError: no room; nothing is lost
        then."""
        need = -(-positions // PAGE)
        for s, state in enumerate(self.states):
            while len(self.pages[s]) < need:
                page = self.pool.take(page_elements(state))
                self.table[s, len(self.pages[s])] = page.ctypes.data
                self.pages[s].append(page)

    def truncate(self, positions: int) -> None:
        """Forgets positions from `positions` on; pages that hold nothing any more go back to the pool."""
        keep = -(-positions // PAGE)
        for pages in self.pages:
            while len(pages) > keep:
                self.pool.give(pages.pop())

    def keys_values(self, s: int, n: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values of positions [0, n) of state s: two arrays f32 `[kv_heads, n, head_dim]`."""
        state, keys, values = self.states[s], [], []
        for page in self.pages[s][: -(-n // PAGE)]:
            halves = page.reshape(state.kv_heads, 2, PAGE * state.head_dim)
            blocks = halves[:, 0].reshape(state.kv_heads, PAGE // LANES, state.head_dim, LANES)
            keys.append(blocks.transpose(0, 1, 3, 2).reshape(state.kv_heads, PAGE, state.head_dim))
            values.append(halves[:, 1].reshape(state.kv_heads, PAGE, state.head_dim))
        return (
            np.concatenate(keys, axis=1)[:, :n].astype(np.float32),
            np.concatenate(values, axis=1)[:, :n].astype(np.float32),
        )

    def write(self, s: int, first: int, keys: NDArray[np.float32], values: NDArray[np.float32]) -> None:
        """Writes keys and values f32 `[rows, kv_heads, head_dim]` at positions first, first + 1, …"""
        state = self.states[s]
        for i in range(len(keys)):
            page, at = divmod(first + i, PAGE)
            halves = self.pages[s][page].reshape(state.kv_heads, 2, PAGE * state.head_dim)
            blocks = halves[:, 0].reshape(state.kv_heads, PAGE // LANES, state.head_dim, LANES)
            blocks[:, at // LANES, :, at % LANES] = keys[i]
            halves[:, 1].reshape(state.kv_heads, PAGE, state.head_dim)[:, at] = values[i]
