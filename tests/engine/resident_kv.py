"""Resident memory of keys and values stays within the promise, whatever sequences come and go."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations

import numpy as np
import pytest
from tests.engine.test_kv import MIB, resident

from shoal.engine.batch import Run, Want
from shoal.engine.errors import ContextError
from shoal.engine.kv import PagePool, SequenceKv
from shoal.engine.kv_page import page_bytes
from shoal.engine.layout import PAGE
from shoal.engine.model_directory import Model
from shoal.engine.program import KvState
from shoal.engine.stage import Stage, StageOptions

LAYERS = 30
STATE = KvState("kv", 3, 64)
BLOCK = LAYERS * page_bytes(STATE, "f16")
"""Bytes of 256 positions in all layers: 5.9 MB."""
LIMIT = 60_000_000
ROOM = LIMIT // BLOCK
SLACK = 3 * MIB
"""What Python and the C library take beside the pages while a test runs."""


class Sequences:
    """Sequences of one pool; every byte of their pages is written. `check` compares resident memory with the
    promise."""

    def __init__(self, pool: PagePool, layers: Sequence[Sequence[KvState]]) -> None:
        self.pool, self.layers = pool, layers
        self.live: dict[int, tuple[SequenceKv, int]] = {}
        self._numbers = 0
        self._before = resident()

    def add(self, kv: SequenceKv, positions: int) -> int:
        kv.arrange(0, len(self.layers))
        self._numbers += 1
        self.live[self._numbers] = kv, positions
        return self._numbers

    def new(self, positions: int) -> int:
        """A sequence that has run so many positions. ContextError: there is no room; it holds nothing."""
        return self.grow(self.add(SequenceKv(self.pool, self.layers, 64 * PAGE), 0), positions)

    def grow(self, number: int, positions: int) -> int:
        """Runs a sequence on to so many positions. ContextError: it is closed."""
        kv, begin = self.live[number]
        try:
            kv.prepare(begin, positions)
        except ContextError:
            self.close(number)
            raise
        kv.ran(positions)
        for _, unit in kv._running:
            for pages in unit.pages:
                for page in pages[begin // PAGE :]:
                    page.bytes[:] = number % 251
        self.live[number] = kv, positions
        return number

    def fork(self, number: int, positions: int) -> int:
        return self.add(self.live[number][0].fork(positions), positions)

    def move(self, number: int) -> int:
        """Exports a sequence, closes it, and imports it under another number."""
        kv, positions = self.live[number]
        data = [kv.export(u, 0, positions) for u in range(len(self.layers))]
        self.close(number)
        other = self.add(SequenceKv(self.pool, self.layers, 64 * PAGE), positions)
        for u, part in enumerate(data):
            self.live[other][0].accept(u, 0, positions, part)
        return other

    def close(self, number: int) -> None:
        self.live.pop(number)[0].truncate(0)

    def check(self) -> None:
        assert self.pool.limit is not None
        assert self.pool.used <= self.pool.held <= self.pool.limit
        assert resident() - self._before <= self.pool.limit + SLACK


@contextmanager
def sequences(
    limit: int = LIMIT, layers: Sequence[Sequence[KvState]] = [[STATE]] * LAYERS
) -> Iterator[Sequences]:
    found = Sequences(PagePool("f16", limit), layers)
    yield found
    for number in list(found.live):
        found.close(number)


def short(all_: Sequences, count: int) -> None:
    """Short sequences, as many at once as there is room for, all closed at the end."""
    while count:
        numbers = []
        for _ in range(min(count, ROOM)):
            numbers.append(all_.new(10))
            all_.check()
        for number in numbers:
            all_.close(number)
        count -= len(numbers)


def long(all_: Sequences, count: int) -> None:
    """Long sequences that share all of the room and grow in turn, all closed at the end."""
    numbers = [all_.new(PAGE) for _ in range(count)]
    for pages in range(2, ROOM // count + 1):
        for number in numbers:
            all_.grow(number, pages * PAGE)
            all_.check()
    assert all_.pool.used == ROOM // count * count * BLOCK
    for number in numbers:
        all_.close(number)


def forked(all_: Sequences, count: int) -> None:
    """Forks of a sequence of three pages, each with a page of its own."""
    trunk = all_.new(3 * PAGE)
    numbers = [all_.grow(all_.fork(trunk, 3 * PAGE), 3 * PAGE + 9) for _ in range(count)]
    all_.check()
    for number in (trunk, *numbers):
        all_.close(number)


def moved(all_: Sequences, count: int) -> None:
    """Sequences that are exported and imported again."""
    numbers = [all_.new(ROOM // count * PAGE - 70) for _ in range(count)]
    for number in numbers:
        all_.close(all_.move(number))
        all_.check()


@pytest.mark.slow
@pytest.mark.parametrize("order", list(permutations([(short, 19), (long, 2), (forked, 4)])))
def test_resident_memory_stays_within_the_promise(
    order: Sequence[tuple[Callable[[Sequences, int], None], int]],
) -> None:
    """Nineteen short sequences, two long ones and forks in every order, then imports, and all of it again."""
    with sequences() as found:
        for use, count in [*order, (moved, 1), *order]:
            use(found, count)
            assert found.pool.used == 0
            found.check()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_sequences_at_random_fit_as_counted_in_whole_pages(seed: int) -> None:
    """Exactly those get room whose pages the count allows, and resident memory keeps the promise."""
    rng = random.Random(seed)
    layers: Sequence[Sequence[KvState]] = [[STATE]] * LAYERS
    if seed % 2:  # pages of two sizes
        layers = [[STATE], [KvState("other", 8, 80)]] * 6
    block = sum(page_bytes(state, "f16") for states in layers for state in states)
    with sequences(10 * block + rng.randrange(block), layers) as found:
        room, refused = 10, 0

        def pages(positions: int) -> int:
            return -(-positions // PAGE)

        for _ in range(250):
            held = sum(pages(positions) for _, positions in found.live.values())
            positions = rng.choice((1, 10, PAGE, PAGE + 1, rng.randrange(1, 5 * PAGE)))
            number = rng.choice([0, *found.live])
            more = pages(positions) if number == 0 else 1
            try:
                if number == 0:
                    found.new(positions)
                elif rng.random() < 0.5:
                    found.grow(number, pages(found.live[number][1]) * PAGE + 1)
                else:
                    found.close(number)
                    continue
            except ContextError:
                refused += 1
                assert held + more > room
            else:
                assert held + more <= room
            found.check()
        assert refused > 5


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_stage_says_for_how_many_pages_it_has_room(tiny_int8: Model, first: int) -> None:
    states = [state for unit in tiny_int8.program.units[first:4] for state in unit.states]
    each = sum(page_bytes(state, tiny_int8.kv_dtype) for state in states)
    with Stage(tiny_int8, first, 4, StageOptions(kv_bytes=3 * each + each // 2, max_rows=PAGE)) as stage:
        assert stage.kv_pages == 3
        for sequence in range(4):
            stage.open_sequence(sequence)
        hidden = None if first == 0 else np.ones((1, tiny_int8.program.cut_cols), np.float32)
        for sequence in range(3):
            stage.run([Run(sequence, 0, [1], Want.NOTHING, hidden)])
        for _ in range(2):
            with pytest.raises(ContextError, match="promise more RAM"):
                stage.run([Run(3, 0, [1], Want.NOTHING, hidden)])
            assert stage.kv_bytes == 3 * each  # a run without room takes none of the rest
        stage.close_sequence(3)
        assert stage.kv_bytes == 3 * each


def test_a_stage_without_a_cap_or_without_state_has_room_without_end(tiny_int8: Model) -> None:
    with Stage(tiny_int8, 0, 5) as stage:
        assert stage.kv_pages is None
        stage.set_range(0, 2, 10**6)
        assert stage.kv_pages is not None
    with Stage(tiny_int8, 0, 1, StageOptions(kv_bytes=10**6)) as stage:
        assert stage.kv_pages is None


def test_transitions_leave_no_memory_behind(tiny_int8: Model) -> None:
    """Ranges that come and go, pages and copies that are adopted or dropped, parts, and kept rows."""
    tokens = [n % 267 for n in range(PAGE)]
    options = StageOptions(threads=1, resident=True, kv_bytes=8 * MIB, keep_rows=True)
    with Stage(tiny_int8, 0, 5, options) as giver, Stage(tiny_int8, 0, 2, options) as stage:
        giver.open_sequence(1)
        giver.run([Run(1, 0, tokens, Want.NOTHING)])

        def go_through() -> None:
            stage.open_sequence(1)
            stage.run([Run(1, 0, tokens, Want.NOTHING)])
            dropped, area = stage.incoming(), stage.incoming()
            stage.discard(stage.prepare(1, 4))
            ready = stage.prepare(0, 4)
            for unit in (2, 3):
                data = giver.export_positions(1, unit, 0, PAGE)
                area.accept(1, unit, 0, PAGE, data)
                dropped.accept(7, unit, 0, PAGE, data)
            dropped.close()
            stage.hold([4, 1])
            stage.adopt(ready, {1: PAGE}, area, kv_bytes=8 * MIB)
            for part in ((0, 2), (1, 3), (2, 4)):
                hidden = None if part[0] == 0 else np.ones((64, tiny_int8.program.cut_cols), np.float32)
                stage.run([Run(1, 0, tokens[:64], Want.NOTHING, hidden, part)])
            stage.adopt(stage.prepare(0, 2), {}, kv_bytes=8 * MIB)
            stage.hold([])
            assert stage.kv_bytes == stage._kept.bytes == 0
            assert stage._weights.units == {0, 1}

        for _ in range(5):
            go_through()
        held, before = stage._pool.held, resident()
        for _ in range(300):
            go_through()
        assert stage._pool.held == held
        # 10 KiB a round: a page has 32. What Python keeps (a table of strings that grows, its heap) is less.
        assert resident() - before < 3 * MIB
