"""The KV cache: a pool of pages, and the pages of each sequence, unit by unit.

Pages are written by absolute position, so writing a position again is harmless, and truncating a sequence
does not touch the pages that stay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .arrays import F32
from .errors import ContextError
from .kv_page import Bytes, chunks_of, cleared, page_bytes, views
from .layout import CHUNK, PAGE
from .memory import Arena, forget
from .program import KvState

_SLAB = 32 << 20  # bytes of address space; the system provides memory as pages are written


class Page:
    """A page of the pool: its memory, and the number of sequences that use it."""

    __slots__ = ("address", "bytes", "huge", "missing", "users")

    def __init__(self, memory: Bytes, huge: bool) -> None:
        self.bytes = memory
        self.address = memory.ctypes.data
        self.huge = huge
        """Whether it was cut from a slab of huge pages."""
        self.missing = 0
        """Bytes that were returned to the system, which provides them again on the next write."""
        self.users = 1


class PagePool:
    """Pages for all sequences of a stage. A freed page is reused by the next sequence that needs one.

    `limit` bounds the memory that the pool takes from the system: pages in use, free pages, and the unused
    rest of a huge page. The first page of a sequence is cut from small (4 KiB) memory pages, so that a short
    context touches only what it fills. Later pages are cut from huge memory pages, which attention reads
    faster. Thread-safe."""

    def __init__(self, kv_type: str, limit: int | None = None) -> None:
        self.kv_type = kv_type
        self.used = 0
        """Bytes of the pages that sequences use; a shared page counts once."""
        self.held = 0
        """Bytes of memory taken from the system, or claimed."""
        self._limit = limit
        self._free: dict[tuple[int, bool], list[Page]] = {}
        self._empty: dict[int, list[Page]] = {}
        self._slabs: dict[bool, Arena] = {}
        self._lock = threading.Lock()
        self.spare: Callable[[], bool] | None = None
        """Gives claimed memory back, before a lack of room is an error. False: there is none."""

    def unlock(self) -> None:
        """Replaces the lock. Called in a forked process, where the thread that held it does not exist."""
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Returns the memory of all pages that no sequence uses, whoever still refers to the pool."""
        with self._lock:
            self._free.clear()
            self._empty.clear()
            self._slabs.clear()
            self.held = self.used

    @property
    def limit(self) -> int | None:
        """Bytes of memory that the pool may take; None: no limit. Lowering it returns free pages to the
        system; pages in use stay."""
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        fits = False
        while not fits:
            with self._lock:
                self._limit = limit
                fits = self._return(0)
            fits = fits or self.spare is None or not self.spare()

    def take(self, size: int, *, first: bool) -> Page:
        """A page of `size` bytes with undefined contents. `first`: it is for the first positions of a
        sequence. ContextError: the limit is reached, or the system is out of memory."""
        while True:
            with self._lock:
                try:
                    page = self._found(size, first)
                except MemoryError:
                    raise ContextError(
                        "out of memory for keys and values: end another request, or promise less RAM"
                    ) from None
                if page is not None:
                    page.users = 1
                    self.used += size
                    return page
            if self.spare is None or not self.spare():
                assert self._limit is not None
                raise ContextError(
                    f"keys and values have filled the {self._limit / 1e6:.0f} MB promised for them: "
                    "end another request, shorten the prompt, or promise more RAM"
                )

    def give(self, page: Page) -> None:
        """Drops one sequence's use of a page; the last one frees it."""
        with self._lock:
            page.users -= 1
            if page.users == 0:
                self.used -= page.bytes.nbytes
                self._free.setdefault((page.bytes.nbytes, page.huge), []).append(page)

    def claim(self, size: int, *, free: bool = False) -> bool:
        """Counts memory for something else than pages, which `spare` can give back. With `free`, free pages
        are returned to the system for it, and the next sequence has to get them again. False: the limit does
        not allow it."""
        with self._lock:
            allowed = self._return(size) if free else self._allows(size)
            self.held += size if allowed else 0
            return allowed

    def give_back(self, size: int) -> None:
        """Counts memory no more that was claimed, and is free again."""
        with self._lock:
            self.held -= size

    def _found(self, size: int, first: bool) -> Page | None:
        page = (
            self._reused(size, huge=not first)
            or self._refilled(size)
            or self._cut(size, huge=not first)
            # The limit allows no page of the preferred kind: the other kind will do.
            or self._reused(size, huge=first)
            or self._cut(size, huge=first)
        )
        if page is None and self._return(size):  # free pages of another size made room
            page = self._refilled(size) or self._cut(size, huge=False)
        return page

    def _allows(self, more: int) -> bool:
        return self._limit is None or self.held + more <= self._limit

    def _reused(self, size: int, *, huge: bool) -> Page | None:
        free = self._free.get((size, huge))
        return free.pop() if free else None

    def _refilled(self, size: int) -> Page | None:
        empty = self._empty.get(size)
        if not empty or not self._allows(empty[-1].missing):
            return None
        page = empty.pop()
        self.held, page.missing = self.held + page.missing, 0
        return page

    def _cut(self, size: int, *, huge: bool) -> Page | None:
        slab = self._slabs.get(huge)
        if slab is None or slab.left < size:
            slab = self._slabs[huge] = Arena(max(size, _SLAB // size * size), huge=huge)
        if not self._allows(slab.growth(size)):
            slab.go_on_small()
        more = slab.growth(size)
        if not self._allows(more):
            return None
        memory = slab.take(size)
        self.held += more
        return Page(memory, huge)

    def _return(self, size: int) -> bool:
        """Returns free pages to the system until the limit allows `size` more bytes. False: it still does
        not."""
        for free in self._free.values():
            while free and not self._allows(size):
                page = free.pop()
                page.missing = forget(page.bytes)
                self.held -= page.missing
                self._empty.setdefault(page.bytes.nbytes, []).append(page)
        return self._allows(size)


class _UnitKv:
    """One sequence's pages of one unit, by state, and the number of positions they hold."""

    __slots__ = ("pages", "positions", "states")

    def __init__(self, states: Sequence[KvState]) -> None:
        self.states = states
        self.pages: list[list[Page]] = [[] for _ in states]
        self.positions = 0

    def rows(self) -> Iterator[tuple[KvState, list[Page]]]:
        return zip(self.states, self.pages, strict=True)


class KvRows:
    """Keys and values of one sequence in consecutive units, as an executor reads and writes them."""

    kv_type: str
    table: NDArray[np.uint64]
    """Page addresses `[states of the units, pages of the context]`, for C."""
    _rows: list[tuple[KvState, list[Page]]]

    def keys_values(self, s: int, n: int) -> tuple[F32, F32, F32 | None]:
        """Keys and values of positions [0, n) in row s of the table: two arrays f32
        `[kv_heads, n, head_dim]`. With int8, the second holds the quantised values, and the third array
        their scales `[kv_heads, n]`."""
        state, pages = self._rows[s]
        pages_read = [views(page.bytes, state, self.kv_type) for page in pages[: -(-n // PAGE)]]
        parts = (view.read(min(n - i * PAGE, PAGE)) for i, view in enumerate(pages_read))
        keys, values, scales = zip(*parts, strict=True)
        join = partial(np.concatenate, axis=1)
        return join(keys), join(values), None if scales[0] is None else join(scales)

    def write(self, s: int, first: int, keys: F32, values: F32) -> None:
        """Writes keys and values f32 `[rows, kv_heads, head_dim]` to row s of the table, at positions from
        `first` on."""
        state, pages = self._rows[s]
        for i, (key, value) in enumerate(zip(keys, values, strict=True)):
            page, at = divmod(first + i, PAGE)
            views(pages[page].bytes, state, self.kv_type).write(at, key, value)


class SequenceKv(KvRows):
    """Keys and values of one sequence, unit by unit, and the page table of the running range.

    Every unit of the running range holds the positions that have been run; a unit added to the range holds
    none until they are imported or run. Pages shared with another sequence are copied before they are
    written."""

    def __init__(self, pool: PagePool, states: Sequence[Sequence[KvState]], context: int) -> None:
        """`states`: the states of each unit of the model. The running range is empty at first: see
        `arrange`."""
        self.pool, self.kv_type = pool, pool.kv_type
        self._states, self._context = states, context
        self._units: dict[int, _UnitKv] = {}
        self._end = 0  # no unit has pages or positions from here on
        self._shared = 0  # pages before this position may be shared
        self.arrange(0, 0)

    def arrange(self, first: int, last: int) -> None:
        """Sets the running range to units [first, last): the table's rows are their states, in order."""
        self._range = first, last
        self._running = [(u, self._unit(u)) for u in range(first, last) if self._states[u]]
        self._rows = [(state, pages) for _, unit in self._running for state, pages in unit.rows()]
        self._held = min((len(pages) for _, pages in self._rows), default=0)
        self.table = np.zeros((max(len(self._rows), 1), -(-self._context // PAGE)), np.uint64)
        for row, (_, pages) in zip(self.table, self._rows, strict=False):
            row[: len(pages)] = [page.address for page in pages]

    def keep(self, first: int, last: int) -> None:
        """Frees the pages of all units but [first, last)."""
        for u in [u for u in self._units if not first <= u < last]:
            self._cut_off(self._units.pop(u), 0)

    def positions(self, u: int) -> int:
        """Number of positions that unit u holds."""
        return self._units[u].positions if u in self._units else 0

    def holds(self, u: int) -> bool:
        """Whether unit u has pages here."""
        return u in self._units

    def receive(self, u: int, other: SequenceKv) -> None:
        """Takes over what another sequence of the same pool holds of unit u. It must not be running in
        either."""
        if u in self._units:
            self._cut_off(self._units[u], 0)
        self._units[u] = other._units.pop(u)
        self._end, self._shared = max(self._end, other._end), max(self._shared, other._shared)

    def check(self, first: int, units: range) -> None:
        """ValueError: one of these running units lacks positions before `first`."""
        for u, unit in self._running:
            if unit.positions < first and u in units:
                raise ValueError(
                    f"unit {u} holds {unit.positions} of the {first} positions before the run: "
                    "import the others, or run them again"
                )

    def prepare(self, first: int, end: int) -> None:
        """Allocates pages for a run at positions [first, end), and truncates the sequence to `first`.
        ContextError: no memory for more pages; `truncate` frees those that were allocated before."""
        self.truncate(first)
        self._end = max(self._end, end)
        if -(-end // PAGE) > self._held or first < self._shared:
            for s, (state, pages) in enumerate(self._rows):
                self._reserve(state, pages, first, end, self.table[s])
            self._held = max(self._held, -(-end // PAGE))

    def ran(self, end: int) -> None:
        """Records that the running units hold positions [0, end)."""
        for _, unit in self._running:
            unit.positions = end

    def prepare_part(self, first: int, end: int, units: range) -> KvRows:
        """Allocates pages for a run of some running units at positions [first, end); returns their rows of
        the table. Other units, and positions from `end` on, stay. ContextError: no memory for more pages."""
        self._end = max(self._end, end)
        before, part = self._rows_of(units)
        for s in range(before, before + len(part._rows)):
            self._reserve(*self._rows[s], first, end, self.table[s])
        self._held = min((len(pages) for _, pages in self._rows), default=0)
        return part

    def ran_part(self, end: int, units: range) -> None:
        """Records that these running units hold positions [0, end), and later ones if they did before."""
        for u, unit in self._running:
            if u in units:
                unit.positions = max(unit.positions, end)

    def _rows_of(self, units: range) -> tuple[int, KvRows]:
        """The index of the units' first row of the table, and their rows."""
        before = sum(len(self._states[u]) for u, _ in self._running if u < units.start)
        count = sum(len(self._states[u]) for u, _ in self._running if u in units)
        part = KvRows()
        part.kv_type, part._rows = self.kv_type, self._rows[before : before + count]
        part.table = self.table[before : before + count]
        return before, part

    def truncate(self, positions: int) -> None:
        """Drops positions from `positions` on; pages without positions are returned to the pool."""
        if positions >= self._end:
            return
        self._end = positions
        self._held = min(self._held, -(-positions // PAGE))
        for unit in self._units.values():
            self._cut_off(unit, positions)

    def fork(self, positions: int, context: int | None = None) -> SequenceKv:
        """A new sequence of at most `context` positions (None: as many as this one) with the first
        `positions` of this one, as far as each unit holds them. Full pages are shared, the last partial page
        is copied. ContextError: no memory for the copy."""
        other = SequenceKv(self.pool, self._states, self._context if context is None else context)
        try:
            for u in self._units:
                other.share(u, self, positions)
        except ContextError:
            other.truncate(0)
            raise
        return other

    def share(self, u: int, source: SequenceKv, positions: int) -> None:
        """Lets unit u have the first `positions` of another sequence of the same pool, as far as that holds
        them, and nothing else. Full pages are shared, the last partial page is copied. ContextError: no
        memory for the copy; the unit then has some of the pages and no positions."""
        unit, theirs = self._unit(u), source._units[u]
        self._cut_off(unit, 0)
        n = min(theirs.positions, positions)
        self._end, whole = max(self._end, n), n // PAGE * PAGE
        self._shared, source._shared = max(self._shared, whole), max(source._shared, whole)
        for (state, pages), mine in zip(theirs.rows(), unit.pages, strict=True):
            for page in pages[: n // PAGE]:
                page.users += 1
                mine.append(page)
            if n % PAGE:
                mine.append(self._copy(state, pages[n // PAGE], n % PAGE, first=n < PAGE))
        unit.positions = n

    def export(self, u: int, first: int, last: int) -> bytes:
        """Keys and values of positions [first, last) of unit u, for `accept` on another device: whole chunks
        of 64 positions, state by state, with zeros from `last` on. ValueError: the unit does not hold
        them."""
        if not 0 <= first < last <= self.positions(u):
            raise ValueError(f"unit {u} holds {self.positions(u)} positions, not [{first}, {last})")
        parts = []
        for state, pages in self._units[u].rows():
            for chunk in range(first // CHUNK, -(-last // CHUNK)):
                page, at = divmod(chunk, PAGE // CHUNK)
                part = np.concatenate(
                    [half[:, at] for half in chunks_of(pages[page].bytes, state, self.kv_type)], 1
                )
                if last < (chunk + 1) * CHUNK:
                    part = cleared(part, state, self.kv_type, last % CHUNK)
                parts.append(part.tobytes())
        return b"".join(parts)

    def accept(self, u: int, first: int, last: int, data: bytes | memoryview) -> None:
        """Imports what `export` returned for these positions; the unit then holds positions [0, last).
        ValueError: `data` does not fit, or the unit lacks earlier positions. ContextError: no memory."""
        if not (0 <= u < len(self._states) and self._states[u]):
            raise ValueError(f"unit {u} has no keys and values")
        unit, begin, chunks = self._unit(u), first // CHUNK, -(-last // CHUNK)
        if not 0 <= first < last <= self._context or first > unit.positions:
            raise ValueError(
                f"positions [{first}, {last}) do not follow the {unit.positions} that unit {u} holds, "
                f"within a context of {self._context}"
            )
        sizes = [page_bytes(state, self.kv_type) * CHUNK // PAGE for state in unit.states]
        if len(data) != (chunks - begin) * sum(sizes):
            raise ValueError(
                f"{len(data)} bytes cannot be positions [{first}, {last}) of unit {u}, which have "
                f"{(chunks - begin) * sum(sizes)}"
            )
        left = np.frombuffer(data, np.uint8)
        self._end = max(self._end, last)
        unit.positions = min(unit.positions, first)
        for (state, pages), size in zip(unit.rows(), sizes, strict=True):
            parts, left = np.split(left, [(chunks - begin) * size])
            try:
                self._reserve(state, pages, begin * CHUNK, last)
            finally:
                self.arrange(*self._range)  # the unit may be in the running range
            for chunk, part in enumerate(parts.reshape(-1, state.kv_heads, size // state.kv_heads), begin):
                page, at = divmod(chunk, PAGE // CHUNK)
                keys, values = chunks_of(pages[page].bytes, state, self.kv_type)
                keys[:, at], values[:, at] = np.split(part, [keys.shape[2]], axis=1)
                if not views(pages[page].bytes, state, self.kv_type).sound(at):
                    raise ValueError(f"keys or values of unit {u} are not finite, or of another type")
        unit.positions = last

    def _unit(self, u: int) -> _UnitKv:
        if u not in self._units:
            self._units[u] = _UnitKv(self._states[u])
        return self._units[u]

    def _reserve(
        self, state: KvState, pages: list[Page], first: int, end: int, row: NDArray[np.uint64] | None = None
    ) -> None:
        """Makes the pages of positions [first, end) of a state present and unshared, so that they can be
        written. `row` is the state's row of the table, if it has one."""
        for i in range(first // PAGE, -(-end // PAGE)):
            if i < len(pages) and pages[i].users == 1:
                pass
            elif i < len(pages):
                copy = self._copy(state, pages[i], max(first - i * PAGE, 0), first=i == 0)
                self.pool.give(pages[i])
                pages[i] = copy
            else:
                pages.append(self.pool.take(page_bytes(state, self.kv_type), first=i == 0))
            if row is not None:
                row[i] = pages[i].address

    def _copy(self, state: KvState, page: Page, positions: int, *, first: bool) -> Page:
        """A new page with the first `positions` of another page; the memory of the rest is not touched."""
        copy, chunks = self.pool.take(page.bytes.nbytes, first=first), -(-positions // CHUNK)
        halves = (chunks_of(p.bytes, state, self.kv_type) for p in (copy, page))
        for to, source in zip(*halves, strict=True):
            to[:, :chunks] = source[:, :chunks]
        return copy

    def _cut_off(self, unit: _UnitKv, positions: int) -> None:
        unit.positions = min(unit.positions, positions)
        for pages in unit.pages:
            while len(pages) > -(-positions // PAGE):
                self.pool.give(pages.pop())
